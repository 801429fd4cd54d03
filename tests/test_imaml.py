"""iMAML: the implicit gradient against dense solves, finite differences through a solved inner problem, and long MAML."""

import warnings
from functools import partial

import numpy as np
import pytest

import tinymeta as tm
from regression import assert_close, dense_hessian, finite_difference, flat, loss, problem, task

LAM = 5.0
proximal = tm.meta.proximal


def solve(theta, support, lam=LAM):
    """argmin of the proximal inner problem to rounding: gradient descent, then a few Newton steps per task."""
    phi = tm.meta.adapt(proximal(loss, theta, lam), theta, support, alpha=0.05, steps=400)
    solved = []
    for i in range(len(phi[0])):
        phi_i, s = [tm.Tensor(p.data[i]) for p in phi], task(support, i)

        def g(x, s=s):
            return proximal(loss, theta, lam)([p[None] for p in x], s)[0]

        for _ in range(4):
            step = np.linalg.solve(dense_hessian(g, phi_i), flat(tm.grad(g(phi_i), phi_i)))
            ends = np.cumsum([p.size for p in phi_i])[:-1]
            phi_i = [tm.Tensor(p.data - d.reshape(p.shape)) for p, d in zip(phi_i, np.split(step, ends))]
        assert np.abs(flat(tm.grad(g(phi_i), phi_i))).max() < 1e-12
        solved.append(phi_i)
    return [tm.stack(ps) for ps in zip(*solved)]


def dense(phi, support, query, lam=LAM):
    """mean over tasks of (I + H/λ)⁻¹ ∇L_q(φ) with dense Hessians."""
    result = []
    for i in range(len(phi[0])):
        phi_i = [tm.Tensor(p.data[i]) for p in phi]
        h = dense_hessian(lambda x, i=i: loss([p[None] for p in x], task(support, i))[0], phi_i)
        b = flat(tm.grad(loss([p[None] for p in phi_i], task(query, i))[0], phi_i))
        result.append(np.linalg.solve(np.eye(len(h)) + h / lam, b))
    return np.mean(result, axis=0)


@pytest.mark.parametrize("steps", range(6))
def test_it_is_a_dense_solve_wherever_phi_is(steps):
    theta, support, query = problem()
    lam, alpha = 40.0, 0.02  # convex even at θ
    options = {"lam": lam, "alpha": alpha, "steps": steps}
    query_loss, meta_grad = tm.meta.imaml(loss, theta, support, query, cg_steps=40, **options)
    phi = tm.meta.adapt(proximal(loss, theta, lam), theta, support, alpha=alpha, steps=steps)
    np.testing.assert_allclose(flat(meta_grad), dense(phi, support, query, lam), rtol=1e-8)
    assert query_loss.item() == pytest.approx(loss(phi, query).data.mean())


def test_it_is_the_finite_difference_through_a_solved_inner_problem():
    theta, support, query = problem()
    _, meta_grad = tm.meta.implicit_gradient(loss, solve(theta, support), support, query, lam=LAM, cg_steps=60)
    numeric = finite_difference(lambda theta: loss(solve(theta, support), query).data.mean(), theta, step=1e-5)
    assert_close(meta_grad, numeric, rtol=1e-6)


def test_it_does_not_depend_on_how_the_inner_problem_was_solved():
    """Gradient descent at two step sizes, Nesterov's method and momentum, each run to convergence."""
    theta, support, query = problem()
    exact = flat(tm.meta.implicit_gradient(loss, solve(theta, support), support, query, lam=LAM, cg_steps=60)[1])
    for rule, alpha, steps in [
        ("sgd", 0.05, 800),
        ("sgd", 0.02, 1500),
        ("nesterov", 0.02, 300),
        ("momentum", 0.02, 300),
    ]:
        options = {"alpha": alpha, "steps": steps, "rule": getattr(tm.solvers, rule)}
        _, meta_grad = tm.meta.imaml(loss, theta, support, query, lam=LAM, cg_steps=60, **options)
        np.testing.assert_allclose(flat(meta_grad), exact, rtol=1e-6, err_msg=rule)


def test_long_proximal_maml_tends_to_it():
    """Unrolled back-propagation through gradient descent on the proximal problem: two independent ways to one limit."""
    theta, support, query = problem()
    exact = flat(tm.meta.implicit_gradient(loss, solve(theta, support), support, query, lam=LAM, cg_steps=60)[1])
    errors = []
    for steps in (10, 40, 320):
        phi = tm.meta.adapt(proximal(loss, theta, LAM), theta, support, alpha=0.05, steps=steps, create_graph=True)
        unrolled = flat(tm.grad(tm.mean(loss(phi, query)), theta))
        errors.append(np.abs(unrolled - exact).max() / np.abs(exact).max())
    assert errors[0] > 10 * errors[1] and errors[2] < 1e-7


def test_closed_form_on_a_quadratic():
    """L_s = ½ φᵀAφ: φ* = λ (A + λI)⁻¹ θ and ∇F = λ (A + λI)⁻¹ C (φ* − c), also for A with a negative eigenvalue > −λ."""
    a, c, centre = np.diag([1, 2, -0.5]), np.diag([0.5, 1, 2]), np.array([1, -1, 0.5])
    theta = np.array([0.3, 0.2, -0.7])

    def quadratic(phi, data):
        d = phi[0] - data[1]
        return tm.sum(0.5 * tm.matmul(d[:, None, :], data[0])[:, 0] * d, axis=1)

    inverse = LAM * np.linalg.inv(a + LAM * np.eye(3))
    query_loss, (meta_grad,) = tm.meta.imaml(
        quadratic, [tm.Tensor(theta)], (a[None], np.zeros((1, 3))), (c[None], centre[None]),
        lam=LAM, alpha=0.2, steps=200, cg_steps=4,
    )  # fmt: skip
    np.testing.assert_allclose(meta_grad.data, inverse @ c @ (inverse @ theta - centre), rtol=1e-10)


