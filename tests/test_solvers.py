"""Update rules against their published recurrences, and as differentiable steps; conjugate gradients against dense solves."""

import weakref
from functools import partial

import numpy as np
import pytest

import regression
import tinymeta as tm

RNG = np.random.default_rng(0)
RULES = {
    "sgd": tm.solvers.sgd,
    "momentum": tm.solvers.momentum,
    "nesterov": tm.solvers.nesterov,
    "adam": tm.solvers.adam,
}


def run(rule, p, gradient, steps, **options):
    params, state = [tm.Tensor(p)], None
    for _ in range(steps):
        params, state = rule(params, [tm.Tensor(gradient(params[0].data))], state, **options)
    return params[0].data


# ---- update rules ----------------------------------------------------------------------------------------------------


def test_recurrences():
    """Each rule written out with plain arrays, on a quadratic."""
    a = np.diag([1.0, 3.0])
    p0 = np.array([1.0, -2.0])
    p = p0.copy()
    for _ in range(3):
        p = p - 0.1 * a @ p
    np.testing.assert_allclose(run(tm.solvers.sgd, p0, lambda p: a @ p, 3, lr=0.1), p, rtol=1e-14)

    p, v = p0.copy(), 0
    for _ in range(3):
        v = 0.8 * v + a @ p
        p = p - 0.1 * v
    np.testing.assert_allclose(run(tm.solvers.momentum, p0, lambda p: a @ p, 3, lr=0.1, mu=0.8), p, rtol=1e-14)

    p, m, v = p0.copy(), 0, 0
    for t in range(1, 4):
        g = a @ p
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        p = p - 0.1 * (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.99**t) + 1e-16)
    np.testing.assert_allclose(run(tm.solvers.adam, p0, lambda p: a @ p, 3, lr=0.1, beta2=0.99), p, rtol=1e-13)


def test_default_options():
    """μ = 0.9; β₁ = 0.9, β₂ = 0.999, ε = 10⁻⁸, which counts where gradients are as small."""
    for rule, options in [
        (tm.solvers.momentum, {"mu": 0.9}),
        (tm.solvers.nesterov, {"mu": 0.9}),
        (tm.solvers.adam, {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}),
    ]:
        found, expected = (run(rule, np.ones(2), lambda p: p * [1e-8, 3e-8], 2, lr=1.0, **o) for o in ({}, options))
        np.testing.assert_array_equal(found, expected)
    assert run(tm.solvers.adam, 0.0, lambda p: 1e-8, 1, lr=1.0) == pytest.approx(-(0.5**0.5), rel=1e-12)


@pytest.mark.parametrize(
    "rule, option", [("momentum", "mu"), ("nesterov", "mu"), ("adam", "beta1"), ("adam", "beta2"), ("adam", "eps")]
)
def test_options_are_finite(rule, option):
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{option} must be"):
            RULES[rule]([tm.Tensor([1.0])], [tm.Tensor([1.0])], lr=0.1, **{option: value})


def test_nesterov_is_the_classical_method_seen_from_the_point_ahead():
    """Classical: v ← μv − η∇f(x + μv), x ← x + v. Ours keeps p = x + μv."""
    a, mu, lr = np.diag([1.0, 3.0]), 0.7, 0.1
    x, v = np.array([1.0, -2.0]), np.zeros(2)
    ours = run(tm.solvers.nesterov, x, lambda p: a @ p, 5, lr=lr, mu=mu)
    for _ in range(5):
        v = mu * v - lr * a @ (x + mu * v)
        x = x + v
    np.testing.assert_allclose(ours, x + mu * v, rtol=1e-13)


def test_nesterov_needs_fewer_steps_than_gradient_descent():
    a = np.diag([1.0, 100.0])
    p0, lr, kappa = np.ones(2), 1 / 100, 100
    mu = (np.sqrt(kappa) - 1) / (np.sqrt(kappa) + 1)
    assert np.linalg.norm(run(tm.solvers.nesterov, p0, lambda p: a @ p, 60, lr=lr, mu=mu)) < 0.02
    assert np.linalg.norm(run(tm.solvers.sgd, p0, lambda p: a @ p, 60, lr=lr)) > 0.5


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_two_steps_are_differentiable(rule):
    def f(p, g1, g2):
        state, params = None, [p]
        for g in (g1, g2):
            params, state = rule(params, [g], state, lr=0.1)
        return params[0]

    tm.check_grads(f, [RNG.standard_normal(3), RNG.uniform(0.5, 1, 3), RNG.uniform(0.5, 1, 3)])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_zero_gradient_gives_finite_steps_of_every_order(rule, dtype):
    """A dead unit under an inner Adam: its second moment is 0, where a bare square root has no derivative."""
    g = tm.Tensor(np.array([0.0, 0.5], dtype))
    params, state = rule([tm.Tensor(np.ones(2, dtype))], [g], None, lr=0.1)
    params, state = rule(params, [g], state, lr=0.1)
    (d,) = tm.grad(tm.sum(params[0] ** 2), [g], create_graph=True)
    (dd,) = tm.grad(tm.sum(d), [g])
    assert params[0].dtype == dtype and all(np.isfinite(t.data).all() for t in (params[0], d, dd))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_shapes_must_agree(rule):
    row, square = tm.Tensor(np.ones((1, 4))), tm.Tensor(np.ones((4, 4)))
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(1, 4\) would become \(4, 4\)"):
        rule([row], [square], None, lr=0.1)
    with pytest.raises(ValueError, match=r"would become \(4, 4\)"):
        rule([row], [row], None, lr=np.full((4, 1), 0.1))
    with pytest.raises(ValueError, match="gradient, state, lr must fit"):
        rule([square], [row], None, lr=0.1)
    if rule is not tm.solvers.sgd:
        _, state = rule([square], [square], None, lr=0.1)
        with pytest.raises(ValueError, match=r"state('s m)? has shapes \[\(4, 4\)\], expected \[\(1, 4\)\]"):
            rule([row], [row], state, lr=0.1)
        _, state = rule([row], [row], None, lr=0.1)
        with pytest.raises(ValueError, match=r"state('s m)? has shapes \[\(1, 4\)\], expected \[\(4, 4\)\]"):
            rule([square], [square], state, lr=0.1)
        with pytest.raises(ValueError, match="2 parameters but 1 state('s m)?: there must be one"):
            rule([row, row], [row, row], state, lr=0.1)
    with pytest.raises(TypeError, match=r"grads\[0\] is .*int64.*: parameters are Tensors of floats"):
        rule([tm.Tensor(np.ones(2))], [np.ones(2, np.int64)], None, lr=0.1)
    with pytest.raises(ValueError, match="1 parameters but 0 grads"):
        rule([tm.Tensor(np.ones(1))], [], None, lr=0.1)


