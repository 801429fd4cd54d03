"""The Taylor analysis: its expansions, its averages, its coefficients, and that the benchmark would notice wrong ones."""

import itertools
import json

import numpy as np
import pytest

import tinymeta as tm
from benchmarks import taylor
from regression import dense_hessian


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(taylor, "SIZES", (1, 4, 1))
    monkeypatch.setattr(taylor, "POINTS", 5)


def dense(theta, data):
    """Gradients (n, parameters) and Hessians (n, parameters, parameters) of n minibatches, one at a time."""
    losses = [
        lambda params, i=i: tm.sum(taylor.loss([p[None] for p in params], tuple(part[i : i + 1] for part in data)))
        for i in range(len(data[0]))
    ]
    gradients = [taylor.flat(tm.grad(f(theta), theta)).data for f in losses]
    return np.array(gradients), np.array([dense_hessian(f, theta) for f in losses])


def by_definition(name, g, h):
    """(e₀, e₁) term by term, as the docstring writes them."""
    k = len(g)
    if name == "reptile":
        return sum(g), sum(h[i] @ g[j] for i in range(k) for j in range(i))
    first = sum(h[-1] @ g[j] for j in range(k - 1))
    return g[-1], first + sum(h[j] @ g[-1] for j in range(k - 1)) if name == "maml" else first


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("name", taylor.METHODS)
def test_expansions_are_the_sums_that_the_docstring_writes(name, k):
    rng = np.random.default_rng(k)
    theta, data = taylor.initial(rng), taylor.minibatches(rng, k)
    for got, expected in zip(taylor.expansion(name, theta, data), by_definition(name, *dense(theta, data))):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("k", [2, 4])
def test_the_meta_gradients_are_those_of_the_definition(k):
    """φ by plain steps on arrays; MAML as the finite difference of L_k(φ_k), whose step k − 1 sees minibatch k − 1."""
    rng = np.random.default_rng(0)
    theta, data, alpha = taylor.initial(rng), taylor.minibatches(rng, k), 0.05
    sequence = tuple(part[None] for part in data)

    def minibatch(i):
        return tuple(part[i : i + 1] for part in data)

    def value(flat_theta, i):
        return tm.sum(taylor.loss(unflat(flat_theta), minibatch(i))).item()

    def unflat(v):
        parts = np.split(v, np.cumsum([t.size for t in theta])[:-1])
        return [tm.Tensor(part.reshape(1, *t.shape)) for part, t in zip(parts, theta)]

    def gradient(v, i):
        phi = unflat(v)
        return taylor.flat(tm.grad(tm.sum(taylor.loss(phi, minibatch(i))), phi)).data

    def after(v, steps):
        for i in range(steps):
            v = v - alpha * gradient(v, i)
        return v

    start = taylor.flat(theta).data
    steps = 1e-6 * np.eye(len(start))
    through = [(value(after(start + s, k - 1), k - 1) - value(after(start - s, k - 1), k - 1)) / 2e-6 for s in steps]
    expected = {
        "maml": np.array(through),
        "fomaml": gradient(after(start, k - 1), k - 1),
        "reptile": (start - after(start, k)) / alpha,
    }
    for name in taylor.METHODS:
        got = taylor.meta_gradient(name, theta, sequence, alpha).data
        np.testing.assert_allclose(got, expected[name], rtol=0, atol=1e-7 * np.abs(got).max(), err_msg=name)


