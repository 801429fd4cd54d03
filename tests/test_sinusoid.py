"""The sine waves, and the benchmark as a command."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import tinymeta as tm
from benchmarks import report
from benchmarks import sinusoid as benchmark
from tinymeta.tasks import sinusoid

# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_waves_have_the_published_ranges():
    waves = sinusoid.draw_waves(np.random.default_rng(0), 20_000)
    assert 0.1 <= waves.amplitude.min() < 0.11 and 4.99 < waves.amplitude.max() <= 5.0
    assert 0 <= waves.phase.min() < 0.01 and np.pi - 0.01 < waves.phase.max() <= np.pi
    x, y = sinusoid.draw_points(np.random.default_rng(0), waves, 3)
    assert x.shape == y.shape == (20_000, 3, 1) and x.dtype == y.dtype == np.float32
    assert -5 <= x.min() < -4.99 and 4.99 < x.max() <= 5
    np.testing.assert_allclose(y, waves.amplitude * np.sin(x - waves.phase), rtol=1e-4, atol=1e-5)


def test_support_and_query_are_different_points_of_the_same_waves():
    (x, y), (u, v) = sinusoid.training_batch(np.random.default_rng(0), 7, 5, queries=8)
    assert x.shape == y.shape == (7, 5, 1) and u.shape == v.shape == (7, 8, 1)
    assert not np.intersect1d(x, u).size
    rng = np.random.default_rng(0)
    points = sinusoid.draw_points(rng, sinusoid.draw_waves(rng, 7), 13, dtype=np.float64)
    again = sinusoid.training_batch(np.random.default_rng(0), 7, 5, queries=8, dtype=np.float64)
    np.testing.assert_array_equal(np.concatenate(again, axis=2), points)  # the same (x, y), cut in two
    np.testing.assert_array_equal(again[0][0].astype(np.float32), x)


def test_test_tasks_depend_on_seed_and_index_alone():
    waves, (x, y) = sinusoid.test_tasks(1, 5, 4)
    more_waves, (more_x, more_y) = sinusoid.test_tasks(1, 9, 6)
    np.testing.assert_array_equal(more_waves.amplitude[:5], waves.amplitude)
    np.testing.assert_array_equal(more_x[:5, :4], x)
    np.testing.assert_array_equal(more_y[:5, :4], y)
    assert sinusoid.test_tasks(2, 5, 4)[0].amplitude[0] != waves.amplitude[0]
    assert sinusoid.test_tasks(1, 20, 50, high=0.0)[1][0].max() <= 0


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def run(tmp_path, *options):
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "benchmarks.sinusoid",
        "--out",
        tmp_path,
        "--json",
        tmp_path / "s.json",
    ]
    root = Path(__file__).parents[1]
    result = subprocess.run([*command, *options], capture_output=True, text=True, cwd=root, check=False)
    return result


def test_a_short_run_prints_its_table_and_records_it(tmp_path):
    results = [run(tmp_path / name, "--iterations", "20", "--methods", "maml", "imaml", "random") for name in "ab"]
    for result in results:
        assert result.returncode == 0, result.stderr
        assert "K = 5: mean squared error ± 95 %, 600 test tasks" in result.stdout
        assert "published" in result.stdout and "iMAML  20/20  query loss" in result.stderr
    records = [json.loads((tmp_path / name / "s.json").read_text()) for name in "ab"]
    assert records[0]["figures"] == records[1]["figures"]  # the same command twice gives the same bytes
    figures = records[0]["figures"]["maml"]["5"]
    assert len(figures["mean"]) == 11 and figures["tasks"] == 600 and records[0]["settings"]["maml"]["iterations"] == 20
    assert records[0]["command"].startswith("python -m benchmarks.sinusoid --out")


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    result = run(tmp_path, "--iterations", "2", "--methods", "reptile", "pretrained")
    assert result.returncode == 0, result.stderr
    assert {p.name for p in tmp_path.glob("*.png")} == {"sinusoid_fits.png", "sinusoid_steps.png"}


def test_errors_of_a_network_that_says_zero():
    """Before any step the error is the mean of the wave's square on the grid; one step moves the last bias alone."""
    theta = [
        tm.Tensor(np.zeros(t.shape, np.float32)) for t in tm.nn.init_mlp(np.random.default_rng(0), benchmark.SIZES)
    ]
    waves, (x, y) = sinusoid.test_tasks(3, 4, 5)
    e = benchmark.errors("maml", theta, waves, (x, y), alpha=0.1, steps=[0, 1])
    grid = np.linspace(-5, 5, 100)[:, None]
    truth = waves.amplitude * np.sin(grid - waves.phase)
    np.testing.assert_allclose(e[0], (truth**2).mean((1, 2)), rtol=1e-5)
    bias = 0.1 * 2 * y.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(e[1], ((truth - bias) ** 2).mean((1, 2)), rtol=1e-4)


