"""Hypergradients against closed forms, finite differences of the re-solved problem, unrolled steps, and iMAML."""

from functools import partial

import numpy as np
import pytest

import tinymeta as tm
from regression import assert_close, finite_difference, flat, loss, problem, solve

RNG = np.random.default_rng(0)
TASKS, POINTS, FEATURES = 3, 12, 5
X, Y = RNG.standard_normal((TASKS, POINTS, FEATURES)), RNG.standard_normal((TASKS, POINTS, 1))
X_VAL, Y_VAL = RNG.standard_normal((TASKS, POINTS, FEATURES)), RNG.standard_normal((TASKS, POINTS, 1))
NOISE = RNG.standard_normal(X.shape)
newton = partial(tm.solvers.hessian_free, steps=12, cg_steps=10)


# ---- weight decay of each weight of a ridge regression: everything in closed form -------------------------------------


def ridge(w, hyper):
    """‖X w − y‖²/n + ½ Σ exp(h_i) w_i²"""
    return tm.nn.mse(tm.matmul(X, w[0]), Y) + tm.sum(tm.exp(hyper[0]) * w[0] * w[0], axis=(1, 2)) / 2


def validation(w, hyper):
    """With a direct term."""
    return tm.nn.mse(tm.matmul(X_VAL, w[0]), Y_VAL) + 0.1 * tm.sum(tm.sin(hyper[0]))


def ridge_hessian(h):
    return 2 * X.swapaxes(1, 2) @ X / POINTS + np.diag(np.exp(h[:, 0]))


def ridge_solution(h):
    return np.linalg.solve(ridge_hessian(h), 2 * X.swapaxes(1, 2) @ Y / POINTS)


DECAY = np.linspace(-2, 1, FEATURES)[:, None]


def test_weight_decay_of_each_weight_in_closed_form():
    """dF/dh_i = 0.1 cos h_i − v_i exp(h_i) w_i."""
    w = ridge_solution(DECAY)
    val_loss, (bar,) = tm.meta.hypergradient(ridge, validation, [tm.Tensor(w)], [tm.Tensor(DECAY)], steps=10)
    g = 2 * X_VAL.swapaxes(1, 2) @ (X_VAL @ w - Y_VAL) / POINTS
    v = np.linalg.solve(ridge_hessian(DECAY), g)
    np.testing.assert_allclose(bar.data, 0.1 * np.cos(DECAY) - (v * np.exp(DECAY) * w).mean(0), rtol=1e-9)
    assert val_loss.item() == pytest.approx(((X_VAL @ w - Y_VAL) ** 2).mean() + 0.1 * np.sin(DECAY).sum())
    assert bar.inputs == () and val_loss.inputs == ()

    def resolved(hyper):
        return validation([tm.Tensor(ridge_solution(hyper[0].data))], hyper).data.mean()

    assert_close([bar], finite_difference(resolved, [tm.Tensor(DECAY)]), rtol=1e-7)


def test_a_stack_of_problems_is_the_mean_of_each_alone():
    w, hyper = [tm.Tensor(ridge_solution(DECAY))], [tm.Tensor(DECAY)]
    bars = []
    for i in range(TASKS):
        train = lambda w, h, i=i: (
            tm.nn.mse(tm.matmul(X[i : i + 1], w[0]), Y[i : i + 1]) + tm.sum(tm.exp(h[0]) * w[0] * w[0], (1, 2)) / 2
        )
        val = lambda w, h, i=i: (
            tm.nn.mse(tm.matmul(X_VAL[i : i + 1], w[0]), Y_VAL[i : i + 1]) + 0.1 * tm.sum(tm.sin(h[0]))
        )
        bars.append(tm.meta.hypergradient(train, val, [w[0][i : i + 1]], hyper, steps=10)[1][0].data)
    _, (together,) = tm.meta.hypergradient(ridge, validation, w, hyper, steps=10)
    np.testing.assert_allclose(together.data, np.mean(bars, axis=0), rtol=1e-10)


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 40])
def test_the_truncated_series_is_back_propagation_through_as_many_steps_at_the_solution(steps):
    """w ← w − η ∂L_T/∂w from w*, where nothing moves, but each step depends on λ."""
    eta, w, hyper = 0.1, [tm.Tensor(ridge_solution(DECAY))], [tm.Tensor(DECAY)]
    _, truncated = tm.meta.hypergradient(
        ridge, validation, w, hyper, steps=steps, linear_solver=partial(tm.solvers.neumann, eta=eta)
    )
    unrolled = tm.solvers.gradient_descent(lambda w, step: ridge(w, hyper), w, lr=eta, steps=steps, create_graph=True)
    expected = tm.grad(tm.mean(validation(unrolled, hyper)), hyper)
    np.testing.assert_allclose(flat(truncated), flat(expected), rtol=1e-9)
    if steps == 0:
        np.testing.assert_allclose(flat(truncated), 0.1 * np.cos(DECAY[:, 0]), rtol=1e-12)
    exact = flat(tm.meta.hypergradient(ridge, validation, w, hyper, steps=10)[1])
    assert (np.abs(flat(truncated) - exact).max() < 0.02 * np.abs(exact).max()) == (steps == 40)