def test_averages_are_over_all_minibatches_and_all_ordered_pairs():
    rng = np.random.default_rng(1)
    theta, pool = taylor.initial(rng), taylor.minibatches(rng, 4)
    g, h = dense(theta, pool)
    avg_grad, avg_grad_inner = taylor.averages(theta, pool)
    np.testing.assert_allclose(avg_grad, np.mean(g, axis=0), rtol=1e-12)
    pairs = [h[i] @ g[j] for i, j in itertools.permutations(range(4), 2)]
    np.testing.assert_allclose(avg_grad_inner, np.mean(pairs, axis=0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("name", taylor.METHODS)
def test_the_table_of_coefficients_by_enumeration(name, k):
    """With all ordered sequences of a pool there is no scatter: E g is c₀ AvgGrad − c₁ α AvgGradInner, but for α²."""
    rng = np.random.default_rng(2)
    theta, pool = taylor.initial(rng), taylor.minibatches(rng, 4)
    sequences = np.array(list(itertools.permutations(range(4), k)))
    data = tuple(part[sequences] for part in pool)
    alpha, averages = 1e-5, taylor.averages(theta, pool)
    plus, minus = (taylor.meta_gradient(name, theta, data, a).data for a in (alpha, -alpha))
    c0, c1 = taylor.COEFFICIENTS[name](k)
    np.testing.assert_allclose((plus + minus) / 2, c0 * averages[0], rtol=0, atol=1e-5 * np.abs(averages[0]).max())
    odd = (plus - minus) / (2 * alpha)
    np.testing.assert_allclose(odd, -c1 * averages[1], rtol=0, atol=1e-5 * np.abs(averages[1]).max())


def test_errors_fall_with_slope_2():
    for by_k in taylor.errors(seed=0).values():
        for e in by_k.values():
            assert e["slope"] == pytest.approx(2, abs=0.05)
            ratios = np.array(e["error"])[-3:] / taylor.ALPHAS[-3:] ** 2
            np.testing.assert_allclose(ratios, ratios[0], rtol=0.05)
            assert ratios[0] > 1e-3  # there is a second order to be seen


SABOTAGES = {  # what a wrong expansion would be, and the slope that gives it away
    "sign": (lambda name, g, h: (lambda e0, e1: (e0, -e1))(*by_definition(name, g, h)), 1),
    "half": (lambda name, g, h: (lambda e0, e1: (e0, e1 / 2))(*by_definition(name, g, h)), 1),
    "order of minibatches": (lambda name, g, h: by_definition(name, g[::-1], h[::-1]), None),
    "no second order": (lambda name, g, h: by_definition("fomaml" if name == "maml" else name, g, h), None),
    "one gradient": (lambda name, g, h: by_definition("fomaml" if name == "reptile" else name, g, h), None),
    "own gradient": (lambda name, g, h: (by_definition(name, g, h)[0], by_definition(name, g, h)[1] + h[0] @ g[0]), 1),
}


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_a_wrong_expansion_shows_in_the_slope(monkeypatch, sabotage):
    wrong, slope = SABOTAGES[sabotage]
    monkeypatch.setattr(taylor, "expansion", lambda name, theta, data: wrong(name, *dense(theta, data)))
    monkeypatch.setattr(taylor, "KS", (3,))
    slopes = {name: by_k[3]["slope"] for name, by_k in taylor.errors(seed=0).items()}
    if slope is not None:
        assert list(slopes.values()) == pytest.approx([slope] * 3, abs=0.1)
    else:
        hit = {"order of minibatches": slopes, "no second order": ["maml"], "one gradient": ["reptile"]}[sabotage]
        assert all((abs(slopes[name] - 2) > 0.5) == (name in hit) for name in slopes)


def test_regression_recovers_coefficients_and_knows_its_error():
    """Errors that all numbers of a draw share: half widths are right only if they are summed up draw by draw."""
    rng = np.random.default_rng(0)
    design = rng.standard_normal((60, 2, 2, 5))
    c, half = taylor.regress(design, np.einsum("dsrp,r->dsp", design, [3.0, -2.0]))
    np.testing.assert_allclose(c, [3, -2], rtol=1e-12)
    np.testing.assert_allclose(half, 0, atol=1e-12)
    covered, estimates, halves = [], [], []
    for _ in range(400):
        design = rng.standard_normal((60, 1, 2, 1)) + 0.1 * rng.standard_normal((60, 2, 2, 5))
        g = np.einsum("dsrp,r->dsp", design, [3.0, -2.0]) + rng.standard_normal((60, 1, 1))
        c, half = taylor.regress(design, g)
        covered.append(np.abs(c - [3, -2]) <= half)
        estimates.append(c)
        halves.append(half)
    assert 0.9 <= np.mean(covered) <= 0.97
    np.testing.assert_allclose(np.mean(halves, axis=0), 1.96 * np.std(estimates, axis=0), rtol=0.12)


def test_recovered_coefficients_are_within_their_intervals(monkeypatch):
    monkeypatch.setattr(taylor, "KS", (2, 3))
    deviations = []
    for by_k in taylor.coefficients(seed=0, draws=150).values():
        for e in by_k.values():
            half = np.array(e["half_width"])
            assert (half < 0.25 * np.array(e["exact"])).all() and (half > 0).all()
            deviations.append((np.array(e["estimate"]) - e["exact"]) / half)
    assert np.abs(deviations).max() < 1.8 and (np.abs(deviations) > 1).mean() <= 0.2


def test_the_exact_coefficients():
    """Nichol et al. 2018, section 5.1, for two and for four minibatches."""
    assert {name: c(2) for name, c in taylor.COEFFICIENTS.items()} == {
        "maml": (1, 2),
        "fomaml": (1, 1),
        "reptile": (2, 1),
    }
    assert {name: c(4) for name, c in taylor.COEFFICIENTS.items()} == {
        "maml": (1, 6),
        "fomaml": (1, 3),
        "reptile": (4, 6),
    }


def test_the_table_counts_the_intervals_that_miss():
    error = {"maml": {2: {"error": [4 * a**2 for a in taylor.ALPHAS], "slope": 2.0}}}
    for estimate, held in [([1.0, 2.0], 2), ([1.3, 2.0], 1), ([0.7, 2.5], 0)]:
        coefficient = {"maml": {2: {"estimate": estimate, "half_width": [0.2, 0.4], "exact": (1, 2)}}}
        text = taylor.tables(error, coefficient, 10)
        assert f"{held} of 2 intervals hold the exact value" in text
        assert "4.0" in text and f"{estimate[0]:.4f}" in text


def test_the_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(taylor, "KS", (2, 3, 4, 5))
    records = []
    for name in "ab":
        taylor.main(["--draws", "3", "--out", str(tmp_path), "--json", str(tmp_path / name)])
        records.append(json.loads((tmp_path / name).read_text()))
    assert records[0]["figures"] == records[1]["figures"] and records[0]["settings"]["draws"] == 3
    assert set(records[0]["figures"]["coefficients"]["maml"]) == set("2345")
    assert (tmp_path / "taylor.png").stat().st_size > 10_000
    assert "regression over 3 draws" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        taylor.main(["--draws", "1"])
    assert end.value.code == 2