# ---- clipping --------------------------------------------------------------------------------------------------------

CLIP = {False: lambda g, c: tm.solvers.clip(g, c), True: lambda g, c: tm.solvers.clip(g, c, stacked=True)}


def norms(grads, stacked):
    rows = len(grads[0].data) if stacked else 1
    return np.sqrt(np.sum([(g.data.astype(float) ** 2).reshape(rows, -1).sum(axis=1) for g in grads], axis=0))


@pytest.mark.parametrize("stacked", CLIP)
@pytest.mark.parametrize("norm", [1e-3, 2.0, 1e9])
def test_a_gradient_keeps_its_direction_and_is_no_longer_than_the_norm(stacked, norm):
    grads = [RNG.standard_normal((3, 2, 4)), RNG.standard_normal((3, 1, 4)), RNG.standard_normal(3)]
    grads = [np.array([0.1, 1, 10]).reshape(3, *[1] * (g.ndim - 1)) * g for g in grads]
    if not stacked:
        grads.append(np.array(5.0))  # a 0-d parameter
    clipped = CLIP[stacked]([tm.Tensor(g) for g in grads], norm)
    before = norms([tm.Tensor(g) for g in grads], stacked)
    np.testing.assert_allclose(norms(clipped, stacked), np.minimum(before, norm), rtol=1e-14)
    factor = np.minimum(1, norm / before)
    for c, g in zip(clipped, grads, strict=True):
        np.testing.assert_allclose(c.data, g * factor.reshape(-1, *[1] * (g.ndim - 1)) if g.ndim else g * factor[0])
    if norm == 1e9:  # bit for bit
        assert all((c.data == g).all() for c, g in zip(clipped, grads))


def test_a_task_is_clipped_as_if_it_were_alone():
    g = [RNG.standard_normal((4, 3)), RNG.standard_normal((4, 2, 2))]
    g = [x * np.array([1e-8, 1, 1e8, 0]).reshape(4, *[1] * (x.ndim - 1)) for x in g]
    together = tm.solvers.clip([tm.Tensor(x) for x in g], 0.5, stacked=True)
    for i in range(4):
        alone = tm.solvers.clip([tm.Tensor(x[i]) for x in g], 0.5)
        assert all((t.data[i] == a.data).all() for t, a in zip(together, alone))