# ---- the strength of an augmentation, and several hyper-parameters, through a logistic regression ---------------------

LABELS = (Y[..., 0] > 0).astype(int)


def augmented(w, hyper):
    """Cross-entropy of inputs with noise of strength s, plus weight decay; weights and biases of two classes."""
    strength, decay = hyper
    logits = tm.matmul(tm.Tensor(X) + strength * NOISE, w[0]) + w[1]
    return tm.nn.cross_entropy(logits, LABELS) + tm.exp(decay) / 2 * sum(tm.sum(p * p, axis=(1, 2)) for p in w)


def clean(w, hyper):
    return tm.nn.cross_entropy(tm.matmul(X_VAL, w[0]) + w[1], (Y_VAL[..., 0] > 0).astype(int))


def test_augmentation_strength_against_the_re_solved_problem():
    hyper = [tm.Tensor(0.4), tm.Tensor(-1.5)]
    start = [tm.Tensor(np.zeros((TASKS, FEATURES, 2))), tm.Tensor(np.zeros((TASKS, 1, 2)))]

    def solved(hyper):
        w = newton(lambda w, step: augmented(w, hyper), start)
        assert np.abs(flat(tm.grad(tm.sum(augmented(w, hyper)), w))).max() < 1e-12
        return w

    def resolved(hyper):
        return clean(solved(hyper), hyper).data.mean()

    _, bars = tm.meta.hypergradient(augmented, clean, solved(hyper), hyper, steps=20)
    numeric = finite_difference(resolved, hyper, step=1e-5)
    for bar, n in zip(bars, numeric):
        assert bar.shape == () and bar.item() == pytest.approx(n.item(), rel=1e-6) and abs(n) > 1e-3


# ---- the pull of iMAML as the training loss ---------------------------------------------------------------------------


def test_the_centre_of_a_proximal_term_recovers_imaml_and_its_strength_shrinkage():
    theta, support, query = problem()
    lam, log_sigma2 = 8.0, tm.Tensor(-np.log(8.0))
    phi = solve(theta, support, lam)

    def train(w, hyper):
        *centre, log_sigma2 = hyper
        pull = sum(tm.sum((w_i - t) ** 2, axis=(1, 2)) for w_i, t in zip(w, centre, strict=True))
        return loss(w, support) + tm.exp(-log_sigma2) / 2 * pull

    val = lambda w, hyper: loss(w, query)
    precise = partial(tm.solvers.cg, tol=1e-13)
    val_loss, bars = tm.meta.hypergradient(train, val, phi, [*theta, log_sigma2], steps=60, linear_solver=precise)
    query_loss, meta_grad = tm.meta.implicit_gradient(
        loss, phi, support, query, lam=lam, cg_steps=60, linear_solver=precise
    )
    np.testing.assert_allclose(flat(bars[:4]), flat(meta_grad), rtol=1e-9)
    assert val_loss.item() == pytest.approx(query_loss.item(), rel=1e-13)
    _, meta_grad = tm.meta.shrinkage(
        loss, [*theta, log_sigma2], support, query, modules=[range(4)], alpha=1.0, steps=10, cg_steps=60,
        solve=partial(tm.solvers.hessian_free, cg_steps=15), linear_solver=precise,
    )  # fmt: skip
    np.testing.assert_allclose(flat(bars), flat(meta_grad), rtol=1e-8)


