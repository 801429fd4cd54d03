"""iMAML: the implicit gradient against dense solves, finite differences through a solved inner problem, and long MAML."""

import warnings
from functools import partial

import numpy as np
import pytest

import tinymeta as tm
from regression import assert_close, dense, dense_hessian, finite_difference, flat, loss, problem, solve, task

LAM = 5.0
proximal = tm.meta.proximal


@pytest.mark.parametrize("steps", range(6))
def test_it_is_a_dense_solve_wherever_phi_is(steps):
    theta, support, query = problem()
    lam, alpha = 40.0, 0.02  # convex even at θ
    options = {"lam": lam, "alpha": alpha, "steps": steps}
    query_loss, meta_grad = tm.meta.imaml(loss, theta, support, query, cg_steps=40, **options)
    phi = tm.meta.adapt(proximal(loss, theta, lam), theta, support, alpha=alpha, steps=steps)
    np.testing.assert_allclose(flat(meta_grad), dense(phi, support, query, lam).mean(0), rtol=1e-8)
    assert query_loss.item() == pytest.approx(loss(phi, query).data.mean())


def test_it_is_the_finite_difference_through_a_solved_inner_problem():
    theta, support, query = problem()
    _, meta_grad = tm.meta.implicit_gradient(loss, solve(theta, support, LAM), support, query, lam=LAM, cg_steps=60)
    numeric = finite_difference(lambda theta: loss(solve(theta, support, LAM), query).data.mean(), theta, step=1e-5)
    assert_close(meta_grad, numeric, rtol=1e-6)


def test_it_does_not_depend_on_how_the_inner_problem_was_solved():
    """Gradient descent at two step sizes, Nesterov's method, momentum and Hessian-free, each run to convergence."""
    theta, support, query = problem()
    exact = flat(tm.meta.implicit_gradient(loss, solve(theta, support, LAM), support, query, lam=LAM, cg_steps=60)[1])
    for alpha, steps, how in [
        (0.05, 800, {"rule": tm.solvers.sgd}),
        (0.02, 1500, {"rule": tm.solvers.sgd}),
        (0.02, 300, {"rule": tm.solvers.nesterov}),
        (0.02, 300, {"rule": tm.solvers.momentum}),
        (1.0, 10, {"solve": partial(tm.solvers.hessian_free, cg_steps=15)}),
    ]:
        options = {"alpha": alpha, "steps": steps, **how}
        _, meta_grad = tm.meta.imaml(loss, theta, support, query, lam=LAM, cg_steps=60, **options)
        np.testing.assert_allclose(flat(meta_grad), exact, rtol=1e-6, err_msg=str(how))


def test_long_proximal_maml_tends_to_it():
    """Unrolled back-propagation through gradient descent on the proximal problem: two independent ways to one limit."""
    theta, support, query = problem()
    exact = flat(tm.meta.implicit_gradient(loss, solve(theta, support, LAM), support, query, lam=LAM, cg_steps=60)[1])
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


LAMS = [6.0, 40.0, 9.0, 15.0]  # of [W1, b1, W2, b2]


@pytest.mark.parametrize("steps", range(6))
def test_a_lam_for_each_parameter_is_a_dense_solve_wherever_phi_is(steps):
    theta, support, query = problem()
    lams, inner = [10 * lam for lam in LAMS], {"alpha": 0.002, "steps": steps}
    _, meta_grad = tm.meta.imaml(loss, theta, support, query, lam=lams, cg_steps=60, **inner)

    def objective(phi, data):
        return loss(phi, data) + sum(lam / 2 * tm.sum((p - t) ** 2, (1, 2)) for lam, p, t in zip(lams, phi, theta))

    phi = tm.meta.adapt(objective, theta, support, **inner)
    np.testing.assert_allclose(flat(meta_grad), dense(phi, support, query, lams).mean(0), rtol=1e-8)


def test_a_lam_for_each_parameter_is_the_finite_difference_through_a_solved_inner_problem():
    theta, support, query = problem()
    _, meta_grad = tm.meta.implicit_gradient(
        loss,
        solve(theta, support, LAMS),
        support,
        query,
        lam=LAMS,
        cg_steps=80,
        linear_solver=partial(tm.solvers.cg, tol=1e-12),
    )
    numeric = finite_difference(lambda theta: loss(solve(theta, support, LAMS), query).data.mean(), theta, step=1e-5)
    assert_close(meta_grad, numeric, rtol=1e-6)