def test_evaluation_is_what_its_words_say(monkeypatch):
    e = np.zeros((11, 4))
    e[0], e[10] = [1.0, 1.0, 1.0, 1.0], [0.5, 0.25, 3.0, 0.25]
    monkeypatch.setattr(benchmark, "errors", lambda *args, **options: e)
    result = benchmark.evaluate("maml", None, 0.01, tasks=4)[5]
    assert result["mean"][10] == 1.0 and result["median"][10] == 0.375 and result["largest"][10] == 3.0
    assert result["half_width"][10] == pytest.approx(1.96 * e[10].std() / 2) and result["half_width"][0] == 0
    assert result["worse"] == 0.25 and result["tasks"] == 4


def test_a_baseline_takes_the_step_that_is_best_on_validation_tasks(monkeypatch):
    scores = dict(zip(benchmark.ALPHAS, [3.0, 2.0, 1.0, np.nan, np.inf]))
    seeds = []
    monkeypatch.setattr(benchmark, "errors", lambda name, theta, w, s, alpha, **_: np.array([[scores[alpha]]]))
    monkeypatch.setattr(sinusoid, "test_tasks", lambda seed, *args: seeds.append(seed) or (None, None))
    assert benchmark.tuned_alpha("random", None) == 0.01 and seeds == [benchmark.VALIDATION_SEED]
    assert benchmark.VALIDATION_SEED != benchmark.TEST_SEED


@pytest.mark.parametrize("name", [name for name in benchmark.METHODS if name != "random"])
def test_every_algorithm_trains_and_adapts(name):
    """Three iterations move θ, compiled as without, and at test adaptation moves away from it."""
    m = benchmark.METHODS[name]
    (theta, _), (eager, _) = (benchmark.train(name, 3, m.budget[1], seed=0, eager=eager) for eager in (False, True))
    untrained, _ = benchmark.train(name, 0, m.budget[1], seed=0)
    for a, b in zip(theta, eager, strict=True):
        np.testing.assert_allclose(a.data, b.data, rtol=2e-4, atol=2e-5)
    assert any((a.data != b.data).any() for a, b in zip(theta, untrained))
    tasks = sinusoid.test_tasks(benchmark.VALIDATION_SEED, 4, 5)
    e = benchmark.errors(name, theta, *tasks, m.inner.get("alpha") or 0.01, steps=[0, 1, 10])
    assert e.shape == (3, 4) and np.isfinite(e).all() and (e[1] != e[0]).all() and (e[2] != e[1]).any()


def test_learned_step_sizes_are_taken_in_turn_and_the_last_goes_on():
    theta = tm.meta.init_lslr([tm.Tensor(np.ones((1, 1)))], 0.0, 5)
    sizes = tm.Tensor(np.arange(5.0))
    _, _, options = benchmark.METHODS["maml++"].at_test([theta[0], sizes], None, {})
    assert options["alpha"][0].data.tolist() == [0, 1, 2, 3, 4] + [4] * benchmark.TEST_STEPS