@pytest.mark.parametrize("size", [0, 1e-39, 1e-30, 1e-12, 1.0, 1e18, 1e30, 1e38])
@pytest.mark.parametrize("norm", [1e-20, 2.0, 1e20])
def test_no_square_overflows_in_float32(size, norm):
    g = tm.Tensor(np.float32(size) * np.linspace(1, 2, 5, dtype=np.float32)[None])
    (clipped,) = tm.solvers.clip([g], norm, stacked=True)
    assert clipped.dtype == np.float32
    np.testing.assert_allclose(norms([clipped], True), np.minimum(norms([g], True), norm), rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_comes_out_as_it_went_in(value):
    g = np.array([[3.0, 4.0], [3.0, value], [0.3, 0.4]])
    with np.errstate(invalid="ignore"):
        (clipped,) = tm.solvers.clip([tm.Tensor(g)], 1.0, stacked=True)
    np.testing.assert_allclose(clipped.data, [[0.6, 0.8], [3.0, value], [0.3, 0.4]])  # and the others as without it


@pytest.mark.parametrize("scale", [0.1, 10.0], ids=["within", "clipped"])
def test_derivatives_of_clipping(scale):
    """(c / ‖g‖) (I − u uᵀ) where it clips, I where not; to second order by finite differences."""
    g = scale * RNG.standard_normal((2, 3))
    f = lambda a, b: tm.solvers.clip([a, b], 1.0, stacked=True)
    tm.check_grads(lambda a, b: sum(tm.sum(tm.sin(x)) for x in f(a, b)), [g, scale * RNG.standard_normal((2, 1, 2))])
    x, v = tm.Tensor(g[0]), RNG.standard_normal(3)
    (vjp,) = tm.vjp(tm.solvers.clip([x], 1.0)[0], [x], v)
    size = np.linalg.norm(g[0])
    u = g[0] / size
    expected = (v - u * (u @ v)) / size if size > 1 else v
    np.testing.assert_allclose(vjp.data, expected, rtol=1e-12)


def test_at_the_kink_a_gradient_counts_as_one_that_is_not_clipped():
    x = tm.Tensor(np.array([3.0, 4.0]))
    (y,) = tm.solvers.clip([x], 5.0)
    np.testing.assert_array_equal(tm.vjp(y, [x], np.array([1.0, 1.0]))[0].data, [1.0, 1.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_clipping_is_finite_at_a_zero_gradient(dtype):
    """At orders 0, 1 and 2, beside a task whose gradient is clipped."""
    g = tm.Tensor(np.array([[0.0, 0.0], [3.0, 4.0]], dtype))
    (c,) = tm.solvers.clip([g], 1.0, stacked=True)
    (d,) = tm.grad(tm.sum(c * c * c), [g], create_graph=True)
    (dd,) = tm.grad(tm.sum(d), [g])
    assert all(np.isfinite(t.data).all() and t.dtype == dtype for t in (c, d, dd))
    assert (c.data[0] == 0).all() and (tm.grad(tm.sum(c), [g])[0].data[0] == 1).all()


@pytest.mark.parametrize("norm", [0.0, -1.0, np.nan, np.inf])
def test_a_norm_is_a_positive_number(norm):
    with pytest.raises(ValueError, match="norm must be positive and finite, got"):
        tm.solvers.clip([tm.Tensor(np.ones(2))], norm)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_clipped_rule_is_the_rule_on_clipped_gradients(rule):
    params, state, expected = [tm.Tensor(np.ones((2, 3)))], None, None
    for seed in range(3):
        grads = [tm.Tensor(np.random.default_rng(seed).standard_normal((2, 3)))]
        want, expected = rule(params, tm.solvers.clip(grads, 0.5, stacked=True), expected, lr=0.1)
        params, state = tm.solvers.clipped(params, grads, state, lr=0.1, norm=0.5, rule=rule)
        np.testing.assert_array_equal(params[0].data, want[0].data)


def test_gradient_descent_solves_each_task_as_if_alone():
    a = RNG.uniform(0.5, 2, (4, 3))

    def loss_of(a):
        return lambda phi, step: tm.sum(0.5 * a * phi[0] ** 2 - phi[0], axis=1)

    for rule in RULES.values():
        start = tm.Tensor(np.ones((4, 3)))
        (together,) = tm.solvers.gradient_descent(loss_of(a), [start], lr=0.1, steps=7, rule=rule)
        alone = [
            tm.solvers.gradient_descent(loss_of(a[i : i + 1]), [start[i : i + 1]], lr=0.1, steps=7, rule=rule)
            for i in range(4)
        ]
        np.testing.assert_allclose(together.data, np.concatenate([x[0].data for x in alone]), rtol=1e-13)
        assert together.inputs == ()


# ---- Hessian-free ----------------------------------------------------------------------------------------------------


def quadratics(a, b):
    """½ φᵀAφ − bᵀφ of each task."""
    return lambda phi, step: tm.sum(0.5 * tm.matmul(phi[0][:, None], a)[:, 0] * phi[0] - b * phi[0], axis=1)


def test_a_trajectory_takes_gradients_for_constants_by_default():
    start = tm.Tensor([3.0])
    *_, (phi,) = tm.solvers.trajectory(lambda phi, k: phi[0] ** 2, [start], lr=0.1, steps=3)
    assert tm.grad(tm.sum(phi), [start])[0].item() == 1


def test_what_a_trajectory_is_made_of_is_checked():
    options = {"loss": lambda phi, k: phi[0] ** 2, "phi": [tm.Tensor([3.0])], "lr": 0.1, "steps": 1}
    for wrong in ({"cut": 1.5}, {"cut": -1}, {"loss": None}, {"rule": None}, {"lr": np.array(np.nan)}):
        with pytest.raises((TypeError, ValueError), match=f"{[*wrong][0]} "):
            list(tm.solvers.trajectory(**options | wrong))
    assert np.isnan(tm.solvers.gradient_descent(**options | {"lr": tm.Tensor(np.nan)})[0].data)  # a Tensor is data


def test_gradient_descent_ends_in_a_leaf_and_keeps_no_phi_on_the_way():
    seen = []

    def loss(phi, step):
        seen.append(weakref.ref(phi[0]))
        assert sum(ref() is not None for ref in seen) <= 2
        return tm.sum(phi[0] ** 2, axis=1)

    (phi,) = tm.solvers.gradient_descent(loss, [tm.Tensor(np.ones((3, 2)))], lr=0.1, steps=6)
    assert not phi.inputs and len(seen) == 6


def test_one_hessian_free_step_solves_a_convex_quadratic():
    a, b = spd(4, 3), RNG.standard_normal((3, 4))
    (phi,) = tm.solvers.hessian_free(quadratics(a, b), [tm.Tensor(np.ones((3, 4)))], steps=1, cg_steps=8)
    np.testing.assert_allclose(phi.data, np.linalg.solve(a, b[..., None])[..., 0], rtol=1e-8)
    assert phi.inputs == ()


def rosenbrock(phi, step):
    """(1 − x)² + c (y − x²)², c of each task: not convex, and narrow."""
    x, y = phi[0][:, 0], phi[1][:, 0, 0]
    return (1 - x) ** 2 + np.array([0.5, 10.0, 100.0, 3.0]) * (y - x * x) ** 2


# The first meets negative curvature at CG's first step, the last at its second.
START = np.array([[0.0, 4.0], [0.5, 2.0], [-1.2, 1.0], [0.0, 4.0]])


def rosenbrock_start():
    return [tm.Tensor(START[:, :1]), tm.Tensor(START[:, 1:, None])]


def by_hand(c, z, lr, steps, halvings):
    """The same for one task, written out, with a dense solve where the Hessian is positive definite."""
    f = lambda z: (1 - z[0]) ** 2 + c * (z[1] - z[0] ** 2) ** 2
    for _ in range(steps):
        u = z[1] - z[0] ** 2
        g = np.array([-2 * (1 - z[0]) - 4 * c * z[0] * u, 2 * c * u])
        h = np.array([[2 - 4 * c * u + 8 * c * z[0] ** 2, -4 * c * z[0]], [-4 * c * z[0], 2 * c]])
        d = -g
        if g @ h @ g > 0:  # CG's first step, and its second one if it meets no negative curvature
            d = -g * (g @ g) / (g @ h @ g)
            if np.linalg.eigvalsh(h)[0] > 0:
                d = np.linalg.solve(h, -g)
        for t in lr * 0.5 ** np.arange(halvings + 1):
            if f(z + t * d) <= f(z) + 1e-4 * t * g @ d:
                z = z + t * d
                break
    return z


@pytest.mark.parametrize(
    "lr, steps, halvings", [(1.0, 1, 10), (1.0, 5, 10), (1.0, 5, 1), (0.7, 3, 4), (64.0, 3, 12), (1.0, 4, 0)]
)
def test_hessian_free_is_newtons_method_with_backtracking_on_each_task(lr, steps, halvings):
    options = {"lr": lr, "steps": steps, "cg_steps": 2, "halvings": halvings}
    x, y = tm.solvers.hessian_free(rosenbrock, rosenbrock_start(), **options)
    expected = [by_hand(c, z, lr, steps, halvings) for c, z in zip([0.5, 10.0, 100.0, 3.0], START)]
    np.testing.assert_allclose(np.stack([x.data[:, 0], y.data[:, 0, 0]], axis=1), expected, rtol=1e-6, atol=1e-9)


def test_no_hessian_free_step_raises_any_tasks_loss():
    """From many random starts, whatever the curvature, the first trial and the number of CG steps."""
    for seed in range(20):
        z = 3 * np.random.default_rng(seed).standard_normal((4, 2))
        for lr, cg_steps in [(1.0, 2), (100.0, 1), (8.0, 0)]:
            phi, losses = [tm.Tensor(z[:, :1]), tm.Tensor(z[:, 1:, None])], []
            for _ in range(6):
                losses.append(rosenbrock(phi, 0).data)
                phi = tm.solvers.hessian_free(rosenbrock, phi, lr=lr, steps=1, cg_steps=cg_steps, halvings=6)
            assert (np.diff(losses, axis=0) <= 1e-15 * np.array(losses[:-1])).all()
    x, y = tm.solvers.hessian_free(rosenbrock, rosenbrock_start(), steps=60, cg_steps=2)
    np.testing.assert_allclose(np.concatenate([x.data, y.data[:, 0]]), 1, atol=1e-6)


def test_a_task_at_its_minimum_or_without_a_way_down_stays_exactly():
    a, b = np.stack([np.eye(2)] * 3), np.array([[1.0, 2.0], [0.0, 1.0], [3.0, 4.0]])

    def loss(phi, step):  # the second task is not a number anywhere but where it starts
        away = tm.sum((phi[0] - 5.0) ** 2, axis=1)
        return quadratics(a, b)(phi, step) + tm.where(np.array([False, True, False]) & (away > 0), np.nan, 0.0)

    start = np.array([[1.0, 2.0], [5.0, 5.0], [0.0, 0.0]])
    (phi,) = tm.solvers.hessian_free(loss, [tm.Tensor(start)], steps=3, cg_steps=3)
    np.testing.assert_array_equal(phi.data[:2], start[:2])
    np.testing.assert_allclose(phi.data[2], b[2], rtol=1e-12)


def test_a_trial_must_bring_more_than_nothing():
    """On ½ φ² twice the Newton step ends as high as it began, at −φ."""
    half_square = lambda phi, step: tm.sum(phi[0] * phi[0], axis=1) / 2
    (phi,) = tm.solvers.hessian_free(half_square, [tm.Tensor([[3.0]])], lr=2.0, steps=1, cg_steps=1)
    assert phi.item() == 0


def test_hessian_free_by_default_halves_a_step_of_one_ten_times():
    """On φ⁴ a double Newton step goes farther; √(1 + φ²) rises but for t < 2/(1 + φ²)."""
    (phi,) = tm.solvers.hessian_free(lambda phi, k: phi[0] ** 4, [tm.Tensor([3.0])], steps=1, cg_steps=1)
    assert phi.item() == pytest.approx(2.0, rel=1e-9)

    def loss(phi, step):
        return tm.sqrt(1 + phi[0] ** 2)

    far = tm.Tensor([45.0, 60.0])  # the one can go down with t = 2⁻¹⁰, the other with half of that
    options = {"steps": 1, "cg_steps": 1}
    assert (tm.solvers.hessian_free(loss, [far], **options)[0].data == far.data).tolist() == [False, True]
    assert (tm.solvers.hessian_free(loss, [far], halvings=11, **options)[0].data != far.data).all()


def accepts(value, slope, lr):
    """Is a step from 0 taken on a loss of such values, of which the gradient claims that it falls with that slope?"""

    def loss(phi, step):
        still = tm.stop_gradient(phi[0])
        return value(still) - slope * (phi[0] - still)

    start = tm.Tensor(np.zeros(1))
    (phi,) = tm.solvers.hessian_free(loss, [start], lr=lr, steps=1, cg_steps=1, halvings=0)
    return phi.item() != 0


@pytest.mark.parametrize("lr", [0.25, 4.0])
def test_a_trial_must_bring_a_ten_thousandth_of_what_the_slope_promises(lr):
    assert accepts(lambda x: -1.05e-4 * x, 1.0, lr) and not accepts(lambda x: -0.95e-4 * x, 1.0, lr)


@pytest.mark.parametrize("size", [2.0**-10, 1.0, -1.0, 2.0**10])
def test_but_for_four_units_of_rounding(size):
    unit = np.finfo(float).eps * abs(size)
    assert accepts(lambda x: size + 4 * unit * (x != 0), 1e-15, 1.0)
    assert not accepts(lambda x: size + 5 * unit * (x != 0), 1e-15, 1.0)


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), np.ones(2), tm.Tensor(-1.0)], ids=str)
def test_hessian_free_needs_one_positive_step_size(lr):
    with pytest.raises((TypeError, ValueError), match="lr must be"):
        tm.solvers.hessian_free(lambda phi, k: phi[0] ** 2, [tm.Tensor([3.0])], lr=lr, steps=1, cg_steps=1)


