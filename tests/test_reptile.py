"""Reptile: its definition, and what tells it from FO-MAML."""

import numpy as np
import pytest

import tinymeta as tm
from regression import assert_close, flat, loss, problem

ALPHA = 0.05


@pytest.mark.parametrize("steps", range(6))
def test_the_meta_gradient_is_theta_minus_phi(steps):
    theta, support, query = problem()
    query_loss, meta_grad = tm.meta.reptile(loss, theta, support, query, alpha=ALPHA, steps=steps)
    phi = tm.meta.adapt(loss, theta, support, alpha=ALPHA, steps=steps)
    for g, t, p in zip(meta_grad, theta, phi, strict=True):
        np.testing.assert_allclose(g.data, t.data - p.data.mean(0), atol=1e-14)
    assert query_loss.item() == pytest.approx(loss(phi, query).data.mean(), rel=1e-13)


def test_an_outer_step_of_1_moves_to_the_mean_of_phi():
    theta, support, query = problem()
    _, meta_grad = tm.meta.reptile(loss, theta, support, query, alpha=ALPHA, steps=3)
    phi = tm.meta.adapt(loss, theta, support, alpha=ALPHA, steps=3)
    moved, _ = tm.solvers.sgd(theta, meta_grad, lr=1.0)
    assert_close(moved, [p.data.mean(0) for p in phi], 1e-13)


def test_one_step_is_joint_training_and_several_are_the_sum_of_the_gradients_on_the_way():
    theta, support, query = problem()
    phi, gradients = tm.meta.adapt(loss, theta, support, alpha=ALPHA, steps=0), []
    for k in range(1, 4):
        gradients.append(flat([g.mean(axis=0) for g in tm.grad(tm.sum(loss(phi, support)), phi)]))
        phi = tm.meta.adapt(loss, theta, support, alpha=ALPHA, steps=k)
        _, meta_grad = tm.meta.reptile(loss, theta, support, query, alpha=ALPHA, steps=k)
        np.testing.assert_allclose(flat(meta_grad), ALPHA * np.sum(gradients, axis=0), rtol=1e-9)
    one = flat(tm.meta.reptile(loss, theta, support, query, alpha=ALPHA, steps=1)[1]) / ALPHA
    _, first_order = tm.meta.fomaml(loss, theta, support, query, alpha=ALPHA, steps=1)
    assert np.abs(one - flat(first_order)).max() > 0.01
