"""Modular shrinkage: the meta-gradient of weights and variances against dense solves and exactly solved inner problems."""

from functools import partial

import numpy as np
import pytest

import tinymeta as tm
from regression import assert_close, dense, finite_difference, flat, loss, problem, solve

MODULES = [[2, 3], [0, 1]]  # of [W1, b1, W2, b2]; not in the order of the weights
LAM = [8.0, 8.0, 12.0, 12.0]  # of each weight


def meta_parameters(lam=LAM):
    """([*weights, *log σ²], support, query)"""
    weights, support, query = problem()
    return [*weights, *(tm.Tensor(-np.log(lam[module[0]])) for module in MODULES)], support, query


def test_it_is_the_finite_difference_through_a_solved_inner_problem():
    """Of the weights and of log σ² alike."""
    theta, support, query = meta_parameters()

    def predictive(theta):
        lam = [np.exp(-theta[5].item())] * 2 + [np.exp(-theta[4].item())] * 2
        return loss(solve(theta[:4], support, lam), query).data.mean()

    query_loss, meta_grad = tm.meta.shrinkage(
        loss, theta, support, query, modules=MODULES, alpha=1.0, steps=10, cg_steps=40,
        solve=partial(tm.solvers.hessian_free, cg_steps=15),
    )  # fmt: skip
    numeric = finite_difference(predictive, theta, step=1e-5)
    assert query_loss.item() == pytest.approx(predictive(theta), rel=1e-12)
    assert_close(meta_grad[:4], numeric[:4], rtol=1e-6)
    assert_close(meta_grad[4:], numeric[4:], rtol=1e-6)
    assert min(abs(n) for n in numeric[4:]) > 1e-3


@pytest.mark.parametrize("steps", range(6))
def test_it_is_a_dense_solve_wherever_phi_is(steps):
    lam = [10 * lam_i for lam_i in LAM]
    theta, support, query = meta_parameters(lam)
    inner = {"alpha": 0.003, "steps": steps}
    _, meta_grad = tm.meta.shrinkage(loss, theta, support, query, modules=MODULES, cg_steps=40, **inner)
    phi = tm.meta.adapt(tm.meta.proximal(loss, theta[:4], lam), theta[:4], support, **inner)
    x = dense(phi, support, query, lam)
    away = np.concatenate([(p.data - t.data).reshape(3, -1) for p, t in zip(phi, theta)], axis=1)
    first = theta[0].size + theta[1].size
    np.testing.assert_allclose(flat(meta_grad[:4]), x.mean(0), rtol=1e-8)
    expected = [(x * away)[:, first:].sum(1).mean(), (x * away)[:, :first].sum(1).mean()]
    np.testing.assert_allclose(flat(meta_grad[4:]), expected, rtol=1e-8, atol=1e-15)
    assert [g.shape for g in meta_grad] == [t.shape for t in theta] and not any(g.inputs for g in meta_grad)


def test_one_module_is_imaml_with_a_learned_lam():
    weights, support, query = problem()
    inner = {"alpha": 0.02, "steps": 5, "cg_steps": 3}
    theta = [*weights, tm.Tensor(-np.log(9.0))]
    query_loss, meta_grad = tm.meta.shrinkage(loss, theta, support, query, modules=[range(4)], **inner)
    expected_loss, expected = tm.meta.imaml(loss, weights, support, query, lam=9.0, **inner)
    np.testing.assert_allclose(flat(meta_grad[:4]), flat(expected), rtol=1e-12)
    assert query_loss.item() == pytest.approx(expected_loss.item(), rel=1e-13)


def test_no_cg_step_is_the_papers_estimate():
    """⟨φ_m − θ_m, ∇L_q(φ)_m⟩, a mean over the tasks: equation 4 of Chen et al."""
    theta, support, query = meta_parameters()
    inner = {"alpha": 0.02, "steps": 4}
    _, meta_grad = tm.meta.shrinkage(loss, theta, support, query, modules=MODULES, cg_steps=0, **inner)
    phi = tm.meta.adapt(tm.meta.proximal(loss, theta[:4], LAM), theta[:4], support, **inner)
    g = tm.grad(tm.sum(loss(phi, query)), phi)
    for module, bar in zip(MODULES, meta_grad[4:]):
        expected = sum(((phi[i].data - theta[i].data) * g[i].data).sum() for i in module) / 3
        assert bar.item() == pytest.approx(expected, rel=1e-12)


