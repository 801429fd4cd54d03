"""The figure of meta-gradient errors: its closed forms against each other and against the algorithms, and the command."""

import json

import numpy as np
import pytest

import tinymeta as tm
from benchmarks import implicit as benchmark


@pytest.fixture
def tiny(monkeypatch):
    """Six dimensions, few steps."""
    monkeypatch.setattr(benchmark, "EIGENVALUES", np.array([1.8, 2.0, 2.1, 2.3, 2.6, 90.0]))
    monkeypatch.setattr(benchmark, "POINTS", 7)
    monkeypatch.setattr(benchmark, "STEPS", range(0, 101, 10))
    solvers = {name: (alpha, how, list(steps)[:3]) for name, (alpha, how, steps) in benchmark.SOLVERS.items()}
    monkeypatch.setattr(benchmark, "SOLVERS", solvers)


def test_the_problem_has_the_spectrum_that_is_printed(tiny):
    theta, support, query, w = benchmark.problem(0)
    for x, y in (support, query):
        eigenvalues = np.linalg.eigvalsh(2 * x.swapaxes(1, 2) @ x / benchmark.POINTS)
        np.testing.assert_allclose(eigenvalues, np.tile(benchmark.EIGENVALUES, (benchmark.TASKS, 1)), rtol=1e-10)
        np.testing.assert_allclose(y, x @ w)
    assert theta[0].dtype == np.float64 and not np.allclose(support[0], query[0])


def test_the_exact_gradient_is_the_finite_difference_of_the_query_loss_at_the_exact_solution(tiny):
    theta, support, query, w = benchmark.problem(0)
    star, g = benchmark.by_hand(theta[0].data, support, query, w)
    objective = tm.meta.proximal(benchmark.loss, theta, benchmark.LAM)
    phi = tm.Tensor(star)
    assert np.abs(tm.grad(tm.sum(objective([phi], support)), [phi])[0].data).max() < 1e-12

    def outer(t):
        star = benchmark.by_hand(t, support, query, w)[0]
        return benchmark.loss([tm.Tensor(star)], query).data.mean()

    for i in range(len(g)):
        e = 1e-5 * np.eye(len(g))[:, i : i + 1]
        slope = (outer(theta[0].data + e) - outer(theta[0].data - e)) / 2e-5
        assert slope == pytest.approx(g[i, 0], rel=1e-7)


@pytest.mark.parametrize("steps", [0, 1, 7, 60])
def test_both_meta_gradients_are_the_closed_forms_of_gradient_descent(tiny, steps):
    """With M = (I − α (H + λI))^steps: φ = φ* + M (θ − φ*), and MAML's ∂φ/∂θ = λ (H + λI)⁻¹ (I − M) + M."""
    theta, support, query, w = benchmark.problem(1)
    star, g = benchmark.by_hand(theta[0].data, support, query, w)
    h, h_query = (2 * x.swapaxes(1, 2) @ x / benchmark.POINTS for x, _ in (support, query))
    eye = np.eye(len(g))
    m = np.linalg.matrix_power(eye - benchmark.ALPHA * (h + benchmark.LAM * eye), steps)
    phi = star + m @ (theta[0].data - star)
    exact = benchmark.LAM * np.linalg.inv(h + benchmark.LAM * eye)
    unrolled = exact @ (eye - m) + m
    maml = benchmark.CURVES["MAML"](theta, support, query, steps)
    np.testing.assert_allclose(maml, (unrolled @ h_query @ (phi - w)).mean(0), rtol=1e-9, atol=1e-12)
    imaml = benchmark.CURVES["iMAML, CG = 10"](theta, support, query, steps)
    np.testing.assert_allclose(imaml, (exact @ h_query @ (phi - w)).mean(0), rtol=1e-8, atol=1e-12)


def test_the_published_shape_appears(tiny):
    errors = benchmark.errors_by_steps(*benchmark.problem(0))
    maml, two, five, ten, maml_nesterov, imaml_nesterov = (np.array(errors[name]) for name in benchmark.CURVES)
    assert (five[1:] < maml[1:]).all() and np.allclose(five, ten, rtol=0.05) and five[-1] < 0.6 * two[-1]
    assert maml_nesterov[5] < 0.1 * maml[5] and imaml_nesterov[5] < 0.1 * five[5]
    for name, values in benchmark.PUBLISHED.items():
        assert values.keys() <= set(range(25, 101))
        for step in (50, 70, 100):
            ours = errors[name][step // 10]
            assert 0.4 < ours / values[step] < 2.5, (name, step)


def test_the_error_is_bounded_by_delta_for_every_inner_solver(tiny):
    """‖ĝ − g‖ ≤ ‖λ (H + λI)⁻¹ H_q‖ δ, and of order 1, but for Adam, which comes along other directions as it goes."""
    tasks = benchmark.problem(0)
    star, g = benchmark.by_hand(tasks[0][0].data, *tasks[1:])
    largest = benchmark.EIGENVALUES.max()
    bound = benchmark.LAM * largest / (benchmark.LAM + largest) / np.linalg.norm(g)
    orders = benchmark.errors_by_delta(*tasks)
    delta = np.linalg.norm(tasks[0][0].data - star) / np.sqrt(len(star))
    assert orders["gradient descent"][0][0] == pytest.approx(delta, rel=1e-12)
    assert orders.keys() == benchmark.SOLVERS.keys()
    for name, points in orders.items():
        assert all(0.01 * bound * delta < error <= bound * delta for delta, error in points), name
        if name != "Adam":
            assert benchmark.fitted_slope(points) == pytest.approx(1, abs=0.25), name


def test_slope_and_crossing():
    assert benchmark.fitted_slope([(d, 3 * d**2) for d in (0.1, 0.01, 1e-5, 1e-12)]) == pytest.approx(2)
    decay = {"MAML": [2 * 0.96**k for k in benchmark.STEPS], "iMAML, CG = 2": [2 * 0.96**52] * len(benchmark.STEPS)}
    assert benchmark.crossing(decay) == pytest.approx(52)
    assert benchmark.crossing({"MAML": [2.0] * 21, "iMAML, CG = 2": [1.0] * 21}) is None


def test_the_command_prints_records_and_draws(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(benchmark, "STEPS", [25, 50, 90])
    benchmark.main(["--out", str(tmp_path), "--json", str(tmp_path / "i.json")])
    out = capsys.readouterr().out
    assert "are not known to us" in out and "published: from about 95" in out and out.count("published") == 5
    assert "dimension = 6" in out and "lam = 1, alpha =" in out
    record = json.loads((tmp_path / "i.json").read_text())
    assert len(record["figures"]["errors"]["MAML"]) == 3 and record["settings"]["dimension"] == 6
    assert (tmp_path / "implicit.png").stat().st_size > 10_000
