"""ES-MAML: exact where mathematics says so, unbiased everywhere, and never a derivative."""

import gc
import tracemalloc

import numpy as np
import pytest

import tinymeta as tm
from regression import flat, loss, problem, task

ALPHA, SIGMA = 0.05, 0.1
ALGORITHMS = {
    "zero order": (tm.meta.es_maml, {}),
    "first order": (tm.meta.first_order_es_maml, {}),
    "first order, no Hessian": (tm.meta.first_order_es_maml, {"hessian": False}),
}
each_algorithm = pytest.mark.parametrize("algorithm, options", ALGORITHMS.values(), ids=ALGORITHMS)

# The case that can be checked by hand: L_s = ½ θᵀAθ, L_q = ½ (θ − c)ᵀC(θ − c).
A, C, CENTRE = np.diag([1, 2, -0.5]), np.diag([0.5, 1, 2]), np.array([1, -1, 0.5])
THETA = np.array([0.3, 0.2, -0.7])


def quadratic(phi, data):
    matrix, centre = data
    d = phi[0] - centre
    return tm.sum(0.5 * tm.matmul(d[:, None, :], matrix)[:, 0] * d, axis=1)


def by_hand(tasks=2):
    support = np.stack([A] * tasks), np.zeros((tasks, 3))
    return [tm.Tensor(THETA)], support, (np.stack([C] * tasks), np.stack([CENTRE] * tasks))


def orthogonal(rng, *axes, size=3):
    """As many draws as dimensions, orthogonal and of length √size, so that the mean of h hᵀ is I: (*axes, size, size)."""
    return np.sqrt(size) * np.linalg.qr(rng.standard_normal((*axes, size, size)))[0]


def noise_for(theta, tasks=3, steps=2, perturbations=4, queries=3, seed=0):
    rng = np.random.default_rng(seed)
    return tm.meta.draw_es_noise(rng, theta, tasks, steps=steps, perturbations=perturbations, queries=queries)


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.01, 2.0])
@pytest.mark.parametrize("steps", range(4))
def test_on_a_quadratic_with_orthogonal_noise_zero_order_is_maml(steps, sigma):
    """Antithetic pairs see a quadratic's gradient exactly, whatever σ; at one step this is the case checked by hand."""
    rng = np.random.default_rng(0)
    noise = [orthogonal(rng, 2)], [orthogonal(rng, 2, steps)]
    _, (g,) = tm.meta.es_maml(quadratic, *by_hand(), alpha=0.1, steps=steps, sigma=sigma, noise=noise)
    _, (expected,) = tm.meta.maml(quadratic, *by_hand(), alpha=0.1, steps=steps)
    np.testing.assert_allclose(g.data, expected.data, rtol=1e-9)
    if steps == 1:
        np.testing.assert_allclose(g.data, [-0.3285, 0.928, -2.5935], rtol=1e-9)


@pytest.mark.parametrize("steps", range(4))
def test_on_a_quadratic_with_orthogonal_noise_no_hessian_is_fomaml(steps):
    rng = np.random.default_rng(0)
    noise = [orthogonal(rng, 2)], [orthogonal(rng, 2, steps)]
    inner = dict(alpha=0.1, steps=steps)
    _, (g,) = tm.meta.first_order_es_maml(quadratic, *by_hand(), sigma=0.3, noise=noise, hessian=False, **inner)
    _, (expected,) = tm.meta.fomaml(quadratic, *by_hand(), **inner)
    np.testing.assert_allclose(g.data, expected.data, rtol=1e-9)