def test_the_head_alone_moves_in_anil():
    theta, _ = benchmark.train("anil", 0, 1e-3, seed=0)
    phi = benchmark.adapted("anil", theta, sinusoid.test_tasks(1, 3, 5)[1], 2, 0.01)
    moved = [(p.data != t.data).any() for p, t in zip(phi, theta)]
    assert moved == [False] * 4 + [True] * 2


def test_bad_options_get_one_line_and_status_2(tmp_path):
    for options in (["--iterations", "-1"], ["--methods", "sgd"], ["--full", "--iterations", "3"], ["--clip", "nan"]):
        result = run(tmp_path, *options)
        assert result.returncode == 2 and "error:" in result.stderr.splitlines()[-1]


def test_training_stops_at_the_first_number_that_is_none(monkeypatch):
    monkeypatch.setitem(benchmark.METHODS["maml"].inner, "alpha", 1e20)
    with (
        np.errstate(all="ignore"),
        pytest.raises(FloatingPointError, match="MAML, iteration 0: loss on the query of task 0 is .* step 0"),
    ):
        benchmark.train("maml", 5, 1e-3, 0)


@pytest.mark.parametrize("name", ["maml", "reptile", "imaml", "dropout", "es-maml", "maml++"])
def test_the_task_of_a_number_that_is_none_is_named(name, monkeypatch):
    draw, drawn = sinusoid.training_batch, []

    def planted(*args):
        support, query = draw(*args)
        drawn.append(1)
        support[1][7, 3, 0] = np.nan if len(drawn) == 3 else support[1][7, 3, 0]
        return support, query

    monkeypatch.setattr(sinusoid, "training_batch", planted)
    m = benchmark.METHODS[name]
    with np.errstate(all="ignore"), warnings.catch_warnings(), pytest.raises(FloatingPointError) as stop:
        warnings.simplefilter("ignore")  # of iMAML, on such numbers
        benchmark.train(name, 5, m.budget[1], 0, eager=name != "maml")
    assert str(stop.value).startswith(f"{m.title}, iteration 2: support[1] of task 7 is nan at (7, 3, 0)")


def distances(theta, other):
    return np.sqrt(sum(((a.data - b.data) ** 2).sum() for a, b in zip(theta, other)))


def test_what_clipping_the_meta_gradient_changes():
    """SGD's first step is β times the norm long, in the direction that it has without; a large norm changes nothing."""
    start, plain, clipped, large = (
        benchmark.train("reptile", n, 0.5, 0, clip=clip)[0] for n, clip in ((0, None), (1, None), (1, 0.01), (1, 1e6))
    )
    assert distances(clipped, start) == pytest.approx(0.5 * 0.01, rel=1e-4)
    ratio = distances(clipped, start) / distances(plain, start)
    for s, p, c in zip(start, plain, clipped):
        np.testing.assert_allclose(c.data - s.data, ratio * (p.data - s.data), atol=1e-7)
    assert all((p.data == x.data).all() for p, x in zip(plain, large))


CLIPPABLE = [n for n in benchmark.METHODS if n not in ("maml++", "newton", "es-maml", "fo-es-maml", "random")]


@pytest.mark.parametrize("name", CLIPPABLE)
def test_what_clipping_inner_gradients_changes(name):
    """At test every step of gradient descent is at most α times the norm long; in training a large norm changes nothing."""
    m = benchmark.METHODS[name]
    train = lambda norm: benchmark.train(name, 2, m.budget[1], 0, eager=True, inner_clip=norm)[0]
    plain, clipped, large = map(train, (None, 0.01, 1e6))
    assert all((a.data == b.data).all() for a, b in zip(plain, large))
    assert (distances(plain, clipped) > 0) == (name != "pretrained")  # which has no inner steps
    if m.inner.get("rule", tm.solvers.sgd) is tm.solvers.sgd and name != "meta-sgd":
        theta, support = plain[:6], sinusoid.test_tasks(1, 3, 5)[1]
        phi = benchmark.adapted(name, theta, support, 1, 0.01, inner_clip=0.01)
        moved = np.sqrt(sum(((p.data - t.data) ** 2).reshape(3, -1).sum(1) for p, t in zip(phi, theta)))
        assert (moved <= 0.01 * 0.01 * 1.02).all() and moved.max() > 0.9 * 0.01 * 0.01


