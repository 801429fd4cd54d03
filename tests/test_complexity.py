"""What a meta-gradient costs: the counts against counts by hand, memory linear and flat, the complexity table."""

import json

import numpy as np
import pytest

import tinymeta as tm
from benchmarks import complexity

TINY = complexity.Setting((2, 4, 6), 4, 3, 1, (10, 30))

# ---- the measures ----------------------------------------------------------------------------------------------------


def mlp_loss(phi, data):
    x, y = data
    return tm.nn.mse(tm.nn.mlp(phi, x), y)


def mlp_problem(tasks=2, n=8, sizes=(3, 5, 2)):
    rng = np.random.default_rng(0)
    data = rng.standard_normal((tasks, n, sizes[0])), rng.standard_normal((tasks, n, sizes[-1]))
    return tm.nn.init_mlp(rng, sizes, np.float64), data, data


def counted(f, *args):
    return complexity.trace(f, *args)[0]


def test_operations_against_counts_by_hand():
    """2 n k m for each product. An MLP 3-5-2 on n rows makes A = X W₁ and H W₂; its gradient three more, none for X."""
    theta, (x, y), _ = mlp_problem()
    tasks, n = 2, 8
    first, second = 2 * tasks * n * 3 * 5, 2 * tasks * n * 5 * 2
    assert counted(lambda x, w: x @ w, np.ones((7, n, 3)), np.ones((3, 5))) == 2 * 7 * n * 3 * 5
    assert counted(lambda x, w: tm.sum(x[0] @ w), np.ones((1, n, 3)), np.ones(3)) == 2 * n * 3
    stack = lambda theta: [tm.broadcast_to(t, (tasks, *t.shape)) for t in theta]
    forward = lambda theta, data: tm.sum(mlp_loss(stack(theta), data))
    assert counted(forward, theta, (x, y)) == first + second
    gradient = lambda theta, data: tm.grad(forward(theta, data), theta)
    assert counted(gradient, theta, (x, y)) == 2 * first + 3 * second


def test_operations_of_the_algorithms():
    """A gradient is 1; steps of it, and the query's; Reptile logs its query loss. MAML's walk back: products by hand."""
    theta, support, query = mlp_problem()
    first, second = 2 * 2 * 8 * 3 * 5, 2 * 2 * 8 * 5 * 2
    loss, unit = first + second, 2 * first + 3 * second
    # H v from the graph of a gradient W̄₁ = Xᵀ Ā, W̄₂ = Hᵀ Z̄, H̄ = Z̄ W₂ᵀ: X V₁; H V₂ and Z̄ V₂ᵀ; two for H̄; and two and
    # one more on the way through Z = H W₂ and A = X W₁ down to the weights.
    product = 2 * first + 6 * second
    for steps in (0, 1, 3):
        call = lambda name, steps=steps, **options: counted(
            lambda *args: getattr(tm.meta, name)(mlp_loss, *args, alpha=0.1, steps=steps, **options)[:2],
            theta, support, query,
        )  # fmt: skip
        assert call("fomaml") == (steps + 1) * unit
        assert call("reptile") == steps * unit + loss
        assert call("maml") == (steps + 1) * unit + steps * product
        for cg in (0, 2):  # CG starts at ∇L_q: one product more
            expected = (steps + 2) * unit + (cg + 1) * product
            assert call("imaml", lam=1.0, cg_steps=cg, report=True) == expected


def test_peak_is_what_is_alive_at_once():
    mb = 2**17  # float64
    assert complexity.peak(lambda: np.ones(mb)) == pytest.approx(2**20, rel=0.01)

    def three():
        x, y = np.ones(mb), np.ones(mb)
        return x + y

    assert complexity.peak(three) == pytest.approx(3 * 2**20, rel=0.01)
    assert complexity.peak(lambda: [np.ones(mb).sum() for _ in range(5)]) == pytest.approx(2**20, rel=0.01)
    held = np.ones(mb)
    assert complexity.peak(lambda x: x.sum(), held) < 1e5  # what was there before does not count
    with pytest.raises(ZeroDivisionError):
        complexity.peak(lambda: 1 / 0)
    assert complexity.peak(lambda: np.ones(mb)) == pytest.approx(2**20, rel=0.01)  # and the tracing was ended


def test_buffers_are_those_of_the_compiled_plan():
    _, buffers = complexity.trace(lambda x: tm.exp(tm.exp(x) @ tm.exp(x).T), np.ones((10, 20)))
    assert buffers == 8 * (
        10 * 20 + 10 * 10
    )  # the common subexpression once; its transpose is a view; the last in place


# ---- Figure 2b -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def costs():
    names = "maml", "fomaml", "reptile", "imaml2", "imaml5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(complexity, "METHODS", {name: complexity.METHODS[name] for name in names})
        return complexity.measure(TINY, 1, seed=0)