def reference(f_s, f_q, theta, outer, inner, alpha, sigma, kind):
    """One task in NumPy, vector by vector: θ (size,), outer (n, size), inner (steps, K, size)."""

    def es_grad(f, x, hs):
        return sum((f(x + sigma * h) - f(x - sigma * h)) * h for h in hs) / (2 * sigma * len(hs))

    def es_hess(f, x, hs):
        pairs = np.array([(f(x + sigma * h) + f(x - sigma * h)) / 2 for h in hs])
        products = np.array([np.outer(h, h) for h in hs])
        return np.einsum("n,nij->ij", pairs - pairs.mean(), products - products.mean(0)) / (len(hs) - 1) / sigma**2

    def path(x):
        xs = [x]
        for hs in inner:
            xs.append(xs[-1] - alpha * es_grad(f_s, xs[-1], hs))
        return xs

    if kind == "zero order":
        population = [theta + sign * sigma * h for h in outer for sign in (1, -1)]
        value = np.mean([f_q(path(x)[-1]) for x in population])
        return value, es_grad(lambda x: f_q(path(x)[-1]), theta, outer)
    xs = path(theta)
    v = es_grad(f_q, xs[-1], outer)
    for x, hs in reversed(list(zip(xs, inner)) if kind == "first order" else []):
        v = v - alpha * es_hess(f_s, x, hs) @ v
    return np.mean([f_q(xs[-1] + sign * sigma * h) for h in outer for sign in (1, -1)]), v


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_network_and_given_noise_against_a_loop_in_numpy(kind, steps):
    theta, support, query = problem()
    outer, inner = noise_for(theta, steps=steps)
    algorithm, options = ALGORITHMS[kind]
    value, g = algorithm(
        loss, theta, support, query, alpha=ALPHA, steps=steps, sigma=SIGMA, noise=(outer, inner), **options
    )
    ends = np.cumsum([t.size for t in theta])[:-1]

    def of(data, i):
        def f(x):
            parts = [tm.Tensor(p.reshape(1, *t.shape)) for p, t in zip(np.split(x, ends), theta)]
            return loss(parts, task(data, i)).item()

        return f

    def rows(noise, i, axes):
        return np.concatenate([h[i].reshape(*h.shape[1 : 1 + axes], t.size) for h, t in zip(noise, theta)], axis=-1)

    expected = [
        reference(of(support, i), of(query, i), flat(theta), rows(outer, i, 1), rows(inner, i, 2), ALPHA, SIGMA, kind)
        for i in range(3)
    ]
    np.testing.assert_allclose(flat(g), np.mean([e[1] for e in expected], axis=0), rtol=1e-8, atol=1e-11)
    assert value.item() == pytest.approx(np.mean([e[0] for e in expected]), rel=1e-12)
    assert [(x.shape, x.inputs) for x in g] == [(t.shape, ()) for t in theta] and value.shape == value.inputs == ()


@each_algorithm
def test_on_linear_losses_it_is_the_noise_s_own_projection(algorithm, options):
    """L = a·θ: ESGrad is the mean of h hᵀ times a, for any σ, and no step moves it."""
    rng = np.random.default_rng(0)
    a, h = rng.standard_normal(3), rng.standard_normal((1, 5, 3))
    options = {key: False for key in options}  # ESHess of a linear loss is noise; of the pairs' means it is 0
    noise = [h], [rng.standard_normal((1, 2, 4, 3))]

    def linear(phi, data):
        return tm.sum(phi[0] * data, axis=1)

    for sigma in (0.1, 3.0):
        arguments = dict(alpha=0.5, steps=2, sigma=sigma, noise=noise, **options)
        _, (g,) = algorithm(linear, [tm.Tensor(THETA)], a[None], a[None], **arguments)
        np.testing.assert_allclose(g.data, h[0].T @ h[0] @ a / 5, rtol=1e-10)


@each_algorithm
def test_a_constant_added_to_the_losses_changes_only_the_query_loss(algorithm, options):
    theta, support, query = problem()
    arguments = dict(alpha=ALPHA, steps=2, sigma=SIGMA, noise=noise_for(theta), **options)
    value, g = algorithm(loss, theta, support, query, **arguments)
    higher, same = algorithm(lambda phi, data: loss(phi, data) + 1000, theta, support, query, **arguments)
    np.testing.assert_allclose(flat(same), flat(g), rtol=1e-7, atol=1e-8)
    assert higher.item() == pytest.approx(value.item() + 1000)


# ---- on average ------------------------------------------------------------------------------------------------------


def within(estimates, expected, errors=4):
    """The mean of independent estimates (n, ...) is the expected value, within so many of its standard errors."""
    standard_error = estimates.std(axis=0, ddof=1) / np.sqrt(len(estimates))
    assert (np.abs(estimates.mean(axis=0) - expected) < errors * standard_error).all()
    return standard_error.max()