@pytest.mark.parametrize("option", ["--clip", "--inner-clip"])
@pytest.mark.parametrize("norm", ["3.5e38", "1e300", "inf", "nan", "0", "-1", "x"])
def test_a_norm_that_float32_does_not_hold_is_refused(option, norm, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main([f"{option}={norm}"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert f"argument {option}: must be a positive number, 3.4e+38 at most, got {norm}" in err


def test_the_largest_norm_clips_nothing():
    plain, clipped = (benchmark.train("maml", 2, 1e-3, 0, True, *[norm] * 2)[0] for norm in (None, report.LARGEST))
    assert all((a.data == b.data).all() for a, b in zip(plain, clipped))


@pytest.mark.parametrize("name", ["maml++", "newton", "es-maml", "fo-es-maml"])
def test_methods_without_an_inner_update_rule_refuse_to_clip_there(name, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--methods", name, "--inner-clip", "1", "--iterations", "1"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "takes no update rule in its inner loop" in err


def test_shares_of_tasks_and_clips_are_in_the_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.report, "pyplot", lambda: None)
    monkeypatch.setattr(benchmark, "evaluate", lambda *args, **options: {"inner_clip": options["inner_clip"]})
    monkeypatch.setattr(benchmark, "table", lambda results: "")
    options = ["--methods", "imaml", "maml", "--iterations", "20", "--clip", "0.5", "--inner-clip", "10"]
    benchmark.main([*options, "--json", str(tmp_path / "s.json")])
    assert "negative curvature in " in (err := capsys.readouterr().err) and "unconverged in " in err
    record = json.loads((tmp_path / "s.json").read_text())
    shares = record["figures"]["imaml"]["negative_curvature"], record["figures"]["imaml"]["unconverged"]
    assert all(0 <= x < 0.5 for x in shares) and "unconverged" not in record["figures"]["maml"]
    assert record["figures"]["maml"] == {"inner_clip": 10}  # at test too
    assert record["settings"]["maml"]["clip"] == 0.5 and record["settings"]["maml"]["inner_clip"] == 10
    assert record["settings"]["imaml"]["rule"] == "clipped(norm=10.0, rule=nesterov)"


def test_a_method_that_stops_does_not_take_the_others_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.METHODS["maml"].inner, "alpha", 1e20)
    options = ["--methods", "maml", "random", "--iterations", "2", "--out", str(tmp_path)]
    with np.errstate(all="ignore"), pytest.raises(SystemExit) as end:
        benchmark.main(options)
    out, err = capsys.readouterr()
    assert (
        end.value.code == 1 and "stopped: MAML, iteration 0" in err and "random weights" in out and "  MAML" not in out
    )


def test_a_method_that_is_named_twice_is_trained_once(tmp_path, monkeypatch, capsys):
    trained, train = [], benchmark.train
    monkeypatch.setattr(benchmark, "train", lambda name, *args: trained.append(name) or train(name, *args))
    monkeypatch.setattr(benchmark.report, "pyplot", lambda: None)
    benchmark.main(["--methods", "random", "maml", "random", "--iterations", "1", "--out", str(tmp_path)])
    assert trained == ["random", "maml"]  # and the status was 0
    assert capsys.readouterr().out.count("random weights") == len(benchmark.TEST_SHOTS)


def test_schedules():
    """At the first, the middle and the last iteration."""
    adam, sgd = benchmark.METHODS["maml"].outer, benchmark.METHODS["reptile"].outer
    assert [benchmark.schedule(adam, t) for t in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [benchmark.schedule(sgd, t) for t in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


def test_progress_in_plain_lines(capsys):
    assert list(report.progress("name", 30, lambda: "loss 1")) == list(range(30))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[0].startswith("name  3/30  loss 1") and lines[-1].endswith("0 s left")