def test_memory_of_maml_is_affine_and_that_of_the_others_flat(costs):
    steps = np.array(TINY.steps)
    for what in ("peak", "buffers"):
        maml = np.array(costs["maml"][what])
        slopes = np.diff(maml) / np.diff(steps)
        assert (slopes > 0.2 * maml[0]).all() and slopes[1] == pytest.approx(slopes[0], rel=0.1)
        for name in ("fomaml", "reptile", "imaml2", "imaml5"):
            growth = np.abs(np.diff(costs[name][what]) / np.diff(steps))
            assert (growth < 0.06 * slopes[0]).all(), (name, what)  # in eager, Python's own reserves of objects
            assert costs[name][what][-1] < maml[-1] / 2
    two, five = (costs[name]["buffers"][-1] for name in ("imaml2", "imaml5"))
    assert five < 1.1 * two  # nor does it grow with conjugate gradient steps


def test_compute_is_affine_in_the_steps_with_the_right_slopes(costs):
    steps = np.array(TINY.steps)
    compute = {name: np.array(cost["compute"]) for name, cost in costs.items()}
    np.testing.assert_allclose(compute["fomaml"], steps + 1)
    for name in ("reptile", "imaml2", "imaml5"):
        np.testing.assert_allclose(np.diff(compute[name]), np.diff(steps))  # a step costs one gradient
    slopes = np.diff(compute["maml"]) / np.diff(steps)
    np.testing.assert_allclose(slopes, slopes[0])
    product = (compute["imaml5"] - compute["imaml2"]) / 3
    np.testing.assert_allclose(product, slopes[0] - 1)  # what MAML adds to a gradient is a Hessian-vector product
    np.testing.assert_allclose(compute["maml"], 1 + steps * slopes[0])


def test_every_cost_is_measured_for_every_method(costs):
    for cost in costs.values():
        assert [len(values) for values in cost.values()] == [3] * 4 and set(cost) == {
            "compute",
            "peak",
            "buffers",
            "seconds",
        }
        assert all(np.min(values) > 0 for values in cost.values())


def truncated(loss, theta, support, query, *, alpha, steps, last):
    start = tm.meta.adapt(loss, theta, support, alpha=alpha, steps=steps - last)
    phi = tm.solvers.gradient_descent(
        lambda phi, step: loss(phi, support), start, lr=alpha, steps=last, create_graph=True
    )
    query_loss = tm.mean(loss(phi, query))
    return tm.stop_gradient((query_loss, [tm.sum(g, axis=0) for g in tm.grad(query_loss, start)]))


def test_truncation_caps_memory(monkeypatch):
    title, _, options = complexity.METHODS.get("truncated", ("last 4 steps", None, lambda k: {"last": min(4, k)}))
    monkeypatch.setattr(complexity, "METHODS", {"truncated": (title, truncated, options)})
    setting = TINY._replace(steps=(2, 4, 6, 8))
    cost = complexity.measure(setting, 1, seed=0)["truncated"]
    for what in ("peak", "buffers"):
        a, b, c, d = cost[what]
        assert b > 1.3 * a and c == pytest.approx(b, rel=0.1) and d == pytest.approx(b, rel=0.1)
    compute = np.diff(cost["compute"])
    np.testing.assert_allclose(compute[1:], 2)
    assert compute[0] > 4  # while every step is differentiated, it costs about three gradients


def test_where_maml_crosses():
    steps = (1, 2, 5, 10)
    assert complexity.crossing(steps, [1, 2, 5, 10], [3, 3, 3, 3]) == pytest.approx(3)
    assert complexity.crossing(steps, [1, 2, 5, 10], [2, 4, 6, 6]) == pytest.approx(6)
    assert complexity.crossing(steps, [1, 2, 5, 10], [11, 11, 11, 11]) is None
    assert complexity.crossing(steps, [1, 2, 5, 10], [0, 0, 0, 0]) is None
    assert complexity.crossing(steps, [2, 1, 5, 10], [1, 3, 3, 3]) == pytest.approx(3.5)  # the last time counts


def test_the_published_crossings():
    """Read off Figure 2b: CG 2 near 5 steps, CG 5 near 8, CG 10 near 12."""
    costs = {
        name: {w: [1, 2] for w in ("seconds", "compute", "peak")} for name in ("maml", "imaml2", "imaml5", "imaml10")
    }
    found = [c["published"] for c in complexity.crossings((1, 2), costs).values()]
    assert found == pytest.approx([5, 8, 12], abs=0.6)
    assert complexity.PUBLISHED_SECONDS["maml"][16] == 0.505 and complexity.PUBLISHED_MEMORY["maml"][16] == 0.965


# ---- the complexity table --------------------------------------------------------------------------------------------


def test_the_complexity_table(monkeypatch):
    monkeypatch.setattr(complexity, "FEATURES", 500)
    rows = {kappa: complexity.on_quadratic(kappa, seed=0) for kappa in (10, 100)}
    measured = complexity.exponents(rows)
    for name, (_, compute, memory) in complexity.TABLE.items():
        assert measured[name] == pytest.approx((compute, memory), abs=0.15), name
    for row in rows.values():
        assert max(row[name]["error"] for name in ("gd", "nesterov", "imaml")) < 20 / complexity.D_DELTA
        assert row["gd"]["error"] < row["truncated"]["error"] < 0.5
        assert row["truncated"]["products"] < row["gd"]["products"] == row["gd"]["gradients"]
        assert row["imaml"]["gradients"] == row["nesterov"]["gradients"] < row["gd"]["gradients"]
        assert row["imaml"]["memory"] < row["truncated"]["memory"] < row["gd"]["memory"]