def test_a_lam_for_each_parameter_in_closed_form_on_a_quadratic():
    """L_s = ½ φᵀAφ with A not diagonal, over two parameters: ∇F = Λ (A + Λ)⁻¹ C (φ* − c) with φ* = (A + Λ)⁻¹ Λ θ.

    In two variables CG is exact after two steps, and only if it sees a symmetric system.
    """
    a, c, centre = np.array([[2.0, 1.5], [1.5, 1.0]]), np.diag([0.5, 1]), np.array([1.0, -1.0])
    theta, lams = np.array([0.3, -0.7]), np.diag([0.5, 8.0])

    def quadratic(phi, data):
        d = tm.concatenate(phi, axis=1) - data[1]
        return tm.sum(0.5 * tm.matmul(d[:, None, :], data[0])[:, 0] * d, axis=1)

    star = np.linalg.solve(a + lams, lams @ theta)
    _, meta_grad = tm.meta.imaml(
        quadratic, [tm.Tensor(theta[:1]), tm.Tensor(theta[1:])], (a[None], np.zeros((1, 2))), (c[None], centre[None]),
        lam=[0.5, tm.Tensor(8.0)], alpha=0.1, steps=600, cg_steps=2,
    )  # fmt: skip
    np.testing.assert_allclose(flat(meta_grad), lams @ np.linalg.solve(a + lams, c @ (star - centre)), rtol=1e-10)


def test_lam_as_a_number_a_list_or_a_tensor_and_compiled():
    theta, support, query = problem()
    options = {"alpha": 0.02, "steps": 3, "cg_steps": 4}
    _, number = tm.meta.imaml(loss, theta, support, query, lam=LAM, **options)
    for lam in ([LAM] * 4, (LAM,) * 4, tm.Tensor(LAM), [LAM, tm.Tensor(LAM), np.float64(LAM), np.array(LAM)]):
        _, meta_grad = tm.meta.imaml(loss, theta, support, query, lam=lam, **options)
        np.testing.assert_allclose(flat(meta_grad), flat(number), rtol=1e-12)
    compiled = tm.compile(lambda *args: tm.meta.imaml(loss, *args[:3], lam=list(args[3:]), report=True, **options))
    for lams in (LAMS, LAMS[::-1]):  # one program: λ is an argument
        arrays = [np.array(lam) for lam in lams]
        _, eager = tm.meta.imaml(loss, theta, support, query, lam=lams, **options)
        np.testing.assert_allclose(flat(compiled(theta, support, query, *arrays)[1]), flat(eager), rtol=1e-11)
    assert len(compiled.programs) == 1


def test_a_parameter_of_large_lam_takes_no_part_in_the_system_of_the_others():
    theta, support, query = problem()
    lams = [1e9, LAM, LAM, LAM]
    phi = tm.meta.adapt(loss, theta, support, alpha=0.05, steps=3)
    _, (_, *others) = tm.meta.implicit_gradient(loss, phi, support, query, lam=lams, cg_steps=40)
    frozen = [tm.Tensor(phi[0].data), *phi[1:]]
    _, rest = tm.meta.implicit_gradient(
        lambda phi, data: loss([frozen[0], *phi], data), phi[1:], support, query, lam=LAM, cg_steps=40
    )
    np.testing.assert_allclose(flat(others), flat(rest), rtol=1e-6)


# ---- linear and inner solvers ----------------------------------------------------------------------------------------


def test_neumann_is_the_series_and_tends_to_the_same():
    """From ∇L_q with η = 1 the sum of (−H/λ)ʲ ∇L_q, j ≤ cg_steps."""
    theta, support, query = problem()
    lam = 40.0
    phi = tm.meta.adapt(proximal(loss, theta, lam), theta, support, alpha=0.02, steps=3)
    for steps in (0, 1, 3):
        series = 0
        for i in range(3):
            phi_i = [tm.Tensor(p.data[i]) for p in phi]
            h = dense_hessian(lambda x, i=i: loss([p[None] for p in x], task(support, i))[0], phi_i)
            b = flat(tm.grad(loss([p[None] for p in phi_i], task(query, i))[0], phi_i))
            series = series + sum(np.linalg.matrix_power(-h / lam, j) @ b for j in range(steps + 1)) / 3
        _, meta_grad = tm.meta.imaml(
            loss, theta, support, query, lam=lam, alpha=0, steps=0, solve=lambda *args, **options: phi,
            cg_steps=steps, linear_solver=partial(tm.solvers.neumann, eta=1.0),
        )  # fmt: skip
        np.testing.assert_allclose(flat(meta_grad), series, rtol=1e-11)
    for lam in (40.0, [10 * lam for lam in LAMS]):
        neumann = {"cg_steps": 100, "linear_solver": partial(tm.solvers.neumann, eta=0.8)}
        _, meta_grad = tm.meta.imaml(
            loss, theta, support, query, lam=lam, alpha=0, steps=0, solve=lambda *args, **options: phi, **neumann
        )
        np.testing.assert_allclose(flat(meta_grad), dense(phi, support, query, lam).mean(0), rtol=1e-9)