def waves(phi, data):
    """Σ_i sin(φ_i + b_i): blurred by σ it is e^{−σ²/2} times itself, so that all expectations are known."""
    return tm.sum(tm.sin(phi[0] + data), axis=1)


def tilted(phi, data):
    """The support's loss a·φ, whose inner step is exact with orthogonal noise; the query's is waves."""
    return tm.where(tm.less(data[:, 0], 99), waves(phi, data), tm.sum(phi[0] * np.array([1.0, -2.0, 0.5]), axis=1))


def test_zero_order_tends_to_the_meta_gradient_of_the_blurred_objective():
    """∇F̃ = e^{−σ²/2} cos(θ − α a + b), by 1 / √n. At σ = 0.8 the blur is 27 %, many standard errors."""
    sigma, b, widths = 0.8, np.array([0.1, -0.4, 1.0]), []
    expected = np.exp(-(sigma**2) / 2) * np.cos(THETA - 0.3 * np.array([1.0, -2.0, 0.5]) + b)
    for perturbations in (4, 64):
        rng, estimates = np.random.default_rng(0), []
        for _ in range(400):
            noise = [rng.standard_normal((1, perturbations, 3))], [orthogonal(rng, 1, 1)]
            arguments = dict(alpha=0.3, steps=1, sigma=sigma, noise=noise)
            _, (g,) = tm.meta.es_maml(tilted, [tm.Tensor(THETA)], np.full((1, 3), 99.0), b[None], **arguments)
            estimates.append(g.data)
        widths.append(within(np.array(estimates), expected))
    assert widths[1] < widths[0] / 3 and widths[1] < 0.02
    assert np.abs(expected * np.expm1(sigma**2 / 2)).max() > 10 * widths[1]


def test_eshess_is_unbiased_and_es_grad_too():
    """Per estimate only 3 draws of h: the mean over 20,000 is −e^{−σ²/2} sin, on the diagonal, off it 0."""
    from tinymeta.meta.es_maml import es_grad, es_hvp

    rng, n, sigma = np.random.default_rng(0), 20_000, 0.7
    h, shrunk = [rng.standard_normal((n, 3, 3))], np.exp(-(sigma**2) / 2)
    x = [tm.Tensor(np.tile(THETA, (n, 1, 1)))]

    def f(x):
        return tm.sum(tm.sin(x[0]), axis=-1) + 5

    values, (g,) = es_grad(f, x, h, sigma)
    within(g.data[:, 0], shrunk * np.cos(THETA))
    for i, e in enumerate(np.eye(3)):
        v = [tm.Tensor(np.tile(e, (n, 1, 1)))]
        (column,) = es_hvp(values, h, sigma, v)
        width = within(column.data[:, 0], -shrunk * np.sin(THETA) * e)
        assert width < 0.05
        assert np.abs(shrunk * np.sin(THETA))[i] > 3 * width


def test_first_order_tends_to_the_chain_rule_of_the_blurred_losses():
    """(I − α ∇²L̃_s(θ)) ∇L̃_q(θ − α ∇L̃_s(θ)), with all draws many; without the bracket where that is left out."""
    sigma, alpha, b, size = 0.5, 0.8, np.array([[0.1, -0.4, 1.0]]), 4000
    shrunk = np.exp(-(sigma**2) / 2)
    phi = THETA - alpha * shrunk * np.cos(THETA)
    first = shrunk * np.cos(phi + b[0])
    brackets = {True: 1 + alpha * shrunk * np.sin(THETA), False: 1}
    estimates = {True: [], False: []}
    rng = np.random.default_rng(0)
    for _ in range(60):
        noise = [rng.standard_normal((1, size, 3))], [rng.standard_normal((1, 1, size, 3))]
        for hessian in estimates:
            arguments = dict(alpha=alpha, steps=1, sigma=sigma, noise=noise, hessian=hessian)
            _, (g,) = tm.meta.first_order_es_maml(waves, [tm.Tensor(THETA)], 0 * b, b, **arguments)
            estimates[hessian].append(g.data)
    for hessian, bracket in brackets.items():
        assert within(np.array(estimates[hessian]), bracket * first) < 0.01
    assert np.abs((brackets[True] - 1) * first).max() > 0.05