# ---- options, types, refusals ------------------------------------------------------------------------------------------


def test_report_and_tolerance():
    w, hyper = [tm.Tensor(ridge_solution(DECAY))], [tm.Tensor(DECAY)]
    *_, exact = tm.meta.hypergradient(ridge, validation, w, hyper, steps=10, report=True)
    *_, rough = tm.meta.hypergradient(
        ridge, validation, w, hyper, steps=10, report=True, linear_solver=partial(tm.solvers.cg, tol=0.3)
    )
    assert (rough.iterations.data < exact.iterations.data).all() and (exact.residual.data < 1e-8).all()


def test_compiled_is_eager_and_float32_stays():
    def f(w, hyper, x, y):
        train = lambda w, h: tm.nn.mse(tm.matmul(x, w[0]), y) + tm.sum(tm.exp(h[0]) * w[0] * w[0], (1, 2)) / 2
        val = lambda w, h: tm.nn.mse(tm.matmul(x[:, ::-1], w[0]), y)
        return tm.meta.hypergradient(train, val, w, hyper, steps=4, report=True)

    compiled = tm.compile(f)
    for scale in (1.0, 2.0):
        args = [tm.Tensor(scale * ridge_solution(DECAY))], [tm.Tensor(scale * DECAY)], X, scale * Y
        np.testing.assert_allclose(flat(compiled(*args)[1]), flat(f(*args)[1]), rtol=1e-11)
    assert len(compiled.programs) == 1
    single = [tm.Tensor(ridge_solution(DECAY).astype(np.float32))], [tm.Tensor(DECAY.astype(np.float32))]
    val_loss, (bar,), _ = f(*single, X.astype(np.float32), Y.astype(np.float32))
    assert val_loss.dtype == bar.dtype == np.float32 and bar.shape == DECAY.shape


def test_an_unused_hyper_parameter_has_a_zero_gradient():
    w, unused = [tm.Tensor(ridge_solution(DECAY))], tm.Tensor(np.ones((2, 3)))
    _, bars = tm.meta.hypergradient(ridge, validation, w, [tm.Tensor(DECAY), unused], steps=5)
    np.testing.assert_array_equal(bars[1].data, np.zeros((2, 3)))


def test_refusals_and_warnings():
    w, hyper = [tm.Tensor(ridge_solution(DECAY))], [tm.Tensor(DECAY)]
    with pytest.raises(TypeError, match="hyper is a list of Tensors"):
        tm.meta.hypergradient(ridge, validation, w, hyper[0], steps=1)
    with pytest.raises(TypeError, match=r"w\[0\] is an array"):
        tm.meta.hypergradient(ridge, validation, [w[0].data], hyper, steps=1)

    def scalar_loss(w, hyper):
        return tm.mean(ridge(w, hyper))

    for losses in [(scalar_loss, validation), (ridge, scalar_loss)]:
        with pytest.raises(ValueError, match=r"scalar_loss returned .* expected a Tensor of floats of shape \(3,\)"):
            tm.meta.hypergradient(*losses, w, hyper, steps=1)
    concave = lambda w, hyper: -ridge(w, hyper) * np.array([1.0, -1.0, 1.0])
    with pytest.warns(RuntimeWarning, match="the Hessian is not positive definite in 2 of 3 tasks: w is no minimum"):
        tm.meta.hypergradient(concave, validation, w, hyper, steps=5)
    broken = lambda w, hyper: ridge(w, hyper) * np.array([1.0, np.nan, 1.0])
    with pytest.warns(RuntimeWarning, match="hypergradient: .* of 1 of 3 tasks are not finite"):
        tm.meta.hypergradient(broken, validation, w, hyper, steps=5)
    with pytest.warns(RuntimeWarning, match="hypergradient: .* is left unsolved in 3 of 3 tasks, .* after 1 products"):
        tm.meta.hypergradient(ridge, validation, w, hyper, steps=1)
    with pytest.warns(RuntimeWarning, match="a Neumann series that diverges a smaller eta"):
        tm.meta.hypergradient(ridge, validation, w, hyper, steps=9, linear_solver=partial(tm.solvers.neumann, eta=3.0))