def test_a_solver_gets_the_proximal_objective_of_each_step_and_the_stack():
    theta, support, query = problem()
    seen = []

    def solver(objective, phi, *, lr, steps):
        seen.append((lr, steps))
        moved = [p + 0.1 for p in phi]
        for step in range(2):
            s = tuple(a[:, step : step + 2] for a in support)
            pull = sum(0.01 * p[0].size for p in phi) * 40.0 / 2
            np.testing.assert_allclose(objective(moved, step).data, (loss(moved, s)).data + pull, rtol=1e-12)
        return moved

    def batch(data, step):
        return tuple(a[:, step : step + 2] for a in data)

    options = {"lam": 40.0, "alpha": 0.3, "steps": 7, "cg_steps": 20, "batch": batch, "solve": solver}
    query_loss, meta_grad = tm.meta.imaml(loss, theta, support, query, **options)
    phi = [tm.Tensor(np.tile(t.data + 0.1, (3, 1, 1))) for t in theta]
    assert seen == [(0.3, 7)] and query_loss.item() == pytest.approx(loss(phi, query).data.mean(), rel=1e-12)
    _, expected = tm.meta.implicit_gradient(loss, phi, support, query, lam=40.0, cg_steps=20)
    np.testing.assert_allclose(flat(meta_grad), flat(expected), rtol=1e-12)
    with pytest.raises(ValueError, match="leave solve out"):
        tm.meta.adapt(loss, theta, support, alpha=0.1, steps=1, create_graph=True, solve=solver)


def test_hessian_free_compiled_is_eager():
    theta, support, query = problem()
    options = {"lam": LAM, "alpha": 1.0, "steps": 2, "cg_steps": 4, "report": True}
    options["solve"] = partial(tm.solvers.hessian_free, cg_steps=5, halvings=4)
    f = lambda *args: tm.meta.imaml(loss, *args, **options)
    compiled = tm.compile(f)
    for seed in range(3):
        args = problem(seed=seed)
        np.testing.assert_allclose(flat(compiled(*args)[1]), flat(f(*args)[1]), rtol=1e-10)
    assert len(compiled.programs) == 1


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