def test_without_steps_hessian_free_returns_the_start_as_a_leaf():
    (phi,) = tm.solvers.hessian_free(lambda phi, k: phi[0] ** 2, [2 * tm.Tensor([3.0])], steps=0, cg_steps=1)
    assert phi.item() == 6 and not phi.inputs


def test_hessian_free_keeps_no_trial():
    seen = []

    def loss(phi, step):
        seen.append(weakref.ref(phi[0]))
        assert sum(ref() is not None for ref in seen) <= 3
        return phi[0] ** 2

    tm.solvers.hessian_free(loss, [tm.Tensor(np.ones(2))], steps=2, cg_steps=2, halvings=6)
    assert len(seen) == 2 * (1 + 7)


@pytest.mark.parametrize(
    "f, at",
    [
        (lambda x: tm.sqrt(x), 0.0),  # has a value, but no derivative
        (lambda x: tm.where(x > 5, np.nan, x**2), 6.0),  # has a derivative, but no value
        (lambda x: tm.power(6 - x, 1.5), 6.0),  # has a derivative, but no second one
        (lambda x: tm.where(x > 5, 1e200 * x, x**2), 6.0),  # has a derivative whose square overflows
    ],
)
def test_a_task_whose_numbers_are_not_finite_does_not_look_solved(f, at):
    """Where the step fails, φ must not stay as it was."""

    def loss(phi, step):
        return tm.sum(f(phi[0]), axis=1) + 0.5 * tm.sum(phi[1] ** 2, axis=1)

    start = [tm.Tensor(np.array([[1.0], [at]])), tm.Tensor(np.ones((2, 1)))]
    with np.errstate(all="ignore"):
        phi = tm.solvers.hessian_free(loss, start, steps=1, cg_steps=2)
    for x in phi:
        assert np.isfinite(x.data[0]).all() and np.isnan(x.data[1]).all()