def test_a_staircase_can_be_descended():
    """relu of sign: its derivative is 0 wherever it has one; no gradient method moves, ES-MAML does."""
    rng, centres = np.random.default_rng(0), np.array([[1.0], [1.4]])

    def stairs(phi, data):
        distance, total = tm.abs(phi[0] - data), 0
        for k in range(12):
            total = total + tm.relu(tm.sign(distance - (k + 0.5) / 4))
        return tm.sum(total, axis=1)

    theta = [tm.Tensor(np.array([-1.0]))]
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        tm.meta.maml(stairs, theta, centres, centres, alpha=0.01, steps=1)
    for _ in range(60):
        noise = tm.meta.draw_es_noise(rng, theta, 2, steps=1, perturbations=16, queries=8)
        arguments = dict(alpha=0.01, steps=1, sigma=0.3, noise=noise)
        _, meta_grad = tm.meta.es_maml(stairs, theta, centres, centres, **arguments)
        theta = tm.stop_gradient(tm.solvers.sgd(theta, meta_grad, lr=0.02)[0])
    assert 0.9 < theta[0].item() < 1.5


@each_algorithm
def test_it_never_takes_a_derivative(algorithm, options, monkeypatch):
    from tinymeta import tensor

    def forbidden(*args, **keywords):
        raise AssertionError("a derivative was taken")

    monkeypatch.setattr(tensor, "between", forbidden)
    theta, support, query = problem()
    algorithm(loss, theta, support, query, alpha=ALPHA, steps=2, sigma=SIGMA, noise=noise_for(theta), **options)
    with pytest.raises(AssertionError):
        tm.meta.maml(loss, theta, support, query, alpha=ALPHA, steps=2)


def adapting(phi, data):
    """A loss with a gradient step inside: |q − data|² after q ← φ − ½ · 2 (φ − data) is 0, whatever φ."""
    adapted = tm.solvers.gradient_descent(lambda q, k: tm.sum((q[0] - data) ** 2, axis=1), phi, lr=0.5, steps=1)
    return tm.sum((adapted[0] - data) ** 2, axis=1)


def penalised(phi, data):
    (g,) = tm.grad(tm.sum(tm.sin(phi[0]) * data), [phi[0]], create_graph=True)
    return tm.sum(g * g, axis=1)