def test_errors_in_closed_form(monkeypatch):
    """φ_k = φ* + Mᵏ (θ − φ*), M = 1 − α (a + λ), and its Jacobian λ / (a + λ) (1 − Mᵀ), T steps back; all k give Mᵏ more.

    A rough solution, so that what the last steps leave out shows.
    """
    for name, value in (("FEATURES", 30), ("D_DELTA", 5.0), ("ONE_EPS", 2.0)):
        monkeypatch.setattr(complexity, name, value)
    row = complexity.on_quadratic(20, seed=3)
    rng, curvature = np.random.default_rng(3), np.geomspace(1, 20, 30)
    centre, target, theta = (rng.standard_normal(30) for _ in range(3))
    solution = ((curvature - 1) * centre + theta) / curvature
    exact = (solution - target) / curvature
    m, k, t = 1 - 2 / 21 * curvature, row["gd"]["gradients"], row["truncated"]["products"]
    assert 0 < t < k
    g = solution + m**k * (theta - solution) - target
    jacobians = {"gd": (1 - m**k) / curvature + m**k, "truncated": (1 - m**t) / curvature}
    for name, jacobian in jacobians.items():
        expected = np.linalg.norm(jacobian * g - exact) / np.linalg.norm(exact)
        assert row[name]["error"] == pytest.approx(expected, rel=1e-9), name


def test_steps_to_delta_are_the_first_that_reach_it():
    """With one curvature, 1, and κ = 3, α = ½ halves the distance: 7 steps to a hundredth. Nesterov's by iteration."""
    theta = [tm.Tensor(np.array([1.0, -2.0]))]
    data = np.ones((1, 2)), np.zeros((1, 2))
    count = lambda name, factor: complexity.steps_to(
        name, 3, complexity.quadratic, theta, data, np.zeros((1, 2)), factor
    )
    assert count("gd", 100) == 7 and count("gd", 1.0) == 0 and count("gd", 2**5) == 5
    root = np.sqrt(3)
    mu, x, before, steps = (
        (root - 1) / (root + 1),
        1.0,
        1.0,
        0,
    )  # the textbook's form: x ← y − α ∇(y), y = x + μ (x − x₋)
    y = x
    while abs(y) > 1 / 100:
        before, x = x, y - y / 3
        y = x + mu * (x - before)
        steps += 1
    assert count("nesterov", 100) == steps


def test_the_inner_solvers_contract_as_fast_as_they_can():
    alpha, rule = complexity.inner_solver("gd", 9.0)
    assert abs(1 - alpha * 1) == pytest.approx(abs(1 - alpha * 9)) == 0.8 and rule is tm.solvers.sgd
    alpha, rule = complexity.inner_solver("imaml", 9.0)
    assert alpha == 1 / 9 and rule.keywords == {"mu": 0.5} and rule.func is tm.solvers.nesterov


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(complexity, "METHODS", {name: complexity.METHODS[name] for name in ("maml", "imaml2")})
    monkeypatch.setattr(complexity, "QUICK", TINY._replace(steps=(1, 2)))
    monkeypatch.setattr(complexity, "FEATURES", 100)
    complexity.main(["--quick", "--rounds", "1", "--out", str(tmp_path), "--json", str(tmp_path / "c.json")])
    out = capsys.readouterr().out
    for text in (
        "gradients of the loss",
        "peak memory",
        "buffers of the compiled plan",
        "from which MAML costs more",
        "κ",
    ):
        assert text in out
    record = json.loads((tmp_path / "c.json").read_text())
    assert set(record["figures"]) == {"convnet", "crossings", "quadratic", "exponents"}
    assert record["settings"]["steps"] == [1, 2] and record["settings"]["rounds"] == 1
    assert (tmp_path / "complexity.png").stat().st_size > 10_000
    with pytest.raises(SystemExit) as end:
        complexity.main(["--rounds", "0"])
    assert end.value.code == 2


def test_the_tables_show_published_figures_beside_ours(monkeypatch):
    monkeypatch.setattr(complexity, "FIGURE", TINY._replace(steps=(1, 2, 16)))
    cost = {"compute": [1, 2, 3], "peak": [1e6, 2e6, 16e6], "buffers": [1e6, 1e6, 1e6], "seconds": [0.5, 0.625, 0.75]}
    costs = dict.fromkeys(complexity.METHODS, cost)
    text = complexity.figure_tables(complexity.FIGURE, costs)
    lines = [line.split() for line in text.splitlines()]
    assert ["published", "0.11", "0.165", "0.965"] in lines and ["published", "0.12", "0.145", "0.505"] in lines
    assert ["MAML", "0.500", "0.625", "0.750"] in [line[:4] for line in lines]
    assert ["MAML", "1.0", "2.0", "16.0"] in [line[:4] for line in lines]
    assert "published" not in complexity.figure_tables(TINY, costs).split("inner steps from")[0].replace(
        "; published", ""
    )