@pytest.mark.parametrize("unsolved, tasks", [(0, 1), (1, 2), (1, 3), (2, 4), (1, 1), (2, 3), (3, 4)])
def test_a_warning_of_unsolved_systems_is_of_more_than_half(unsolved, tasks):
    theta, support, query = problem(tasks=tasks)
    zeros = tm.Tensor(np.zeros(tasks))

    def solver(matvec, b, *, steps, x0):
        return tm.solvers.Solution(b, zeros, zeros, zeros > 0, zeros, tm.Tensor(np.arange(tasks) < unsolved))

    phi = tm.meta.adapt(loss, theta, support, alpha=0.05, steps=1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tm.meta.implicit_gradient(loss, phi, support, query, lam=LAM, cg_steps=1, linear_solver=solver)
    assert len(seen) == (2 * unsolved > tasks)


def test_gradients_that_are_not_finite_are_counted():
    theta, support, query = problem()
    phi = [p.data.copy() for p in tm.meta.adapt(loss, theta, support, alpha=0.05, steps=1)]
    phi[0][1] = np.nan
    with pytest.warns(RuntimeWarning, match="iMAML: gradients or Hessian-vector products of 1 of 3 tasks"):
        tm.meta.implicit_gradient(loss, phi, support, query, lam=LAM, cg_steps=2, report=True)
    with pytest.raises(ValueError, match="support, query and phi"):
        tm.meta.implicit_gradient(loss, phi, support, [a[:2] for a in query], lam=LAM, cg_steps=2)


def test_the_pull_is_to_as_many_parameters_as_there_are():
    theta, support, _ = problem()
    phi = tm.meta.adapt(loss, theta, support, alpha=0.05, steps=2)
    objective = proximal(loss, (t for t in theta), LAM)
    np.testing.assert_array_equal(objective(phi, support).data, objective(phi, support).data)
    with pytest.raises(ValueError, match="phi has 5 parameters, theta 4"):
        proximal(lambda phi, data: loss(phi[:4], data), theta, LAM)([*phi, phi[0]], support)


def test_the_report():
    theta, support, query = problem()
    options = {"lam": LAM, "alpha": 0.05, "steps": 5, "report": True}
    few, many = (tm.meta.imaml(loss, theta, support, query, cg_steps=k, **options)[2] for k in (2, 40))
    _, meta_grad, solution = tm.meta.imaml(loss, theta, support, query, cg_steps=4, **options)
    np.testing.assert_allclose(flat([x.data.mean(0) for x in solution.x]), flat(meta_grad), rtol=1e-14)
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


def test_systems_that_are_left_unsolved_are_counted_in_a_warning_or_in_the_report():
    """λ = 3 is convex here, but one product is too few; a tenth of b is the bound, and half of the tasks."""
    theta, support, query = problem()
    phi = tm.meta.adapt(proximal(loss, theta, 3.0), theta, support, alpha=0.05, steps=40)
    call = partial(tm.meta.implicit_gradient, loss, phi, support, query, lam=3.0)
    smallest = [
        1 + np.linalg.eigvalsh(dense_hessian(lambda x, i=i: loss([p[None] for p in x], task(support, i))[0],
                                             [tm.Tensor(p.data[i]) for p in phi]))[0] / 3.0
        for i in range(3)
    ]  # fmt: skip
    found = []
    for steps in (0, 1, 2, 3, 12):
        *_, solution = call(cg_steps=steps, report=True)
        exact = dense(phi, support, query, 3.0)
        b = dense(phi, support, query, 1e12)  # ∇L_q
        x = np.concatenate([x_i.data.reshape(3, -1) for x_i in solution.x], axis=1)
        error = np.linalg.norm(x - exact, axis=1) / np.linalg.norm(b, axis=1)
        assert (error <= solution.relative_residual.data / smallest * (1 + 1e-6) + 1e-12).all()  # ‖A⁻¹‖ ‖r‖
        unsolved = (solution.relative_residual.data > 0.1).sum()
        assert solution.unconverged.data.sum() == unsolved and not solution.negative_curvature.data.any()
        found.append(unsolved)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(cg_steps=steps)
        said = [str(w.message) for w in caught]
        if steps and unsolved >= 2:
            assert (
                len(said) == 1 and f"L_q is left unsolved in {unsolved} of 3 tasks, with a median residual" in said[0]
            )
        else:
            assert not said
    assert found[0] == 3 and found[1] >= 2 and found[-1] == 0, found


def test_a_series_that_diverges_is_said_to():
    theta, support, query = problem()
    phi = tm.meta.adapt(loss, theta, support, alpha=0.05, steps=3)
    call = partial(tm.meta.implicit_gradient, loss, phi, support, query, lam=40.0, cg_steps=8)
    with pytest.warns(RuntimeWarning, match="in 3 of 3 tasks, .* after 8 products: .* that diverges a smaller eta"):
        call(linear_solver=partial(tm.solvers.neumann, eta=2.5))
    with pytest.warns(RuntimeWarning, match="left unsolved"):  # where the function is compiled, at its first call only
        compiled = tm.compile(lambda phi: call.func(*call.args[:1], phi, *call.args[2:], lam=0.3, cg_steps=1))
        compiled(phi)
    compiled(phi)


def test_a_lam_for_each_parameter_is_as_many_positive_numbers():
    theta, support, query = problem()
    options = {"alpha": 0.1, "steps": 1, "cg_steps": 1}
    for lam, message in [
        ([1.0, 2.0], "lam has 2 entries for 4 parameters"),
        ([1.0, 2.0, -1.0, 1.0], "lam must be positive and finite, got -1.0"),
        (np.ones(4), "lam must be a number, got an array"),
        (tm.Tensor(0.0), "lam must be positive"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            tm.meta.imaml(loss, theta, support, query, lam=lam, **options)
        with pytest.raises((TypeError, ValueError), match=message):
            tm.meta.implicit_gradient(
                loss,
                [t[None] for t in theta],
                tuple(a[:1] for a in support),
                tuple(a[:1] for a in query),
                lam=lam,
                cg_steps=1,
            )


@pytest.mark.parametrize("lam", [0.0, -1.0, float("nan")])
def test_lam_must_be_positive(lam):
    theta, support, query = problem()
    with pytest.raises(ValueError, match="lam must be positive"):
        tm.meta.imaml(loss, theta, support, query, lam=lam, alpha=0.1, steps=1, cg_steps=1)