def test_a_module_of_small_variance_stays():
    theta, support, query = meta_parameters([1e6, 1e6, 12.0, 12.0])
    weights, lam = tm.meta.precisions(theta, MODULES)
    np.testing.assert_allclose(flat(lam), [1e6, 1e6, 12, 12])
    solver = partial(tm.solvers.hessian_free, cg_steps=15)
    phi = tm.meta.adapt(tm.meta.proximal(loss, weights, lam), weights, support, alpha=1.0, steps=8, solve=solver)
    moved = [np.abs(p.data - w.data).max() for p, w in zip(phi, weights)]
    assert max(moved[:2]) < 1e-5 and min(moved[2:]) > 1e-2


def test_the_options_are_those_of_imaml():
    theta, support, query = meta_parameters()
    base = {"modules": MODULES, "alpha": 0.02, "steps": 3, "cg_steps": 3}
    reference = flat(tm.meta.shrinkage(loss, theta, support, query, **base)[1])
    for option in [
        {"damping": 5.0},
        {"linear_solver": partial(tm.solvers.neumann, eta=0.3)},
        {"rule": tm.solvers.nesterov},
        {"batch": lambda data, step: tuple(a[:, step : step + 2] for a in data)},
        {"solve": partial(tm.solvers.hessian_free, cg_steps=5)},
    ]:
        _, meta_grad = tm.meta.shrinkage(loss, theta, support, query, **base, **option)
        _, expected = tm.meta.imaml(
            loss, theta[:4], support, query, lam=LAM, **{k: v for k, v in base.items() if k != "modules"}, **option
        )
        np.testing.assert_allclose(flat(meta_grad[:4]), flat(expected), rtol=1e-11, err_msg=str(option))
        assert not np.allclose(flat(meta_grad)[-2:], reference[-2:], rtol=1e-4), option
    *_, solution = tm.meta.shrinkage(loss, theta, support, query, report=True, **base)
    assert solution.iterations.data.tolist() == [3, 3, 3]


def test_compiled_is_eager_and_float32_stays():
    options = {"modules": MODULES, "alpha": 0.02, "steps": 3, "cg_steps": 3, "report": True}
    f = lambda *args: tm.meta.shrinkage(loss, *args, **options)
    compiled = tm.compile(f)
    for lam in (LAM, LAM[::-1]):
        args = meta_parameters(lam)
        np.testing.assert_allclose(flat(compiled(*args)[1]), flat(f(*args)[1]), rtol=1e-11)
    assert len(compiled.programs) == 1
    theta, support, query = meta_parameters()
    theta = [tm.Tensor(t.data.astype(np.float32)) for t in theta]
    query_loss, meta_grad, _ = f(theta, *(tuple(a.astype(np.float32) for a in data) for data in (support, query)))
    assert {query_loss.dtype, *(g.dtype for g in meta_grad)} == {np.dtype(np.float32)}


def test_theta_with_a_history_is_refused():
    theta, support, query = meta_parameters()
    options = {"modules": MODULES, "alpha": 0.02, "steps": 1, "cg_steps": 1}
    with pytest.raises(ValueError, match=r"theta\[0\] is the result of"):
        tm.meta.shrinkage(loss, [t * 1.0 for t in theta], support, query, **options)


def test_refusals_and_warnings():
    theta, support, query = meta_parameters()
    options = {"alpha": 0.02, "steps": 1, "cg_steps": 20}
    for modules in ([[0, 1], [2]], [[0, 1], [1, 2, 3]], [[0, 1], [2, 4]]):
        with pytest.raises(ValueError, match=r"each of 0 ... 3 must be in one module"):
            tm.meta.shrinkage(loss, theta, support, query, modules=modules, **options)
    with pytest.raises(ValueError, match=r"0-d log σ² for each of 2 modules, got shapes \[\(\), \(1,\)\]"):
        bad = [*theta[:5], tm.Tensor(np.zeros(1))]
        tm.meta.shrinkage(loss, bad, support, query, modules=MODULES, **options)
    loose = [*theta[:4], tm.Tensor(8.0), tm.Tensor(8.0)]
    with pytest.warns(
        RuntimeWarning, match="shrinkage: .* not positive definite in [1-3] of 3 tasks: a σ² is too large"
    ):
        tm.meta.shrinkage(loss, loose, support, query, modules=MODULES, **options)
    report = tm.meta.shrinkage(loss, loose, support, query, modules=MODULES, report=True, **options)[2]
    assert report.negative_curvature.data.any()
    tight = [*theta[:4], tm.Tensor(-np.log(3.0)), tm.Tensor(-np.log(3.0))]
    few = options | {"steps": 20, "cg_steps": 1}
    with pytest.warns(
        RuntimeWarning, match="shrinkage: .*L_q is left unsolved in [23] of 3 tasks, .* after 1 products"
    ):
        tm.meta.shrinkage(loss, tight, support, query, modules=MODULES, **few)
    assert tm.meta.shrinkage(loss, tight, support, query, modules=MODULES, report=True, **few)[2].unconverged.data.any()