def test_hessian_frees_trials_are_checked():
    losses = lambda phi, step: tm.sum(phi[0] ** 2, axis=1)
    with pytest.raises(ValueError, match=r"expected a Tensor of floats"):
        trials = iter([losses, lambda phi, step: tm.sum(phi[0] ** 2)])
        tm.solvers.hessian_free(
            lambda phi, step: next(trials)(phi, step), [tm.Tensor(np.ones((2, 1)))], steps=1, cg_steps=1
        )


def test_hessian_free_sees_the_step_and_keeps_the_type():
    def loss(phi, step):
        return tm.sum((phi[0] - float(step)) ** 2, axis=1)

    start = [tm.Tensor(np.full((2, 3), 9.0, np.float32))]
    for steps in range(4):
        (phi,) = tm.solvers.hessian_free(loss, start, steps=steps, cg_steps=1)
        np.testing.assert_allclose(phi.data, steps - 1 if steps else 9.0)
        assert phi.dtype == np.float32


# ---- conjugate gradients ---------------------------------------------------------------------------------------------


def problem(matrices, b):
    """One matrix a task, (tasks, n, n), the unknowns split into two Tensors as parameters are."""
    matrices, b = np.asarray(matrices), np.asarray(b)

    def split(v):
        return [v[:, :2], v[:, 2:].reshape((len(b), -1, 1))]

    def matvec(vs):
        v = tm.concatenate([vs[0], vs[1].reshape((len(b), -1))], axis=1)
        return split((matrices @ v[..., None])[..., 0])

    return matvec, split(tm.Tensor(b)), lambda x: np.concatenate([x[0].data, x[1].data[..., 0]], axis=1)


def spd(n, tasks):
    m = RNG.standard_normal((tasks, n, n))
    return m @ m.swapaxes(-1, -2) + 0.5 * np.eye(n)


def test_cg_is_a_dense_solve():
    a, b = spd(5, 3), RNG.standard_normal((3, 5))
    matvec, bs, flat = problem(a, b)
    solution = tm.solvers.cg(matvec, bs, steps=20, tol=1e-13)
    np.testing.assert_allclose(flat(solution.x), np.linalg.solve(a, b[..., None])[..., 0], rtol=1e-9)
    assert (solution.iterations.data <= 8).all() and not solution.negative_curvature.data.any()
    assert (solution.residual.data <= 1e-12 * np.linalg.norm(b, axis=1)).all()


def test_cg_minimises_over_the_krylov_space_at_every_step():
    """After k steps x minimises ½ xᵀA x − bᵀx over span{b, A b, ..., A^{k−1} b}."""
    a, b = spd(5, 1), RNG.standard_normal((1, 5))
    matvec, bs, flat = problem(a, b)
    for k in range(1, 5):
        krylov = np.stack([np.linalg.matrix_power(a[0], j) @ b[0] for j in range(k)], axis=1)
        expected = krylov @ np.linalg.solve(krylov.T @ a[0] @ krylov, krylov.T @ b[0])
        solution = tm.solvers.cg(matvec, bs, steps=k, tol=0)
        np.testing.assert_allclose(flat(solution.x)[0], expected, rtol=1e-7)
        np.testing.assert_allclose(solution.residual.data[0], np.linalg.norm(b[0] - a[0] @ expected), rtol=1e-7)
        assert solution.iterations.item() == k


def test_a_converged_task_keeps_its_solution_while_others_go_on():
    a = np.stack([np.eye(4), spd(4, 1)[0]])
    b = RNG.standard_normal((2, 4))
    matvec, bs, flat = problem(a, b)
    solution = tm.solvers.cg(matvec, bs, steps=10, tol=1e-12)
    assert solution.iterations.data[0] == 1 and solution.iterations.data[1] >= 4
    np.testing.assert_allclose(flat(solution.x)[0], b[0], rtol=1e-15)
    np.testing.assert_allclose(flat(solution.x)[1], np.linalg.solve(a[1], b[1]), rtol=1e-9)


def test_negative_curvature_stops_a_task_at_its_last_iterate():
    b = np.tile([1.0, 2.0, 0.5], (2, 1))
    at_once, later = np.diag([-1.0, -1.0, -1.0]), np.diag([3.0, 2.0, -1.0])
    matvec, bs, flat = problem([at_once, later], b)
    solution = tm.solvers.cg(matvec, bs, steps=10)
    assert solution.negative_curvature.data.tolist() == [True, True]
    assert solution.iterations.data[0] == 0 and 1 <= solution.iterations.data[1] <= 2
    np.testing.assert_array_equal(flat(solution.x)[0], np.zeros(3))
    k = int(solution.iterations.data[1])
    np.testing.assert_array_equal(flat(solution.x)[1], flat(tm.solvers.cg(matvec, bs, steps=k).x)[1])