@each_algorithm
def test_a_loss_may_take_gradients_of_its_own(algorithm, options):
    theta, data = [tm.Tensor(THETA)], np.stack([CENTRE] * 2)
    rest = dict(alpha=0.1, steps=1, sigma=0.01, noise=noise_for(theta, tasks=2, steps=1))
    assert algorithm(adapting, theta, data, data, **rest, **options)[0].item() < 1e-20
    by_hand = lambda phi, data: tm.sum((tm.cos(phi[0]) * data) ** 2, axis=1)
    compiled = tm.compile(penalised)  # called here first, and outside, where gradients are recorded, after that
    for f in (penalised, compiled):
        value, (g,) = algorithm(f, theta, data, data, **rest, **options)
        expected, (h,) = algorithm(by_hand, theta, data, data, **rest, **options)
        assert value.item() == pytest.approx(expected.item()) and value.inputs == g.inputs == ()
        np.testing.assert_allclose(g.data, h.data, rtol=1e-8)
    for phi in [np.stack([THETA] * 4 * n) for n in (4, 3)]:  # as many as the populations have
        c = np.repeat(data, len(phi) // 2, axis=0)
        np.testing.assert_allclose(compiled([phi], c).data, by_hand([tm.Tensor(phi)], c).data)


# ---- as every algorithm ----------------------------------------------------------------------------------------------


@each_algorithm
def test_compiled_equals_eager_and_noise_and_step_may_change(algorithm, options):
    def step(theta, support, query, noise, alpha):
        return algorithm(loss, theta, support, query, alpha=alpha, steps=2, sigma=SIGMA, noise=noise, **options)

    compiled, sharded = tm.compile(step), tm.compile(step, tasks=["support", "query", "noise"], shards=2)
    seen = set()
    for seed in (0, 1):
        theta, support, query = problem()
        arguments = theta, support, query, noise_for(theta, seed=seed), np.array(ALPHA * (1 + seed))
        value, g = step(*arguments)
        for fast in (compiled, sharded):
            again = fast(*arguments)
            assert again[0].item() == pytest.approx(value.item(), rel=1e-12)
            np.testing.assert_allclose(flat(again[1]), flat(g), rtol=1e-9, atol=1e-11)
        seen.add(value.item())
    assert len(seen) == 2 and len(compiled.programs) == 1


@each_algorithm
def test_tasks_and_members_of_the_population_do_not_interact(algorithm, options):
    theta, support, query = problem()
    outer, inner = noise_for(theta)
    arguments = dict(alpha=ALPHA, steps=2, sigma=SIGMA, **options)
    value, g = algorithm(loss, theta, support, query, noise=(outer, inner), **arguments)
    alone = [
        algorithm(loss, theta, task(support, i), task(query, i), noise=(task(outer, i), task(inner, i)), **arguments)
        for i in range(3)
    ]
    assert value.item() == pytest.approx(np.mean([a[0].item() for a in alone]))
    np.testing.assert_allclose(flat(g), np.mean([flat(a[1]) for a in alone], axis=0), rtol=1e-10, atol=1e-13)
    order = [np.roll(h, 1, axis=1) for h in outer], [np.roll(h, 1, axis=2) for h in inner]
    _, again = algorithm(loss, theta, support, query, noise=order, **arguments)
    np.testing.assert_allclose(flat(again), flat(g), rtol=1e-9, atol=1e-11)


@each_algorithm
def test_nested_data_and_minibatches_reach_the_loss(algorithm, options):
    theta, support, query = problem()
    arguments = dict(alpha=ALPHA, steps=2, sigma=SIGMA, noise=noise_for(theta), **options)

    def nested(phi, data):
        return loss(phi, (data["points"][0], data["points"][1]["y"]))

    def wrap(data):
        return {"points": [data[0], {"y": tm.Tensor(data[1])}]}

    def window(data, step):
        assert len(data[0]) == 3  # of the tasks, before they are repeated
        return tuple(a[:, step : step + 2] for a in data)

    _, g = algorithm(loss, theta, support, query, **arguments)
    _, same = algorithm(nested, theta, wrap(support), wrap(query), **arguments)
    np.testing.assert_array_equal(flat(same), flat(g))
    value, _ = algorithm(loss, theta, support, query, batch=window, **arguments)
    for order in (0, 0), (1, 0):
        other, _ = algorithm(loss, theta, support, query, batch=lambda s, k, o=order: window(s, o[k]), **arguments)
        assert other.item() != pytest.approx(value.item(), rel=1e-6)


def test_single_precision_stays_single_and_the_loss_is_called_once_a_population():
    theta, support, query = problem()
    theta = [tm.Tensor(t.data.astype(np.float32)) for t in theta]
    support, query = (tuple(a.astype(np.float32) for a in data) for data in (support, query))
    rows = []

    def counting(phi, data):
        rows.append((len(phi[0]), len(data[0])))
        return loss(phi, data)

    noise = noise_for(theta, steps=2, perturbations=4, queries=3)
    assert [h.dtype for part in noise for h in part] == [np.float32] * 8
    arguments = dict(alpha=ALPHA, steps=2, sigma=SIGMA, noise=noise)
    for algorithm, expected in ((tm.meta.es_maml, [144, 144, 24]), (tm.meta.first_order_es_maml, [18, 18, 24])):
        rows.clear()
        value, g = algorithm(counting, theta, support, query, **arguments)
        assert rows == [(n, n) for n in expected]  # 3 tasks, 8 around θ, 6 around each of those
        assert value.dtype == np.float32 and [x.dtype for x in g] == [np.float32] * 4


def test_noise_is_standard_normal_and_reproducible():
    theta = problem()[0]
    (w, *_), (v, *_) = noise_for(theta, tasks=50, steps=2, perturbations=40, queries=30)
    assert w.shape == (50, 40, 1, 4) and v.shape == (50, 2, 30, 1, 4)
    assert abs(v.mean()) < 4 / np.sqrt(v.size) and abs(v.std() - 1) < 4 / np.sqrt(2 * v.size)
    np.testing.assert_array_equal(w, noise_for(theta, tasks=50, steps=2, perturbations=40, queries=30)[0][0])


def test_memory_is_flat_in_the_steps_of_zero_order():
    theta, support, query = problem(points=500)

    def peak(steps):
        noise = noise_for(theta, steps=steps)
        gc.collect()
        tracemalloc.start()
        tm.meta.es_maml(loss, theta, support, query, alpha=0.01, steps=steps, sigma=SIGMA, noise=noise)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(12) < 1.3 * peak(2)


@each_algorithm
def test_refusals(algorithm, options):
    theta, support, query = problem()
    outer, inner = noise = noise_for(theta)
    arguments = dict(alpha=ALPHA, steps=2, sigma=SIGMA, **options)

    def call(loss=loss, theta=theta, noise=noise, **changes):
        algorithm(loss, theta, support, query, **arguments | dict(noise=noise) | changes)

    wrong = [
        (inner, outer),
        ([h[:2] for h in outer], inner),
        (outer, [h[:2] for h in inner]),
        (outer[:3], inner),
        ([outer[0][:, :2], *outer[1:]], inner),
        ([h[:, :0] for h in outer], inner),
        (outer, [h[:, :, :0] for h in inner]),
        (outer, [h[:, :1] for h in inner]),
    ]
    for bad in wrong:
        with pytest.raises(ValueError, match=r"noise is \(outer, inner\), for parameters .*\(3, 2, K, \*shape\)"):
            call(noise=bad)
    for bad in (None, {0: outer, 1: inner}, (*noise, inner), [outer]):
        with pytest.raises(TypeError, match=r"noise is \(outer, inner\), as draw_es_noise makes it, got "):
            call(noise=bad)
    for sigma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma must be positive"):
            call(sigma=sigma)
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        call(steps=-1)
    with pytest.raises(ValueError, match=r"<lambda> returned a Tensor of float64, shape \(\)"):
        call(loss=lambda phi, data: tm.mean(loss(phi, data)))
    with pytest.raises(ValueError, match=r"theta\[0\] is the result of subtract"):
        call(theta=tm.solvers.sgd(theta, theta, lr=0.1)[0])


def test_eshess_needs_two_draws():
    theta, support, query = problem()
    arguments = dict(alpha=ALPHA, steps=2, sigma=SIGMA, noise=noise_for(theta, queries=1))
    with pytest.raises(ValueError, match="2 or more: got 1"):
        tm.meta.first_order_es_maml(loss, theta, support, query, **arguments)
    _, g = tm.meta.first_order_es_maml(loss, theta, support, query, hessian=False, **arguments)
    assert np.isfinite(flat(g)).all()
    arguments["noise"] = noise_for(theta, queries=2)
    _, h = tm.meta.first_order_es_maml(loss, theta, support, query, **arguments)
    assert np.isfinite(flat(h)).all() and not np.allclose(flat(g), flat(h))


def test_step_sizes_are_one_for_each_parameter():
    """As everywhere: a list is not an array along the last axis, and no step may change a parameter's shape."""
    rng, data = np.random.default_rng(0), (np.ones((3, 4, 2)), np.ones((3, 4, 2)))
    theta = [tm.Tensor(np.ones((2, 2))), tm.Tensor(np.zeros((1, 2)))]

    def loss(phi, data):
        return tm.nn.mse(data[0] @ phi[0] + phi[1], data[1])

    noise = tm.meta.draw_es_noise(rng, theta, 3, steps=1, perturbations=4, queries=4)
    options = dict(steps=1, sigma=0.1, noise=noise)
    for f in (tm.meta.es_maml, tm.meta.first_order_es_maml):
        one = f(loss, theta, data, data, alpha=0.1, **options)
        each = f(loss, theta, data, data, alpha=[0.1, 0.1], **options)
        assert one[0].item() == pytest.approx(each[0].item(), rel=1e-12)
        for a, b in zip(one[1], each[1]):
            np.testing.assert_allclose(a.data, b.data, rtol=1e-10)
        with pytest.raises(ValueError, match="step sizes"):
            f(loss, theta, data, data, alpha=[0.1], **options)
        with pytest.raises(ValueError, match="would become"):
            f(loss, theta, data, data, alpha=np.ones((1, 1, 1, 1, 2)), **options)
