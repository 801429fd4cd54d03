"""The benchmark as a command: tiny networks on generated characters; kills, interrupts and damaged files are real."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tinymeta as tm
from benchmarks import checkpoint
from benchmarks import omniglot as benchmark
from benchmarks.omniglot_protocols import choose
from tinymeta.tasks import episodes, glyphs

ROOT = Path(__file__).parents[1]
TINY = ["--glyphs", "--filters", "4", "--tasks", "2", "--test-tasks", "20", "--iterations"]
TRAINING = """
import benchmarks.omniglot as b
for preset in b.PRESETS["small"].values():
    preset["validation_tasks"] = 5
b.main()
"""
characters = functools.cache(glyphs.load)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(glyphs, "load", characters)
    monkeypatch.setattr(benchmark.report, "pyplot", lambda: None)
    for preset in benchmark.PRESETS["small"].values():
        monkeypatch.setitem(preset, "validation_tasks", 5)
    monkeypatch.setitem(benchmark.PRESETS["small"]["reptile"], "test_steps", 12)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*options):
    """The status of the command in this process."""
    try:
        benchmark.main([*map(str, options)])
    except SystemExit as end:
        return end.code
    return 0


def refused(capsys, *options):
    """The one line with which the command refuses."""
    capsys.readouterr()
    assert run(*options) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "error: " in err, err
    return err


def small(**changes):
    return choose("glyphs", **dict(filters=4, tasks=2, iterations=1) | changes)


# ---- the whole command -----------------------------------------------------------------------------------------------


def test_the_same_command_gives_the_same_figures_and_bytes(tmp_path):
    outputs = []
    for name in "ab":
        out = tmp_path / name
        options = ["--out", out, "--json", out / "r.json", "--checkpoint", out / "c.npz"]
        command = [sys.executable, "-W", "error", "-m", "benchmarks.omniglot", *TINY, "2", *options]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert result.returncode == 0, result.stderr
        assert "MAML  2/2  loss " in result.stderr and "0 s left" in result.stderr
        outputs.append([line for line in result.stdout.splitlines() if not line.startswith(("pictures", "times"))])
    score = outputs[0][0]
    assert score.startswith("MAML, 5-way 1-shot, glyphs, transductive: acc@3 = ") and "n = 20 test tasks" in score
    assert outputs[0][1] == "published, on Omniglot: 98.7 ± 0.4 %  (Finn et al. 2017, Table 1)"
    assert outputs[0] == outputs[1]
    first, second = (json.loads((tmp_path / name / "r.json").read_text()) for name in "ab")
    assert first["figures"] == second["figures"] and first["settings"] == second["settings"]
    assert [len(first["figures"][name]["mean"]) for name in ("trained", "untrained")] == [11, 11]
    assert first["settings"]["alpha"] == 0.4 and first["figures"]["data"] == "glyphs"
    assert (tmp_path / "a/c.npz").read_bytes() == (tmp_path / "b/c.npz").read_bytes()
    pictures = {p.name for p in (tmp_path / "a").glob("*.png")}
    if pytest.importorskip("matplotlib"):
        assert pictures == {f"glyphs_5way_1shot_maml_{what}.png" for what in ("curve", "steps", "task")}


@pytest.mark.parametrize("method", benchmark.TITLES)
def test_every_method_trains_resumes_and_is_evaluated(method, folder, capsys):
    assert run(*TINY, 2, "--method", method) == 0
    shown = capsys.readouterr().out
    saved = (folder / f"out/glyphs_5way_1shot_{method}.npz").read_bytes()
    assert run(*TINY, 2, "--method", method, "--resume") == 0
    assert capsys.readouterr().out.splitlines()[:6] == shown.splitlines()[:6]
    assert (folder / f"out/glyphs_5way_1shot_{method}.npz").read_bytes() == saved
    assert run("--evaluate", f"out/glyphs_5way_1shot_{method}.npz", "--test-tasks", 20) == 0
    assert capsys.readouterr().out.splitlines()[:6] == shown.splitlines()[:6]
    assert ("negative curvature" in shown) == (method == "imaml")


def test_compiled_and_eager_training_end_with_the_same_bytes(folder, capsys):
    for name, *options in (("compiled",), ("eager", "--eager")):
        assert run(*TINY, 2, "--method", "imaml", "--shards", 1, "--checkpoint", f"{name}.npz", *options) == 0
    assert (folder / "compiled.npz").read_bytes() == (folder / "eager.npz").read_bytes()
    first, second = (benchmark.restore(folder / "compiled.npz")[0] for _ in range(2))
    assert first == second and first.shards == 1


def test_the_dense_network_trains_and_has_its_own_published_figure(folder, capsys):
    assert run("--glyphs", "--network", "dense", *TINY[3:], 1) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("MAML (dense), 5-way 1-shot, glyphs") and "published, on Omniglot: 89.7 ± 1.1 %" in shown
    theta = benchmark.restore(folder / "out/glyphs_5way_1shot_maml_dense.npz")[1].theta
    assert [t.shape for t in theta[::3]] == [(784, 256), (256, 128), (128, 64), (64, 64), (64, 5)]


def test_not_transductive_is_said_and_compared_with_its_own_published_figure(folder, capsys):
    assert run(*TINY, 1, "--method", "reptile", "--not-transductive") == 0
    shown = capsys.readouterr().out
    assert "glyphs, not transductive: acc@12 = " in shown and "published, on Omniglot: 95.39 ± 0.09 %" in shown
    assert run("--evaluate", "out/glyphs_5way_1shot_reptile.npz", "--test-tasks", 20) == 0
    assert "glyphs, transductive: acc@12 = " in capsys.readouterr().out


def test_without_omniglot_glyphs_are_taken_and_that_is_said(folder, monkeypatch, capsys):
    monkeypatch.delenv("TINYMETA_DATA", raising=False)
    monkeypatch.setattr(benchmark.omniglot, "cache_directory", lambda: None)
    assert run(*TINY[1:], 1) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("data: glyphs, drawn by a program") and "--download" in shown[0] and "--data" in shown[0]
    assert ", glyphs, " in shown[1]


@pytest.mark.skipif("TINYMETA_DATA" not in os.environ, reason="needs the real images: set TINYMETA_DATA")
def test_on_the_real_images(folder, capsys):
    pytest.importorskip("PIL")
    assert run(*TINY[1:], 1) == 0
    assert "5-way 1-shot, omniglot, transductive" in capsys.readouterr().out
    assert "data omniglot, not glyphs" in refused(capsys, "--evaluate", "out/omniglot_5way_1shot_maml.npz", "--glyphs")


def test_what_is_downloaded_is_used(folder, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(benchmark.omniglot, "download", lambda path, progress: calls.append(path) or path)
    monkeypatch.setattr(benchmark.omniglot, "find", lambda path: path)
    monkeypatch.setattr(benchmark.omniglot, "load", lambda path: characters()._replace(name="omniglot"))
    assert run(*TINY[1:], 1, "--download", "--data", "images") == 0
    assert calls == [Path("images")] and ", omniglot, transductive" in capsys.readouterr().out

    def broken(path, progress):
        raise ConnectionError("could not fetch\nall of it")

    monkeypatch.setattr(benchmark.omniglot, "download", broken)
    assert "could not fetch all of it" in refused(capsys, "--download")


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ways", "-3"], "argument --ways: must be a whole number, 2 or more, got -3"),
        (["--shots", "0"], "1 or more, got 0"),
        (["--iterations", "1e3"], "got 1e3"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--method", "sgd"], "invalid choice: 'sgd'"),
        (["--network", "dense", "--filters", "8"], "filters are of the conv network"),
        (["--preset", "large"], "invalid choice: 'large'"),
        (["--ways", "31"], "31 ways, but these glyphs characters are only 30"),
        (["--shots", "16", "--queries", "5"], "16 shots + 5 queries = 21 drawings"),
        (["--shots", "11", "--queries", "1"], "11 shots + 11 queries = 22 drawings"),
        (["--evaluate", "nowhere.npz"], "nowhere.npz"),
        (["--evaluate", "file", "--preset", "long"], "--evaluate trains nothing"),
        (["--download"], "--download fetches the real images"),
        (["--json", "."], "is a directory"),
        (["--checkpoint", "file/c.npz"], "file"),
        (["--out", "file"], "file"),
    ],
)
def test_bad_options_get_one_line_and_status_2(options, said, folder, capsys):
    (folder / "file").write_text("kept")
    assert said in refused(capsys, "--glyphs", *options)
    assert (folder / "file").read_text() == "kept" and not list(folder.glob("**/*.npz"))


def test_wrong_folders_and_truncated_zips_get_one_line_and_status_2(folder, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.omniglot, "cache_directory", lambda: None)
    (folder / "data").mkdir()
    assert "no Omniglot images in data" in refused(capsys, "--data", "data")
    for half in ("background", "evaluation"):
        (folder / f"data/images_{half}.zip").write_bytes(b"PK\x03\x04 and no more")
    pytest.importorskip("PIL")
    assert "is not a sound zip file" in refused(capsys, "--data", "data")
    monkeypatch.setenv("TINYMETA_DATA", str(folder / "elsewhere"))
    assert "$TINYMETA_DATA" in refused(capsys)


def test_checkpoints_of_something_else_are_refused_and_kept(folder, capsys):
    path = folder / "c.npz"
    command = [*TINY, 2, "--checkpoint", path]
    assert run(*command) == 0
    saved = path.read_bytes()
    assert "--resume goes on with it" in refused(capsys, *command)
    for options, said in (
        (["--method", "fomaml"], "method maml, not fomaml"),
        (["--ways", 3], "ways 5, not 3"),
        (["--shots", 2], "shots 1, not 2"),
        (["--filters", 8], "filters 4, not 8"),
        (["--seed", 1], "seed 0, not 1"),
    ):
        assert said in refused(capsys, *command, *options, "--resume")
        assert said in refused(capsys, "--evaluate", path, *options)
    middle = len(saved) // 2
    flipped = saved[:middle] + bytes([saved[middle] ^ 1]) + saved[middle + 1 :]
    np.savez("foreign.npz", x=np.zeros(3))
    checkpoint.save(folder / "other.npz", {"benchmark": "another", "theta": []})
    foreign = [(folder / name).read_bytes() for name in ("foreign.npz", "other.npz")]
    for content in (saved[:-100], saved[:50], b"", b"text", flipped, *foreign):
        path.write_bytes(content)
        refused(capsys, *command)
        refused(capsys, *command, "--resume")
        refused(capsys, "--evaluate", path)
        assert path.read_bytes() == content


def test_any_change_of_a_checkpoint_is_noticed_or_harmless(tmp_path):
    state = {"n": 3, "x": 0.1 + 0.2, "none": None, "a": np.arange(5.0), "list": [tm.Tensor(np.eye(2, dtype="f4")), []]}
    path = tmp_path / "c.npz"
    checkpoint.save(path, state)
    saved, read = path.read_bytes(), checkpoint.load(path)
    assert (read["n"], read["x"], read["none"], read["list"][1]) == (3, 0.1 + 0.2, None, [])
    assert isinstance(read["list"][0], tm.Tensor) and read["list"][0].dtype == np.float32
    np.testing.assert_array_equal(read["a"], state["a"])
    noticed = 0
    for i in range(0, len(saved), 7):
        path.write_bytes(saved[:i] + bytes([saved[i] ^ 16]) + saved[i + 1 :])
        try:
            changed = checkpoint.load(path)
        except ValueError:
            noticed += 1
        else:  # a date or an attribute in the zip's directory
            assert changed["x"] == state["x"] and (changed["a"] == state["a"]).all()
    assert noticed > 0.6 * len(range(0, len(saved), 7))
    with pytest.raises(TypeError, match="a checkpoint holds"):
        checkpoint.save(path, {"set": {1}})


def test_what_cannot_be_saved_is_said_before_training(folder, monkeypatch, capsys):
    def full(path, state):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save", full)
    assert "No space left" in refused(capsys, *TINY, 2) and "saved in" not in capsys.readouterr().err


def test_the_record_never_replaces_the_checkpoint(folder, capsys):
    assert "would overwrite the checkpoint" in refused(capsys, *TINY, 1, "--checkpoint", "c.npz", "--json", "./c.npz")
    assert run(*TINY, 1, "--checkpoint", "c.npz") == 0
    saved = (folder / "c.npz").read_bytes()
    assert "would overwrite the checkpoint" in refused(capsys, "--evaluate", "c.npz", "--json", "c.npz")
    assert (folder / "c.npz").read_bytes() == saved


def test_an_unfinished_training_is_evaluated_as_what_it_is(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "VALIDATIONS", 10)
        validations = []

        def interrupted(*args, evaluate=benchmark.evaluate, **keywords):
            validations.append(1)
            if len(validations) == 3:
                raise KeyboardInterrupt
            return evaluate(*args, **keywords)

        patch.setattr(benchmark, "evaluate", interrupted)
        assert run(*TINY, 40, "--method", "imaml", "--checkpoint", "c.npz") == 130
    assert "iteration 11 is saved in c.npz" in capsys.readouterr().err
    assert run("--evaluate", "c.npz", "--test-tasks", 20, "--json", "r.json") == 0
    assert "unfinished: after 11 of 40 iterations" in capsys.readouterr().out
    figures = json.loads((folder / "r.json").read_text())["figures"]
    assert figures["iterations"] == len(figures["loss"]) == 11 and min(figures["loss"]) > 0.1


def test_output_that_is_not_utf8_loses_letters_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "benchmarks.omniglot", *TINY, "1", "--out", str(tmp_path)]
    options = dict(capture_output=True, cwd=ROOT, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    result = subprocess.run(command, **options)
    assert result.returncode == 0 and b"acc@3 = " in result.stdout, result.stderr


def test_training_stops_at_the_first_number_that_is_none_and_keeps_what_was_good(folder, monkeypatch, capsys):
    assert run(*TINY, 3, "--checkpoint", "c.npz") == 0
    advance, calls = benchmark.advance, []

    def diverges(s, run, *rest):
        calls.append(run.iteration)
        s = benchmark.dataclasses.replace(s, beta=np.inf) if run.iteration == 2 else s
        return advance(s, run, *rest)

    monkeypatch.setattr(benchmark, "advance", diverges)
    with np.errstate(all="ignore"):
        assert run(*TINY, 3, "--checkpoint", "d.npz") == 1
    assert "MAML, iteration 2: the loss is" in capsys.readouterr().err.splitlines()[-1]
    kept = benchmark.restore(folder / "d.npz")[1]
    assert kept.iteration == 2 and all(np.isfinite(t.data).all() for t in kept.theta)
    monkeypatch.setattr(benchmark, "advance", advance)
    assert run(*TINY, 3, "--checkpoint", "d.npz", "--resume") == 0
    assert (folder / "c.npz").read_bytes() == (folder / "d.npz").read_bytes()


# ---- kills and interrupts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", benchmark.TITLES)
def test_an_interrupted_training_ends_with_the_same_bytes(method, folder, monkeypatch, capsys):
    """The interrupt comes inside of steps, validations and updates."""
    command = [*TINY, 4, "--method", method]
    assert run(*command, "--checkpoint", "whole.npz") == 0
    for owner, name, when in (
        (episodes, "draw_episodes", 3),
        (benchmark, "evaluate", 2),
        (tm.program.Plan, "__call__", 2),
    ):
        function, calls = getattr(owner, name), []

        def interrupted(*args, function=function, calls=calls, when=when, **keywords):
            calls.append(1)
            if len(calls) == when:
                raise KeyboardInterrupt
            return function(*args, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            assert run(*command, "--checkpoint", "parts.npz", "--resume") == 130
        assert "saved in parts.npz, the same command with --resume goes on" in capsys.readouterr().err
    assert run(*command, "--checkpoint", "parts.npz", "--resume") == 0
    assert (folder / "whole.npz").read_bytes() == (folder / "parts.npz").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_at_any_moment_a_training_resumes_to_the_same_bytes(tmp_path):
    command = [sys.executable, "-c", TRAINING, *TINY, "60", "--save-every", "0", "--resume", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(name):
        path = tmp_path / name
        interruptible = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # even if started in the background
        options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible)
        return path, subprocess.Popen([*command, "--checkpoint", path], env=environment, cwd=ROOT, **options)

    whole, process = start("whole.npz")
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    rng, reached = random.Random(0), []
    for end in [signal.SIGINT, *[signal.SIGKILL] * 3]:
        path, process = start("parts.npz")
        before = path.stat().st_mtime_ns if path.exists() else None
        deadline = time.monotonic() + 60
        while not path.exists() or path.stat().st_mtime_ns == before:  # until the first checkpoint of this process
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(end)
        _, said = process.communicate()
        assert process.returncode == (130 if end == signal.SIGINT else -9), said
        assert end == signal.SIGKILL or f"saved in {path}" in said.splitlines()[-1] and "Traceback" not in said
        reached.append(benchmark.restore(path)[1].iteration)  # sound, whatever the moment
    assert reached == sorted(reached) and 0 < reached[0] and reached[-1] < 60, reached
    _, process = start("parts.npz")
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    assert path.read_bytes() == whole.read_bytes()


# ---- evaluation ------------------------------------------------------------------------------------------------------


def network(s):
    return benchmark.begin(s).theta


@pytest.mark.parametrize("flatten", [False, True])
def test_not_transductive_one_query_is_judged_alone_as_among_others(flatten):
    s = small(shots=2, test_queries=3, flatten=flatten)
    support, (images, _) = episodes.test_episodes(0, characters(), 0, 4, s.ways, s.shots, s.test_queries)
    phis = {}
    benchmark.adapt(s, network(s), support, 2, phis.__setitem__)
    together = benchmark.predict(s, phis[2], support, images, transductive=False).data
    assert together.shape == (4, 15, 5)
    for i in (0, 7, 14):
        alone = benchmark.predict(s, phis[2], support, images[:, i : i + 1], transductive=False).data
        np.testing.assert_allclose(alone[:, 0], together[:, i], atol=1e-6)
    one = np.concatenate([support[0][1:2], images[1:2, 7:8]], axis=1)  # the definition, for a task and a query
    plain = tm.nn.convnet([p[1:2] for p in phis[2]], one, flatten=flatten).data[0, -1]
    np.testing.assert_allclose(plain, together[1, 7], atol=1e-6)
    among = benchmark.predict(s, phis[2], support, images).data
    assert np.abs(among - benchmark.predict(s, phis[2], support, images[:, :7]).data[:, [0]]).max() > 1e-3


@pytest.mark.parametrize("transductive", [True, False])
def test_before_adaptation_one_of_n_is_right(transductive):
    s = small(ways=4)
    accuracy = benchmark.evaluate(s, network(s), characters(), 1, 600, [0], transductive)[0]
    assert abs(accuracy.mean() - 1 / 4) <= 4 * accuracy.std() / np.sqrt(600)


def test_evaluation_does_not_depend_on_batches_nor_on_the_number_of_tasks(monkeypatch):
    s = small(test_queries=2)
    whole = benchmark.evaluate(s, network(s), characters(), 1, 40, range(4))
    assert whole.shape == (4, 40)
    np.testing.assert_array_equal(benchmark.evaluate(s, network(s), characters(), 1, 13, [3])[0], whole[3, :13])
    monkeypatch.setattr(benchmark, "IMAGES", 45)
    np.testing.assert_array_equal(benchmark.evaluate(s, network(s), characters(), 1, 40, range(4)), whole)


def test_adaptation_at_test_is_that_of_training():
    for method in benchmark.TITLES:
        s = small(method=method)
        support, _ = episodes.test_episodes(0, characters(), 0, 3, 5, 1, 1)
        theta, phis = network(s), {}
        benchmark.adapt(s, theta, support, s.steps, phis.__setitem__)
        loss = benchmark.loss_of(s)
        objective = tm.meta.proximal(loss, theta, 2.0) if method == "imaml" else loss
        rule = functools.partial(tm.solvers.adam, beta1=0.0) if method == "reptile" else tm.solvers.sgd
        expected = tm.meta.adapt(objective, theta, support, alpha=s.alpha, steps=s.steps, rule=rule)
        assert sorted(phis) == list(range(s.steps + 1))
        for phi, other, start in zip(phis[s.steps], expected, theta):
            np.testing.assert_array_equal(phi.data, other.data)
            np.testing.assert_array_equal(phis[0][0].data[1], theta[0].data)
            assert phi.shape == (3, *start.shape)


def test_minibatches_go_round_the_support():
    labels = np.tile(np.arange(5), 3)[None]
    images = np.arange(15)[None]
    seen = [benchmark.minibatch(10, (images, labels), step) for step in range(3)]
    assert np.concatenate([x[0] for x, _ in seen]).tolist() == [*range(15), *range(15)]
    assert all((np.bincount(y[0]) == 2).all() for _, y in seen)  # balanced


def test_schedules():
    """At the first, the middle and the last iteration."""
    for decay, expected in (("cosine", [2, 1, 0]), ("linear", [2, 1, 0]), ("none", [2, 2, 2])):
        s = small(beta=2.0, decay=decay)
        assert [benchmark.outer_step(s, t) for t in (0, 0.5, 1)] == pytest.approx(expected)


def test_the_papers_settings():
    chosen = functools.partial(choose, "omniglot", preset="papers")
    for ways, tasks, steps in ((5, 32, 1), (20, 16, 5)):
        s = chosen("maml", ways=ways)
        assert (s.alpha, s.tasks, s.steps, s.iterations, s.queries) == (2.0, tasks, steps, 60_000, 1)
    for ways, alpha, batch, steps in ((5, 1e-3, 10, 5), (20, 5e-4, 20, 10)):
        s = chosen("reptile", ways=ways)
        assert (s.alpha, s.batch, s.steps, s.training_shots, s.test_steps) == (alpha, batch, steps, 10, 50)
    assert chosen("reptile", ways=20).iterations == 200_000
    s = chosen("imaml", ways=20)
    assert (s.lam, s.cg_steps, s.steps, s.test_steps, s.tasks) == (2.0, 5, 25, 25, 32)