def test_singular_systems_and_zero_right_hand_sides():
    matvec, bs, flat = problem([np.diag([1.0, 0.0, 2.0])] * 2, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    solution = tm.solvers.cg(matvec, bs, steps=10)
    np.testing.assert_allclose(flat(solution.x), [[1, 0, 0.5], [0, 0, 0]], atol=1e-12)
    assert solution.iterations.data[1] == 0 and not solution.negative_curvature.data.any()


def test_a_start_and_no_steps():
    a, b = spd(4, 2), RNG.standard_normal((2, 4))
    matvec, bs, flat = problem(a, b)
    none = tm.solvers.cg(matvec, bs, steps=0, x0=bs)
    np.testing.assert_allclose(flat(none.x), b, rtol=1e-15)
    np.testing.assert_allclose(none.residual.data, np.linalg.norm(b - (a @ b[..., None])[..., 0], axis=1))
    full = tm.solvers.cg(matvec, bs, steps=12, x0=bs, tol=1e-13)
    np.testing.assert_allclose(flat(full.x), np.linalg.solve(a, b[..., None])[..., 0], rtol=1e-8)


@pytest.mark.parametrize("size", [1e-24, 1e-12, 1e12, 1e20])
def test_the_size_of_b_does_not_matter(size):
    a, b = spd(4, 2).astype(np.float32), RNG.standard_normal((2, 4)).astype(np.float32)
    matvec, bs, flat = problem(a, b)
    plain = tm.solvers.cg(matvec, bs, steps=6)
    scaled = tm.solvers.cg(matvec, [np.float32(size) * b for b in bs], steps=6)
    np.testing.assert_allclose(flat(scaled.x), np.float32(size) * flat(plain.x), rtol=1e-3)
    assert not scaled.negative_curvature.data.any()
    sizes = np.array([[size], [1]], np.float32)  # each task has its own
    mixed = tm.solvers.cg(matvec, problem(a, sizes * b)[1], steps=6)
    np.testing.assert_allclose(flat(mixed.x), sizes * flat(plain.x), rtol=1e-3)


def test_the_residual_against_b_and_who_has_not_converged():
    """A diagonal: CG's k-th residual is known from the Krylov space; one task of each kind."""
    diagonals = np.array([[1.0, 1.0, 1.0], [1.0, 30.0, 900.0], [2.0, 1.0, -1.0], [1.0, 30.0, 900.0]])
    b = np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [0.1, 0.1, 1.0], [0.0, 0.0, 0.0]])
    matvec, bs, flat = problem([np.diag(d) for d in diagonals], b)
    solution = tm.solvers.cg(matvec, bs, steps=2)
    size = np.where(b.any(axis=1), np.linalg.norm(b, axis=1), 1)
    true = np.linalg.norm(b - diagonals * flat(solution.x), axis=1) / size
    np.testing.assert_allclose(solution.relative_residual.data, true, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(solution.residual.data, true * size, rtol=1e-9, atol=1e-15)
    assert true[1] > 0.1 and true[2] > 0.1
    assert solution.negative_curvature.data.tolist() == [False, False, True, False]
    assert solution.unconverged.data.tolist() == [False, True, False, False]  # the third is told of already
    assert not tm.solvers.cg(matvec, bs, steps=20).unconverged.data.any()
    loose = tm.solvers.cg(matvec, bs, steps=2, tol=0.99)
    assert loose.relative_residual.data[1] > 0.1 and not loose.unconverged.data.any()  # as it was told to


@pytest.mark.parametrize("x0", [None, "b"])
def test_neumann_has_not_converged_where_its_residual_grows(x0):
    diagonals = np.array([[1.0, 0.5, 0.2], [1.0, 2.5, 0.2], [1.0, -0.5, 0.2]])
    matvec, bs, flat = problem([np.diag(d) for d in diagonals], np.ones((3, 3)))
    for steps, grown in [(0, False), (1, False), (30, True)]:
        solution = tm.solvers.neumann(matvec, bs, steps=steps, eta=1.0, x0=x0 and bs)
        assert solution.unconverged.data.tolist() == [False, grown or bool(x0 and steps), False]
        true = np.linalg.norm(1 - diagonals * flat(solution.x), axis=1) / np.sqrt(3)
        np.testing.assert_allclose(solution.relative_residual.data, true, rtol=1e-9)
    assert solution.negative_curvature.data.tolist() == [False, False, True]


def test_cg_refuses_what_does_not_fit():
    row = [tm.Tensor(np.ones((2, 1, 3)))]
    for matvec in (lambda v: [], lambda v: [tm.Tensor(np.ones((2, 3, 3)))]):
        with pytest.raises(ValueError, match="cg: b has shapes"):
            tm.solvers.cg(matvec, row, steps=1)
    for b in (row[0], []):
        with pytest.raises((TypeError, ValueError), match="list of"):
            tm.solvers.cg(lambda v: v, b, steps=1)
    for wrong in ([], row + row):
        with pytest.raises(ValueError, match="x0"):
            tm.solvers.cg(lambda v: v[:1], row, steps=1, x0=wrong)
    with pytest.raises(ValueError, match="must be alike"):
        tm.solvers.dot(row + row, row)


@pytest.mark.parametrize("solver", [tm.solvers.cg, partial(tm.solvers.neumann, eta=0.1)], ids=["cg", "neumann"])
def test_linear_solvers_keep_no_vector_on_the_way(solver):
    seen = []

    def matvec(v):
        seen.append(weakref.ref(v[0]))
        assert sum(ref() is not None for ref in seen) <= 3
        return [v[0] * np.array([1.0, 2.0, 3.0])]

    solver(matvec, [tm.Tensor(np.ones((2, 3)))], steps=6)
    assert len(seen) == 6


def test_unconverged_is_a_tenth_of_b_or_more():
    b, identity = [tm.Tensor(np.full((2, 3), 4.0))], lambda v: v
    for tol, errors in [(1e-10, [0.099, 0.101]), (0.5, [0.499, 0.501])]:
        x0 = [tm.Tensor(4 * (1 - np.array(errors)[:, None]) * np.ones(3))]
        solution = tm.solvers.cg(identity, b, steps=0, x0=x0, tol=tol)
        np.testing.assert_allclose(solution.relative_residual.data, errors)
        assert solution.unconverged.data.tolist() == [False, True]


@pytest.mark.parametrize("solver", [tm.solvers.cg, partial(tm.solvers.neumann, eta=0.1)], ids=["cg", "neumann"])
def test_the_relative_residual_of_small_b_and_of_none(solver):
    b, x0 = [tm.Tensor(np.array([[1e-3], [0.0]]))], [tm.Tensor(np.full((2, 1), 3e-3))]
    solution = solver(lambda v: v, b, steps=0, x0=x0)
    np.testing.assert_allclose(solution.residual.data, [2e-3, 3e-3])
    np.testing.assert_allclose(solution.relative_residual.data, [2, 3e-3])


def test_what_functions_of_the_caller_return_is_checked():
    phi, options = [tm.Tensor(np.ones((3, 2)))], {"lr": 0.1, "steps": 1}
    for result in (phi, (phi,), (phi, None, None)):
        with pytest.raises(TypeError, match="the rule returned"):
            tm.solvers.gradient_descent(
                lambda phi, k: tm.sum(phi[0], 1), phi, rule=lambda *_, lr, r=result: r, **options
            )
    for losses in (np.ones(3), tm.Tensor(np.ones(3, int)), tm.Tensor(1.0), tm.Tensor(np.ones(2)), 1.0):
        with pytest.raises(ValueError, match="the loss returned"):
            tm.solvers.gradient_descent(lambda phi, k, losses=losses: losses, phi, **options)
    for b in (phi[0], phi[0].data, 1.0, None):
        with pytest.raises(TypeError, match="cg needs b as a list of Tensors"):
            tm.solvers.cg(lambda v: v, b, steps=1)
    (x,) = tm.solvers.cg(lambda v: [2 * v[0].data], phi, steps=1).x  # a product may be an array
    assert (x.data == 0.5).all()
    wrong = tm.solvers.cg(lambda v: v, [phi[0][:2]], steps=1)
    with pytest.raises(ValueError, match="linear_solver's x has shapes"):
        tm.solvers.solution_of(lambda *_, **__: wrong, lambda v: v, phi)
    for a, like in [(np.ones(2), phi[0]), (np.ones((3, 1)), phi[0]), (np.ones(3), 1.0)]:
        with pytest.raises(ValueError, match="per_task takes"):
            tm.solvers.per_task(a, like)


def test_the_default_tolerance():
    """10⁻¹⁰ of b, or rounding; here the residual is the error of the start."""
    for dtype, errors in [(np.float64, [0.9e-10, 1.1e-10]), (np.float32, 2.0**-23 * np.array([0.5, 1.5]))]:
        b = np.ones((2, 50), dtype)
        starts = [tm.Tensor(b - np.array(errors, dtype)[:, None])]
        solution = tm.solvers.cg(lambda v: v, [tm.Tensor(b)], steps=1, x0=starts)
        assert solution.iterations.data.tolist() == [0, 1]


def test_the_tolerance_is_relative_to_b():
    """Also when CG starts elsewhere than at 0."""
    matvec, bs, _ = problem(spd(4, 2), RNG.standard_normal((2, 4)))
    far = [1e6 * b for b in bs]
    for x0 in (None, far):
        solution = tm.solvers.cg(matvec, bs, steps=40, x0=x0, tol=0.1)
        size = np.sqrt(tm.solvers.dot(bs, bs).data)
        assert (solution.residual.data <= 0.1 * size).all()


# ---- Neumann series --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(6))
def test_neumann_is_its_series(steps):
    """Σ_{j < steps} (I − ηA)ʲ ηb; from x0 the error (I − ηA)^steps (x0 − A⁻¹b). The residual is the true one."""
    a, b, x0 = spd(5, 3), RNG.standard_normal((3, 5)), RNG.standard_normal((3, 5))
    eta = 0.1
    matvec, bs, flat = problem(a, b)
    for start, starts in [(None, np.zeros((3, 5))), (problem(a, x0)[1], x0)]:
        solution = tm.solvers.neumann(matvec, bs, steps=steps, eta=eta, x0=start)
        for i in range(3):
            m = np.eye(5) - eta * a[i]
            expected = sum((np.linalg.matrix_power(m, j) @ b[i] * eta for j in range(steps)), np.zeros(5))
            expected = expected + np.linalg.matrix_power(m, steps) @ starts[i]
            np.testing.assert_allclose(flat(solution.x)[i], expected, rtol=1e-10, atol=1e-12)
            residual = np.linalg.norm(b[i] - a[i] @ expected)
            assert solution.residual.data[i] == pytest.approx(residual, rel=1e-9)
        assert solution.iterations.data.tolist() == [steps] * 3 and not solution.negative_curvature.data.any()


def test_neumann_converges_up_to_eta_two_over_the_largest_eigenvalue_and_not_beyond():
    a, b = spd(4, 2), RNG.standard_normal((2, 4))
    matvec, bs, flat = problem(a, b)
    largest = np.linalg.eigvalsh(a).max()
    good = tm.solvers.neumann(matvec, bs, steps=3000, eta=1.9 / largest)
    np.testing.assert_allclose(flat(good.x), np.linalg.solve(a, b[..., None])[..., 0], rtol=1e-9)
    bad = tm.solvers.neumann(matvec, bs, steps=500, eta=2.1 / largest)
    assert bad.residual.data.max() > 1e6 * np.linalg.norm(b)


def test_neumann_reports_negative_curvature_of_its_task_alone():
    matvec, bs, _ = problem([np.diag([3.0, 2.0, -1.0]), np.eye(3), np.zeros((3, 3))], np.tile([1.0, 1.0, 1.0], (3, 1)))
    for steps, found in [(1, False), (5, True)]:  # rᵀA r > 0 at first: the direction must grow out
        assert tm.solvers.neumann(matvec, bs, steps=steps, eta=0.3).negative_curvature.data.tolist() == [
            found,
            False,
            False,
        ]


def test_neumann_reports_negative_curvature_that_was_met_early():
    matvec, bs, _ = problem([np.diag([10.0, -1.0])], np.array([[0.1, 1.0]]))  # −0.9, then more than 0
    assert [tm.solvers.neumann(matvec, bs, steps=k, eta=1.0).negative_curvature.item() for k in (0, 1, 3)] == [0, 1, 1]


def test_neumann_refuses_what_does_not_fit_and_keeps_the_type():
    row = [tm.Tensor(np.ones((2, 1, 3), np.float32))]
    with pytest.raises(ValueError, match="neumann: b has shapes"):
        tm.solvers.neumann(lambda v: [], row, steps=1, eta=0.1)
    with pytest.raises(TypeError, match="neumann needs b as a list of Tensors"):
        tm.solvers.neumann(lambda v: v, row[0], steps=1, eta=0.1)
    for eta in (0.0, -0.1, float("nan"), tm.Tensor(0.0)):
        with pytest.raises(ValueError, match="eta must be positive"):
            tm.solvers.neumann(lambda v: v, row, steps=1, eta=eta)
    solution = tm.solvers.neumann(lambda v: v, row, steps=2, eta=0.5)
    assert all(t.inputs == () for t in (*solution.x, *solution[1:])) and solution.x[0].dtype == np.float32


@pytest.mark.parametrize("solver", ["cg", "gradient_descent", "hessian_free", "neumann"])
def test_negative_steps_are_refused(solver):
    options = {"gradient_descent": {"lr": 0.1}, "hessian_free": {"cg_steps": 1}, "neumann": {"eta": 0.1}}.get(
        solver, {}
    )
    solver = getattr(tm.solvers, solver)
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        solver(lambda *_: None, [tm.Tensor(np.ones(1))], steps=-1, **options)


def test_a_negative_number_of_cg_steps_is_refused_even_if_there_is_no_step():
    with pytest.raises(ValueError, match="cg_steps must be 0 or more, got -1"):
        tm.solvers.hessian_free(lambda phi, k: phi[0] ** 2, [tm.Tensor([3.0])], steps=0, cg_steps=-1)


def test_the_result_is_a_leaf_of_the_type_of_b():
    matvec, bs, _ = problem(spd(3, 2).astype(np.float32), np.ones((2, 3), np.float32))
    solution = tm.solvers.cg(matvec, bs, steps=30)  # far more than needed: nothing may divide by a vanished residual
    assert all(t.inputs == () for t in (*solution.x, *solution[1:]))
    assert solution.x[0].dtype == np.float32 and np.isfinite(solution.x[0].data).all()


def test_parameters_that_depend_on_each_other_have_their_own_gradients():
    """The inner gradient is the partial one, also of a Tensor given twice and of one that a rule makes of another."""
    x = tm.Tensor(np.ones((1, 1)) * 0.0)

    def bowl(phi, step):
        return tm.sum((phi[0] - 1) ** 2 + (phi[1] - 3) ** 2, axis=1)

    for create_graph in (False, True):
        options = dict(lr=0.1, steps=1, create_graph=create_graph)
        phi = tm.solvers.gradient_descent(bowl, [x, x], **options)
        np.testing.assert_allclose([p.item() for p in phi], [0.2, 0.6], rtol=1e-12)
        phi = tm.solvers.gradient_descent(bowl, [x, 2 * x], **options)
        np.testing.assert_allclose([p.item() for p in phi], [0.2, 0.6], rtol=1e-12)


def test_maml_through_a_rule_that_ties_its_results():
    def tied(params, grads, state=None, *, lr):
        new, _ = tm.solvers.sgd(params, grads, lr=lr)
        return [new[0], new[1] + 0.1 * tm.mean(new[0], axis=(1, 2), keepdims=True), *new[2:]], None

    theta, support, query = regression.problem()
    options = dict(alpha=0.1, steps=3, rule=tied)
    plain, graph = (tm.meta.adapt(regression.loss, theta, support, create_graph=c, **options) for c in (False, True))
    for p, q in zip(plain, graph):
        np.testing.assert_allclose(p.data, q.data, rtol=1e-12)
    _, meta_grad = tm.meta.maml(regression.loss, theta, support, query, **options)

    def objective(theta):
        return tm.meta.maml(regression.loss, theta, support, query, **options)[0].item()

    regression.assert_close(meta_grad, regression.finite_difference(objective, theta), rtol=1e-7)


def test_arrays_serve_as_gradients_right_hand_sides_and_starts():
    p, g = [tm.Tensor(np.ones(3))], [np.arange(3.0)]
    for rule in (tm.solvers.sgd, tm.solvers.momentum, tm.solvers.nesterov, tm.solvers.adam):
        for a, b in zip(rule(p, g, lr=0.1)[0], rule(p, [tm.Tensor(g[0])], lr=0.1)[0]):
            np.testing.assert_array_equal(a.data, b.data)
    b = [np.array([[1.0, 2.0]])]
    assert tm.solvers.cg(lambda v: [2 * v[0]], b, steps=2, x0=b).x[0].data.tolist() == [[0.5, 1.0]]


def test_an_exactly_null_direction_is_negative_curvature():
    a = np.array([[1.0, 0.0]])
    solution = tm.solvers.cg(lambda v: [a * v[0]], [tm.Tensor(np.array([[0.0, 1.0]]))], steps=2)
    assert solution.negative_curvature.data.tolist() == [True] and np.isfinite(solution.x[0].data).all()


@pytest.mark.parametrize("relative, unconverged", [(0.09, False), (0.11, True), (0.3, True)])
def test_unconverged_is_a_residual_above_a_tenth(relative, unconverged):
    """After one step on A = diag(1, 1 + e) and b = (1, 1) the residual is e / (2 + e) of b."""
    a = np.array([[1.0, 1.0 + 2 * relative / (1 - relative)]])
    solution = tm.solvers.cg(lambda v: [a * v[0]], [tm.Tensor(np.full((1, 2), 7.0))], steps=1)
    np.testing.assert_allclose(solution.relative_residual.data, [relative], rtol=1e-12)
    assert solution.unconverged.data.tolist() == [unconverged]