def test_no_cg_step_is_first_order_maml_at_the_same_phi():
    theta, support, query = problem()
    phi = tm.meta.adapt(loss, theta, support, alpha=0.05, steps=3)
    _, implicit = tm.meta.implicit_gradient(loss, phi, support, query, lam=LAM, cg_steps=0)
    _, first_order = tm.meta.fomaml(loss, theta, support, query, alpha=0.05, steps=3)
    np.testing.assert_allclose(flat(implicit), flat(first_order), rtol=1e-13)


def test_a_large_lam_tends_to_first_order_maml_and_a_small_one_does_not():
    theta, support, query = problem()
    phi = tm.meta.adapt(loss, theta, support, alpha=0.05, steps=3)
    first = flat(tm.meta.implicit_gradient(loss, phi, support, query, lam=LAM, cg_steps=0)[1])
    gaps = []
    for lam in (1e1, 1e3, 1e5):
        gaps.append(
            np.abs(flat(tm.meta.implicit_gradient(loss, phi, support, query, lam=lam, cg_steps=40)[1]) - first).max()
        )
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2]


def test_damping_adds_to_lam_in_the_system_and_not_in_the_inner_problem():
    theta, support, query = problem()
    inner = {"alpha": 0.05, "steps": 3}
    phi = tm.meta.adapt(proximal(loss, theta, LAM), theta, support, **inner)
    _, expected = tm.meta.implicit_gradient(loss, phi, support, query, lam=LAM + 7, cg_steps=40)
    _, damped = tm.meta.imaml(loss, theta, support, query, lam=LAM, damping=7.0, cg_steps=40, **inner)
    _, exact = tm.meta.imaml(loss, theta, support, query, lam=LAM, cg_steps=40, **inner)
    np.testing.assert_allclose(flat(damped), flat(expected), rtol=1e-13)
    assert np.abs(flat(damped) - flat(exact)).max() > 1e-3
    for damping in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="damping must be 0 or more"):
            tm.meta.imaml(loss, theta, support, query, lam=LAM, damping=damping, cg_steps=1, **inner)


def test_phi_may_be_arrays_from_any_solver_and_tol_ends_cg():
    theta, support, query = problem()
    phi = tm.meta.adapt(loss, theta, support, alpha=0.05, steps=3)
    options = {"lam": LAM, "cg_steps": 40, "report": True}
    *_, exact = tm.meta.implicit_gradient(loss, [p.data for p in phi], support, query, **options)
    *_, rough = tm.meta.implicit_gradient(
        loss, phi, support, query, linear_solver=partial(tm.solvers.cg, tol=0.3), **options
    )
    assert (rough.iterations.data < exact.iterations.data).all()
    assert (rough.residual.data > 1e-6).any() and (exact.residual.data < 1e-8).all()


def test_a_loss_that_is_no_number_per_task_is_named_before_the_pull_hides_it():
    theta, support, query = problem()

    def mean_loss(phi, data):
        return tm.mean(loss(phi, data))

    with pytest.raises(ValueError, match="mean_loss returned"):
        tm.meta.adapt(proximal(mean_loss, theta, LAM), theta, support, alpha=0.05, steps=1)


def test_the_report():
    theta, support, query = problem()
    options = {"lam": LAM, "alpha": 0.05, "steps": 5, "report": True}
    few, many = (tm.meta.imaml(loss, theta, support, query, cg_steps=k, **options)[2] for k in (2, 40))
    assert few.iterations.data.tolist() == [2, 2, 2] and (many.residual.data < 1e-8).all()
    assert (few.residual.data > many.residual.data).all() and not many.negative_curvature.data.any()


def test_negative_curvature_is_counted_in_a_warning_or_in_the_report():
    theta, support, query = problem()
    phi = tm.meta.adapt(loss, theta, support, alpha=0.05, steps=1)
    smallest = min(
        np.linalg.eigvalsh(
            dense_hessian(
                lambda x, i=i: loss([p[None] for p in x], task(support, i))[0], [tm.Tensor(p.data[i]) for p in phi]
            )
        )[0]
        for i in range(3)
    )
    assert smallest < -1e-3  # the network's loss is not convex here
    lam = -smallest / 20
    with pytest.warns(RuntimeWarning, match=r"not positive definite in [1-3] of 3 tasks: λ ="):
        _, meta_grad = tm.meta.implicit_gradient(loss, phi, support, query, lam=lam, cg_steps=40)
    assert np.isfinite(flat(meta_grad)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = tm.meta.implicit_gradient(loss, phi, support, query, lam=lam, cg_steps=40, report=True)[2]
        tm.meta.implicit_gradient(loss, phi, support, query, lam=-2 * smallest, cg_steps=40)
    assert report.negative_curvature.data.any()
    for i, indefinite in enumerate(report.negative_curvature.data):  # such a task has its first-order gradient
        alone = [p.data[i : i + 1] for p in phi], task(support, i), task(query, i)
        g, first = (tm.meta.implicit_gradient(loss, *alone, lam=lam, cg_steps=k, report=True)[1] for k in (40, 0))
        assert np.allclose(flat(g), flat(first), rtol=1e-12, atol=0) == indefinite


@pytest.mark.parametrize("lam", [0.0, -1.0, float("nan")])
def test_lam_must_be_positive(lam):
    theta, support, query = problem()
    with pytest.raises(ValueError, match="lam must be positive"):
        tm.meta.imaml(loss, theta, support, query, lam=lam, alpha=0.1, steps=1, cg_steps=1)
