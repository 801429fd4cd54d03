"""Clipping inside the inner loop: the meta-gradient goes through it, whatever tasks it changes."""

from functools import partial

import numpy as np
import pytest

import tinymeta as tm
from regression import assert_close, finite_difference, flat, loss, problem, task

STEPS, ALPHA = 3, 0.1
NORMS = {"clipped": 0.2, "mixed": 2.0, "within": 50.0}  # all tasks in all steps, some, none


def rule(norm, inner=tm.solvers.sgd):
    return partial(tm.solvers.clipped, norm=norm, rule=inner)


def inner_norms(theta, support, norm):
    """‖∇L_s(φ_k)‖ before clipping: (steps, tasks)."""
    path = tm.meta.trajectory(loss, theta, support, alpha=ALPHA, steps=STEPS - 1, rule=rule(norm))
    grads = [tm.grad(tm.sum(loss(phi, support)), phi) for phi in path]
    return np.array([np.sqrt(tm.solvers.dot(g, g).data) for g in grads])


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("inner", ["sgd", "momentum", "adam"])
def test_maml_through_clipped_steps_is_the_finite_difference(kind, inner):
    theta, support, query = problem()
    options = {"alpha": ALPHA, "steps": STEPS, "rule": rule(NORMS[kind], getattr(tm.solvers, inner))}
    if inner == "sgd":
        share = (inner_norms(theta, support, NORMS[kind]) > NORMS[kind]).mean()
        assert {"clipped": share == 1, "mixed": 0 < share < 1, "within": share == 0}[kind]
    query_loss, meta_grad = tm.meta.maml(loss, theta, support, query, **options)

    def adapted_loss(theta):
        return loss(tm.meta.adapt(loss, theta, support, **options), query).data.mean()

    assert query_loss.item() == pytest.approx(adapted_loss(theta), rel=1e-13)
    assert_close(meta_grad, finite_difference(adapted_loss, theta), rtol=1e-6)
    compiled = tm.compile(lambda theta, support, query: tm.meta.maml(loss, theta, support, query, **options))
    np.testing.assert_allclose(flat(compiled(theta, support, query)[1]), flat(meta_grad), rtol=1e-12, atol=1e-14)
    _, plain = tm.meta.maml(loss, theta, support, query, **options | {"rule": getattr(tm.solvers, inner)})
    assert (flat(plain) == flat(meta_grad)).all() == (kind == "within")


def test_a_factor_taken_for_a_constant_would_be_wrong():
    theta, support, query = problem()

    def constant(params, grads, state=None, *, lr):
        scaled = [c * tm.stop_gradient(g) for c, g in zip(tm.solvers.clip(grads, 0.2, stacked=True), grads)]
        factor = [tm.stop_gradient(s / (g * g)) for s, g in zip(scaled, grads)]
        return tm.solvers.sgd(params, [f * g for f, g in zip(factor, grads)], lr=lr)

    steps = {"alpha": ALPHA, "steps": STEPS}
    right, wrong = (flat(tm.meta.maml(loss, theta, support, query, rule=r, **steps)[1]) for r in (rule(0.2), constant))
    assert np.abs(right - wrong).max() > 0.01 * np.abs(right).max()


def test_a_step_is_as_long_as_the_norm_and_a_task_does_not_see_the_others():
    theta, support, query = problem()
    support = support[0], support[1] * np.array([1.0, 1e3, 1e6])[:, None, None]
    options = {"alpha": ALPHA, "steps": 1, "rule": rule(0.5)}
    phi = tm.meta.adapt(loss, theta, support, **options)
    moved = np.sqrt(sum(((p.data - t.data) ** 2).sum(axis=(1, 2)) for p, t in zip(phi, theta)))
    np.testing.assert_allclose(moved[1:], ALPHA * 0.5, rtol=1e-8)
    assert moved[0] <= ALPHA * 0.5 * (1 + 1e-12)
    for i in range(3):
        alone = tm.meta.adapt(loss, theta, task(support, i), **options)
        assert all((p.data[i] == a.data[0]).all() for p, a in zip(phi, alone))


def test_orders_of_derivatives_and_a_task_without_gradient():
    """A task that is solved already has a gradient of 0."""
    theta, support, query = problem()
    y = support[1].copy()
    y[0] = tm.nn.mlp([t[None] for t in theta], support[0][:1], activation=tm.tanh).data[0]
    support = support[0], y
    for norm in NORMS.values():
        options = {"alpha": ALPHA, "steps": 2, "rule": rule(norm), "create_graph": True}
        phi = tm.meta.adapt(loss, theta, support, **options)
        first = tm.grad(tm.sum(loss(phi, query)), theta, create_graph=True)
        second = tm.grad(sum(tm.sum(g * g) for g in first), theta)
        assert np.isfinite(flat(first)).all() and np.isfinite(flat(second)).all()
        np.testing.assert_allclose(phi[0].data[0], theta[0].data, rtol=1e-14)
