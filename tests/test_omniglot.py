"""The benchmark as a command: tiny networks on generated characters; kills, interrupts and damaged files are real."""

import functools
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tinymeta as tm
from benchmarks import characters as sheets
from benchmarks import checkpoint, omniglot_pictures, report
from benchmarks import omniglot as benchmark
from benchmarks.omniglot_methods import BLOCKS, METHODS, minibatch, newton
from benchmarks.omniglot_protocols import PRESETS, TITLES, choose, published
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
    for preset in PRESETS["small"].values():
        monkeypatch.setitem(preset, "validation_tasks", 5)
    monkeypatch.setitem(PRESETS["small"]["reptile"], "test_steps", 12)
    monkeypatch.setitem(PRESETS["small"]["leap"], "test_steps", 12)


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


def adapted(s, theta, support, steps):
    """φ after 0, .., steps steps, as at test."""
    return list(METHODS[s.method].at_test(s, benchmark.loss_of(s), theta, support, steps))


# ---- the whole command -----------------------------------------------------------------------------------------------


def test_the_same_command_gives_the_same_figures_and_bytes(tmp_path):
    outputs = []
    for name in "ab":
        out = tmp_path / name
        options = ["--out", out, "--json", out / "r.json", "--checkpoint", out / "c.npz"]
        warnings = ["-W", "error", "-W", "ignore:compile:RuntimeWarning"]  # of shards, where threadpoolctl is missing
        command = [sys.executable, *warnings, "-m", "benchmarks.omniglot", *TINY, "2", *options]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert result.returncode == 0, result.stderr
        assert "MAML  2/2  query loss in training " in result.stderr and "0 s left" in result.stderr
        assert re.search(r", accuracy on validation tasks \d+\.\d%,?  ", result.stderr)
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


@pytest.mark.parametrize("method", TITLES)
def test_every_method_trains_resumes_and_is_evaluated(method, folder, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CURVE", 1)
    assert run(*TINY, 2, "--method", method) == 0
    shown = capsys.readouterr().out
    saved = (folder / f"out/glyphs_5way_1shot_{method}.npz").read_bytes()
    assert run(*TINY, 2, "--method", method, "--resume") == 0
    assert capsys.readouterr().out.splitlines()[:6] == shown.splitlines()[:6]
    assert (folder / f"out/glyphs_5way_1shot_{method}.npz").read_bytes() == saved
    assert run("--evaluate", f"out/glyphs_5way_1shot_{method}.npz", "--test-tasks", 20) == 0
    assert capsys.readouterr().out.splitlines()[:6] == shown.splitlines()[:6]
    assert ("negative curvature" in shown) == (method in ("imaml", "newton", "shrinkage"))
    assert run("--evaluate", f"out/glyphs_5way_1shot_{method}.npz", "--test-tasks", 20, "--not-transductive") == 0
    assert "glyphs, not transductive: acc@" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ways", "101"], "101 ways, but these omniglot characters are only 100"),
        (["--shots", "16", "--queries", "5"], "16 shots + 5 queries = 21 drawings"),
    ],
)
def test_what_omniglot_cannot_give_is_refused_before_it_is_downloaded(options, said, folder, monkeypatch, capsys):
    def download(*args):
        raise ConnectionError("was asked for")

    monkeypatch.setattr(benchmark.omniglot, "download", download)
    assert said in refused(capsys, "--download", *options)
    assert "was asked for" in refused(capsys, "--download", "--ways", 100)  # as many as there are for validation


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ways", "-3"], "argument --ways: must be a whole number, 2 or more, got -3"),
        (["--shots", "0"], "1 or more, got 0"),
        (["--filters", "1" + 20 * "0"], "argument --filters: must have 9 digits at most, got 1000"),
        (["--tasks", "999999999"], "999999999 tasks of 30 drawings are more than all 26000 that there are to train on"),
        (["--tasks", "867"], "lower --tasks, to 866 at most"),
        (["--clip", "1e300"], "must be a positive number, 3.4e+38 at most, got 1e300"),
        (["--iterations", "1e3"], "got 1e3"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--method", "sgd"], "invalid choice: 'sgd'"),
        (["--network", "dense", "--filters", "8"], "filters are of the conv network"),
        (["--preset", "large"], "invalid choice: 'large'"),
        (["--preset", "papers", "--method", "leap"], "Leap's published settings are not all known"),
        (["--ways", "31"], "31 ways, but these glyphs characters are only 30"),
        (["--shots", "16", "--queries", "5"], "16 shots + 5 queries = 21 drawings"),
        (["--shots", "11", "--queries", "1"], "11 shots + 11 queries = 22 drawings"),
        (["--evaluate", "nowhere.npz"], "nowhere.npz"),
        (["--evaluate", "file", "--preset", "long"], "--evaluate trains nothing"),
        (["--download"], "--download fetches the real images"),
        (["--json", "."], ". is not a file, but a directory, a pipe or a device"),
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


def test_a_training_without_enough_memory_does_not_promise_to_go_on_with_the_same(folder, monkeypatch, capsys):
    def large(*args):
        raise MemoryError("Unable to allocate 3 TiB")

    monkeypatch.setattr(benchmark, "advance", large)
    assert run(*TINY, 1) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "stopped: Unable to allocate 3 TiB; iteration 0 is saved in" in err
    assert "goes on from there where there is more memory; --checkpoint names a place for another training" in err


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


@pytest.mark.parametrize("name", ["array0", "array1", "tree"])
def test_a_checkpoint_with_one_part_exchanged_is_refused(name, tmp_path):
    """Where the zip itself is sound, so that only the SHA-256 can tell."""
    path = tmp_path / "c.npz"
    checkpoint.save(path, {"n": 1, "a": np.zeros(3), "b": tm.Tensor(np.zeros(3))})
    with np.load(path) as file:
        content = dict(file)
    np.savez(path, **content)
    assert checkpoint.load(path)["n"] == 1
    content[name] = np.array(content[name].item().replace('"n": 1', '"n": 2')) if name == "tree" else np.ones(3)
    np.savez(path, **content)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(path)


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        checkpoint.save(tmp_path / "c.npz", {"n": 1})
    with pytest.raises(ValueError, match="format"):
        checkpoint.load(tmp_path / "c.npz")


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(name, tmp_path, monkeypatch):
    path = tmp_path / "c.npz"
    checkpoint.save(path, {"n": 1})
    before = path.read_bytes()

    def full(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(OSError, match="no space left"):
            checkpoint.save(path, {"n": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["c.npz"] and path.read_bytes() == before


def test_what_a_killed_process_left_is_removed_and_what_another_one_writes_is_not(tmp_path):
    path, old, new = tmp_path / "c[1].npz", 32 * "0", 31 * "0" + "1"
    others = [f"c1.npz.{old}.part", "c[1].npz.part", f"c[1].npzz.{old}.part", "c[1].npz.mine.part"]
    for name, age in [(f"c[1].npz.{old}.part", 90), (f"c[1].npz.{new}.part", 10), *[(name, 90) for name in others]]:
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, times=2 * (time.time() - age,))
    checkpoint.save(path, {"n": 1})
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f"c[1].npz.{new}.part", *others}
    assert checkpoint.load(path) == {"n": 1}


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_to_a_checkpoint_stays_a_link(folder, capsys):
    (folder / "disk").mkdir()
    (folder / "c.npz").symlink_to("disk/target.npz")  # which is not there yet
    for options in ([], ["--resume"]):
        assert run(*TINY, 1, "--checkpoint", "c.npz", *options) == 0
        assert (folder / "c.npz").is_symlink() and not (folder / "disk/target.npz").is_symlink()
        assert benchmark.restore(folder / "disk/target.npz")[1].iteration == 1
    assert {file.name for file in (folder / "disk").iterdir()} == {"target.npz"}


def test_training_stops_at_the_first_number_that_is_none_and_keeps_what_was_good(folder, monkeypatch, capsys):
    assert run(*TINY, 3, "--checkpoint", "c.npz") == 0
    advance, calls = benchmark.advance, []

    def diverges(s, run, *rest):
        calls.append(run.iteration)
        if run.iteration == 2:  # a long step of Adam, which has forgotten how large gradients are
            t, m, v = run.outer
            run = benchmark.dataclasses.replace(run, outer=(t, m, [0 * v_i for v_i in v]))
            s = benchmark.dataclasses.replace(s, beta=3e38, decay="none")
        return advance(s, run, *rest)

    monkeypatch.setattr(benchmark, "advance", diverges)
    for resume in ((), ("--resume",)):  # which stops where it stopped before
        with np.errstate(all="ignore"):
            assert run(*TINY, 3, "--checkpoint", "d.npz", *resume) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert "MAML, iteration 2: theta[0] of shape (3, 3, 1, 4) holds " in line and "after the outer update" in line
        assert line.count("iteration 2 is saved in d.npz, the same command with --resume would stop at the same") == 1
    assert calls == [0, 1, 2, 2]
    kept = benchmark.restore(folder / "d.npz")[1]
    assert kept.iteration == 2 and all(np.isfinite(t.data).all() for t in kept.theta)
    monkeypatch.setattr(benchmark, "advance", advance)
    assert run(*TINY, 3, "--checkpoint", "d.npz", "--resume") == 0
    assert (folder / "c.npz").read_bytes() == (folder / "d.npz").read_bytes()


def test_a_task_that_is_not_finite_is_named_and_what_was_good_is_kept(folder, monkeypatch, capsys):
    """NaN in one image of one task of iteration 1, for every method; the run before it is saved."""
    draw = episodes.draw_episodes

    def planted(rng, *args):
        (images, labels), query = draw(rng, *args)
        drawn.append(1)
        if len(drawn) == 2:
            images[1, 3, 0, 0, 0] = np.nan
        return (images, labels), query

    monkeypatch.setattr(episodes, "draw_episodes", planted)
    for method in TITLES:
        drawn = []
        s = small(method=method, iterations=3)
        run_, kept = benchmark.begin(s), []
        with np.errstate(all="ignore"), warnings.catch_warnings(), pytest.raises(FloatingPointError) as stop:
            warnings.simplefilter("ignore")  # of iMAML, on such numbers
            benchmark.train(s, run_, benchmark.roles(s, characters()), kept.append, 1e9, benchmark.Clock(list), True)
        assert str(stop.value).startswith(f"{TITLES[method]}, iteration 1: support[0] of task 1 is nan at (1, 3, 0, 0,")
        assert kept[-1].iteration == 1 and all(np.isfinite(t.data).all() for t in kept[-1].theta)


def advanced(**changes):
    s = small(**changes)
    return benchmark.advance(s, benchmark.begin(s), benchmark.roles(s, characters()), benchmark.Clock(list), True).theta


def lengths(theta, phi):
    return np.sqrt(sum(((p.data - t.data) ** 2).reshape(-1, t.size).sum(axis=1) for p, t in zip(phi, theta)))


def test_what_clipping_the_meta_gradient_changes():
    s = small(method="leap")
    plain, clipped, large = (advanced(method="leap", clip=clip) for clip in (None, 1e-3, 1e6))
    np.testing.assert_allclose(lengths(benchmark.initial(s), clipped), s.beta * 1e-3, rtol=1e-3)
    assert lengths(benchmark.initial(s), plain) > s.beta * 0.1
    assert all((p.data == x.data).all() for p, x in zip(plain, large))


@pytest.mark.parametrize("method", [m for m in TITLES if m not in ("maml++", "newton")])
def test_what_clipping_inner_gradients_changes(method):
    """At test, every step of gradient descent is α times the norm long; a norm that no gradient has changes nothing."""
    norm = 1e-4 if method == "anil" else 1e-3  # the gradient of the head alone is small
    plain, clipped, large = (advanced(method=method, inner_clip=clip) for clip in (None, norm, 1e6))
    assert all((p.data == x.data).all() for p, x in zip(plain, large)) and lengths(plain, clipped) > 0
    s = small(method=method, inner_clip=norm)
    theta, parts = benchmark.initial(s), benchmark.roles(s, characters())
    support, _ = episodes.test_episodes(1, parts["test"], 0, 2, s.ways, s.shots, s.test_queries)
    if method not in ("reptile", "meta-sgd"):  # Adam's steps, or steps of learned sizes, have other lengths
        first, second = adapted(s, theta, support, 1)
        np.testing.assert_allclose(lengths(theta, second), s.alpha * norm, rtol=1e-2)


@pytest.mark.parametrize("method", ["maml++", "newton"])
def test_inner_clipping_is_refused_where_there_is_no_update_rule(method, folder, capsys):
    line = refused(capsys, *TINY, 1, "--method", method, "--inner-clip", 1)
    assert f"{TITLES[method]} takes no update rule in its inner loop" in line


def test_clips_are_settings_of_a_training_and_of_its_resume(folder, capsys):
    for bad in ("0", "-1", "nan", "x"):
        assert f"at most, got {bad}" in refused(capsys, *TINY, 1, f"--clip={bad}")
    assert run(*TINY, 1, "--clip", "0.5", "--inner-clip", "2", "--checkpoint", "c.npz") == 0
    s, _ = benchmark.restore(folder / "c.npz")
    assert (s.clip, s.inner_clip) == (0.5, 2.0)
    line = refused(capsys, *TINY, 1, "--clip", "0.25", "--checkpoint", "c.npz", "--resume")
    assert "clip 0.5, not 0.25; inner_clip 2.0, not None" in line


def test_a_checkpoint_from_before_the_shares_of_unconverged_tasks_is_refused_in_one_line(folder, capsys):
    s = small()
    state = {"omniglot": vars(s), "run": {k: v for k, v in vars(benchmark.begin(s)).items() if k != "unconverged"}}
    checkpoint.save(folder / "c.npz", state)
    line = refused(capsys, *TINY, 1, "--checkpoint", "c.npz", "--resume")
    assert "c.npz is a checkpoint of another benchmark or version" in line and "unconverged" in line


def test_shares_of_trouble_with_conjugate_gradients():
    first = lambda n: tm.Tensor(np.arange(4) < n)
    solution = SimpleNamespace(negative_curvature=first(1), unconverged=first(3))
    assert benchmark.cg_trouble([solution]) == [0.25, 0.75]
    assert tuple(benchmark.cg_trouble([])) == (0, 0)


# ---- kills and interrupts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TITLES)
def test_an_interrupted_training_ends_with_the_same_bytes(method, folder, monkeypatch, capsys):
    """The interrupt comes inside of steps, validations and updates."""
    monkeypatch.setattr(benchmark, "CURVE", 1)
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
        before = reached[-1] if reached else 0
        deadline = time.monotonic() + 60
        while not path.exists() or benchmark.restore(path)[1].iteration <= before:  # until it has got on
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
    """In float64, where rounding can't hide a dependence."""
    s = small(shots=2, test_queries=3, flatten=flatten)
    sizes = s.ways, s.shots, s.test_queries
    support, (images, _) = episodes.test_episodes(0, characters(), 0, 4, *sizes, dtype=np.float64)
    phis = adapted(s, [tm.Tensor(t.data.astype(np.float64)) for t in network(s)], support, 2)
    together = benchmark.predict(s, phis[2], support, images, transductive=False).data
    assert together.shape == (4, 15, 5) and together.dtype == np.float64
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
    for i in range(15):
        alone = benchmark.predict(s, phis[2], support, images[:, i : i + 1], transductive=False).data
        same(alone[:, 0], together[:, i])
    one = np.concatenate([support[0][1:2], images[1:2, 7:8]], axis=1)  # the definition, for a task and a query
    same(tm.nn.convnet([p[1:2] for p in phis[2]], one, flatten=flatten).data[0, -1], together[1, 7])
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


def shaken(theta):
    """θ in float64, moved at random: no two step sizes or variances are equal any more."""
    rng = np.random.default_rng(5)
    return [tm.Tensor(t.data + 0.05 * rng.standard_normal(t.shape)) for t in theta]


def extras(s, theta):
    """(noise, schedule) of an iteration, in θ's type."""
    noise, schedule = METHODS[s.method].noise(s, np.random.default_rng(1), theta), METHODS[s.method].schedule(s, 0.05)
    return noise, {name: a.astype(theta[0].dtype) for name, a in schedule.items()}


@pytest.mark.parametrize("method", TITLES)
def test_adaptation_at_test_is_that_of_training(method):
    """The query loss that the algorithm returns is that of φ after as many steps at test; without dropout's noise."""
    s = small(method=method, tasks=3, batch=None, test_batch=None)
    theta = shaken(network(s))
    sizes = 3, 5, s.training_shots, s.queries
    support, query = episodes.draw_episodes(np.random.default_rng(0), characters(), *sizes, dtype=np.float64)
    noise, schedule = extras(s, theta)
    noise = {name: [np.ones_like(n) for n in arrays] for name, arrays in noise.items()}
    expected, *_ = benchmark.meta_step(s, eager=True)(theta, support, query, noise, schedule)
    path = adapted(s, theta, support, s.steps)
    assert len(path) == s.steps + 1
    losses = [benchmark.loss_of(s)(phi, query).data.mean() for phi in path]
    assert losses[-1] == pytest.approx(expected.item(), rel=1e-9)
    assert min(abs(other - losses[-1]) for other in losses[:-1]) > 1e-6
    for p, start in zip(path[0], theta[:14], strict=True):
        np.testing.assert_array_equal(p.data, np.broadcast_to(start.data, (3, *start.shape)))


def test_learned_step_sizes_go_on_with_the_last_one():
    s = small(method="maml++")
    theta = shaken(network(s))
    support, _ = episodes.test_episodes(0, characters(), 0, 2, 5, 1, 1, dtype=np.float64)
    path = adapted(s, theta, support, 7)
    for j in range(7):
        g = tm.grad(tm.sum(benchmark.loss_of(s)(path[j], support)), path[j])
        for p, g_i, a, ahead in zip(path[j], g, theta[14:], path[j + 1], strict=True):
            np.testing.assert_allclose(ahead.data, p.data - a.data[min(j, 4)] * g_i.data, rtol=0, atol=1e-9)


def test_the_blocks_are_all_parameters_of_either_network():
    for network_ in benchmark.NETWORKS:
        options = {} if network_ == "dense" else {"filters": 4}
        weights = network(choose("glyphs", network=network_, **options))
        assert [i for block in BLOCKS for i in block] == list(range(len(weights)))
        assert all(weights[i].shape[-1] == weights[block[0]].shape[-1] for block in BLOCKS for i in block)


def test_minibatches_go_round_the_support():
    labels = np.tile(np.arange(5), 3)[None]
    images = np.arange(15)[None]
    seen = [minibatch(10, (images, labels), step) for step in range(3)]
    assert np.concatenate([x[0] for x, _ in seen]).tolist() == [*range(15), *range(15)]
    assert all((np.bincount(y[0]) == 2).all() for _, y in seen)  # balanced


def test_an_inner_step_at_test_has_the_tests_minibatch():
    s = small(method="reptile", shots=2)  # 10 drawings: training's batch takes all of them
    support, _ = episodes.test_episodes(0, characters(), 0, 2, 5, 2, 1)
    first_of = lambda s, n: adapted(s, network(s), [a[:, :n] for a in support], 1)[1][0].data
    np.testing.assert_array_equal(first_of(s, 10), first_of(s, 5))
    whole = benchmark.dataclasses.replace(s, test_batch=None)
    assert (first_of(whole, 10) != first_of(s, 10)).any()


def test_schedules():
    """At the first, the middle and the last iteration."""
    for decay, expected in (("cosine", [2, 1, 0]), ("linear", [2, 1, 0]), ("none", [2, 2, 2])):
        s = small(beta=2.0, decay=decay)
        assert [benchmark.outer_step(s, t) for t in (0, 0.5, 1)] == pytest.approx(expected)


PAPERS = [  # Finn et al., App. A.1; the README of Reptile's code; Rajeswaran et al., Table 2, and their code
    (method, ways, dict(filters=64, batch=None, test_batch=None, lam=None, cg_steps=None, damping=None) | settings)
    for methods, ways, settings in [
        (["maml", "fomaml"], 5, dict(alpha=5 * 0.4, steps=1, test_steps=3, tasks=32, iterations=60_000, beta=1e-3,
                                     decay="none", flatten=False)),
        (["maml", "fomaml"], 20, dict(alpha=20 * 0.1, steps=5, test_steps=5, tasks=16, iterations=60_000, beta=1e-3,
                                      decay="none", flatten=False)),
        (["reptile"], 5, dict(alpha=1e-3, steps=5, batch=10, test_steps=50, test_batch=5, tasks=5, iterations=100_000,
                              beta=1.0, decay="linear", flatten=True)),
        (["reptile"], 20, dict(alpha=5e-4, steps=10, batch=20, test_steps=50, test_batch=10, tasks=5,
                               iterations=200_000, beta=1.0, decay="linear", flatten=True)),
        (["imaml"], 5, dict(alpha=0.1, steps=16, test_steps=16, lam=2.0, cg_steps=5, damping=2 * (2 + 10) - 2,
                            tasks=32, iterations=20_000, beta=1e-3, decay="none", flatten=True)),
        (["imaml"], 20, dict(alpha=0.1, steps=25, test_steps=25, lam=2.0, cg_steps=5, damping=2 * (2 + 10) - 2,
                             tasks=32, iterations=20_000, beta=1e-3, decay="none", flatten=True)),
        (["maml++"], 5, dict(alpha=0.1, steps=5, test_steps=5, tasks=8, iterations=100 * 500, beta=1e-3,
                             decay="cosine")),
        (["maml++"], 20, dict(alpha=0.1, steps=5, test_steps=5, tasks=8, iterations=100 * 500, beta=1e-3,
                              decay="cosine")),
    ]
    for method in methods
]  # fmt: skip


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize(("method", "ways", "settings"), PAPERS)
def test_the_papers_settings(method, ways, settings, shots):
    """iMAML's code solves (1 + 1) v + H v / (λ + 10) = g: to scale, v + H v / (λ + damping), damping 22."""
    if method == "reptile":  # trains on 10 shots, without queries, and is judged on one a class
        settings = settings | dict(shots=shots, training_shots=10, test_queries=1)
    elif method == "maml++":  # one target image a class
        settings = settings | dict(shots=shots, training_shots=shots, queries=1, test_queries=1)
    else:
        settings = settings | dict(shots=shots, training_shots=shots, queries=shots, test_queries=shots)
    chosen = vars(choose("omniglot", method, "papers", ways, shots))
    assert {name: chosen[name] for name in settings} == settings


@pytest.mark.parametrize("preset", ["small", "long"])
def test_twenty_ways_are_as_long_and_as_many_images_as_five(preset):
    steps_of_each = {
        "maml": 5, "fomaml": 5, "reptile": 10, "imaml": 25, "truncated": 5, "maml++": 5, "meta-sgd": 5, "anil": 5,
        "dropout": 5, "leap": 10, "newton": 3, "shrinkage": 25,
    }  # fmt: skip
    assert steps_of_each.keys() == TITLES.keys() == METHODS.keys() == PRESETS[preset].keys()
    for method, steps in steps_of_each.items():
        five, twenty = (choose("glyphs", method, preset, ways) for ways in (5, 20))
        assert (twenty.iterations, twenty.steps) == (five.iterations, steps)
        assert five.tasks <= 4 * twenty.tasks < five.tasks + 4


PUBLISHED = [  # method, network, transductive; % and ± of 5-way 1-shot, 5-way 5-shot, 20-way 1-shot, 20-way 5-shot
    ("maml", "conv", True, (98.7, 0.4), (99.9, 0.1), (95.8, 0.3), (98.9, 0.2)),
    ("maml", "dense", True, (89.7, 1.1), (97.5, 0.6), None, None),
    ("fomaml", "conv", True, (98.3, 0.5), (99.2, 0.2), (89.4, 0.5), (97.9, 0.1)),
    ("reptile", "conv", False, (95.39, 0.09), (98.90, 0.10), (88.14, 0.15), (96.65, 0.33)),
    ("reptile", "conv", True, (97.68, 0.04), (99.48, 0.06), (89.43, 0.14), (97.12, 0.32)),
    ("imaml", "conv", True, (99.16, 0.35), (99.67, 0.12), (94.46, 0.42), (98.69, 0.10)),
    ("newton", "conv", True, (99.50, 0.26), (99.74, 0.11), (96.18, 0.36), (99.14, 0.10)),
    ("meta-sgd", "conv", True, (99.53, 0.26), (99.93, 0.09), None, None),
    ("anil", "conv", True, None, None, (96.2, 0.5), (98.0, 0.3)),
]


def test_the_published_figures():
    known = {row[:3]: dict(zip([(5, 1), (5, 5), (20, 1), (20, 5)], row[3:])) for row in PUBLISHED}
    for which in itertools.product(TITLES, benchmark.NETWORKS, [True, False]):
        method, network, transductive = which
        for ways, shots in itertools.product([5, 6, 20], [1, 2, 5]):
            s = choose("glyphs", method, ways=ways, shots=shots, network=network)
            figure = published(s, transductive)
            assert (figure and figure[1:]) == known.get(which, {}).get((ways, shots))


# ---- who sees what ---------------------------------------------------------------------------------------------------


def test_every_role_has_its_own_characters_and_seeds(folder, monkeypatch):
    """And --seed is the training's alone: another one is tested on the same tasks."""
    seen, draw, fixed = [], episodes.draw_episodes, episodes.test_episodes

    def drawn(rng, part, *rest):
        seen.append(("train", rng.bit_generator.seed_seq.entropy, set(part.names)))
        return draw(rng, part, *rest)

    def chosen(seed, part, start, stop, *rest):
        seen.append((seed, start, stop, set(part.names)))
        return fixed(seed, part, start, stop, *rest)

    monkeypatch.setattr(episodes, "draw_episodes", drawn)
    monkeypatch.setattr(episodes, "test_episodes", chosen)
    assert run(*TINY, 2, "--seed", 7) == 0
    train, validation, test = (set(part.names) for part in episodes.split(characters(), 0))
    turned = {name + turn for name in train for turn in ("", "@90", "@180", "@270")}
    assert seen == [
        ("train", [3, 7, 0], turned),
        (2, 0, 5, validation),
        ("train", [3, 7, 1], turned),
        (2, 0, 5, validation),
        (1, 0, 20, test),  # of the trained network
        (1, 0, 20, test),  # of the untrained one
    ]
    assert benchmark.arguments().parse_args([]).test_tasks == 600


def test_the_weights_depend_on_the_seed():
    first, other, again = (network(small(seed=seed)) for seed in (0, 1, 0))
    for a, b, c in list(zip(first, other, again))[::3]:
        assert (a.data == c.data).all() and (a.data != b.data).all()


def test_the_picture_and_the_figures_are_of_the_best_parameters(folder, monkeypatch):
    s = small()
    theta, best = ([tm.Tensor(t.data + x) for t in network(s)] for x in (1.0, 2.0))
    run_ = benchmark.Run(1, theta, None, best, [[1, 0.5]], *np.ones((3, 1), np.float32))
    checkpoint.save(folder / "c.npz", {"omniglot": vars(s), "run": vars(run_)})
    seen, evaluate, predicted = [], benchmark.evaluate, benchmark.predicted_task

    def evaluated(s, theta, *rest, **keywords):
        seen.append(theta)
        return evaluate(s, theta, *rest, **keywords)

    def pictured(s, theta, part, *rest):
        seen.append(theta)
        assert set(part.names) == set(episodes.split(characters(), 0)[2].names)
        return predicted(s, theta, part, *rest)

    monkeypatch.setattr(benchmark, "evaluate", evaluated)
    monkeypatch.setattr(benchmark, "predicted_task", pictured)
    monkeypatch.setattr(benchmark.report, "pyplot", lambda: True)
    for name in ("draw_curve", "draw_steps", "draw_task"):
        monkeypatch.setattr(benchmark, name, lambda *args: None)
    assert run("--evaluate", "c.npz", "--test-tasks", 20) == 0
    for used, expected in zip(seen, (best, network(s), best), strict=True):  # trained, untrained, the picture
        assert all((a.data == b.data).all() for a, b in zip(used, expected))


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TITLES)
def test_a_step_is_the_methods_own(method):
    s = small(method=method)
    theta = network(s)
    support, query = episodes.draw_episodes(np.random.default_rng(0), characters(), 2, 5, s.training_shots, s.queries)
    ten = lambda support, step: [a[:, 10 * (step % 5) : 10 * (step % 5) + 10] for a in support]  # of 50
    noise, schedule = extras(s, theta)
    blocks = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13]]
    solve = functools.partial(tm.solvers.hessian_free, cg_steps=5, halvings=5)
    m, implicit = tm.meta, dict(cg_steps=5, damping=22.0)
    algorithm, options = {
        "maml": (m.maml, dict(alpha=0.4, steps=1)),
        "fomaml": (m.fomaml, dict(alpha=0.4, steps=1)),
        "reptile": (
            m.reptile,
            dict(alpha=1e-3, steps=5, rule=functools.partial(tm.solvers.adam, beta1=0.0), batch=ten),
        ),
        "imaml": (m.imaml, dict(alpha=0.1, steps=16, lam=2.0, **implicit)),
        "truncated": (m.truncated, dict(alpha=0.1, steps=5, last=2)),
        "maml++": (m.maml_plus_plus, dict(steps=5, **schedule)),
        "meta-sgd": (m.meta_sgd, dict(steps=1)),
        "anil": (m.anil, dict(alpha=0.4, steps=5, head=2)),
        "dropout": (m.maml, dict(alpha=0.4, steps=1, rule=m.dropout(noise.get("noise", [])))),
        "leap": (m.leap, dict(alpha=0.1, steps=10, batch=ten)),
        "newton": (m.imaml, dict(alpha=1.0, steps=3, lam=2.0, solve=solve, **implicit)),
        "shrinkage": (m.shrinkage, dict(alpha=0.1, steps=16, modules=blocks, **implicit)),
    }[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # negative curvature
        loss, meta_grad = algorithm(benchmark.loss_of(s), theta, support, query, **options)
    own_loss, own, *_ = benchmark.meta_step(s, eager=True)(theta, support, query, noise, schedule)
    assert own_loss.item() == loss.item()
    for a, b in zip(own, meta_grad, strict=True):
        np.testing.assert_array_equal(a.data, b.data)


@pytest.mark.parametrize("method", TITLES)
def test_a_compiled_step_on_shards_is_the_eager_one(method):
    s = small(method=method, tasks=3, shards=2)
    theta = shaken(network(s))
    sizes = 3, 5, s.training_shots, s.queries
    data = episodes.draw_episodes(np.random.default_rng(0), characters(), *sizes, dtype=np.float64)
    expected, found = (benchmark.meta_step(s, eager)(theta, *data, *extras(s, theta))[:2] for eager in (True, False))
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-9)
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-6, atol=1e-9)


def test_what_is_learned_beside_weights_is_trained_and_kept(folder):
    for method, count, start in (("meta-sgd", 28, 0.4), ("maml++", 28, 0.1), ("shrinkage", 19, -np.log(2))):
        assert run(*TINY, 2, "--method", method) == 0
        run_ = benchmark.restore(folder / f"out/glyphs_5way_1shot_{method}.npz")[1]
        first = network(small(method=method))
        assert len(run_.theta) == len(run_.best) == len(first) == count
        for a, b in zip(run_.theta[14:], first[14:]):
            assert a.shape == b.shape and (b.data == np.float32(start)).all() and (a.data != b.data).any()


def test_newtons_line_search_is_that_of_the_settings():
    solve = newton(small(method="newton", newton_cg=7))
    assert solve.func is tm.solvers.hessian_free and solve.keywords == {"cg_steps": 7, "halvings": 5}


def drawn_in(s, monkeypatch):
    """[(noise, schedule)] of a training's iterations."""
    seen = []
    step = lambda theta, support, query, *extra: seen.append(extra) or (tm.Tensor(1.0), [t * 0 for t in theta])
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "meta_step", lambda s, eager: step)
        patch.setattr(benchmark, "evaluate", lambda *args, **keywords: np.array([[0.5]]))
        run, parts = benchmark.begin(s), benchmark.roles(s, characters())
        while run.iteration < s.iterations:
            run = benchmark.advance(s, run, parts, benchmark.Clock(list))
    return seen


def test_every_iteration_has_noise_of_its_own(monkeypatch):
    s = small(method="dropout", iterations=3, filters=16)
    first, again, other = (
        [noise["noise"] for noise, _ in drawn_in(settings, monkeypatch)]
        for settings in (s, s, benchmark.dataclasses.replace(s, seed=1))
    )
    for noise in first:
        assert [n.shape for n in noise] == [(2, 1, *t.shape) for t in network(s)]
        values = np.concatenate([n.ravel() for n in noise])
        np.testing.assert_allclose(np.unique(values), [0, 1 / 0.9], rtol=1e-6)
        assert abs((values == 0).mean() - 0.1) < 4 * np.sqrt(0.09 / values.size)
    same = lambda a, b: all((x == y).all() for x, y in zip(a, b, strict=True))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(same(a, b) for a, b in itertools.combinations(first + other, 2))


def test_the_weights_of_the_multi_step_loss_reach_the_last_step_after_a_tenth(monkeypatch):
    weights = [schedule["weights"] for _, schedule in drawn_in(small(method="maml++", iterations=40), monkeypatch)]
    np.testing.assert_allclose(weights[0], np.full(5, 0.2), rtol=1e-6)
    assert all(0 < a[0] < b[0] for a, b in zip(weights[3:0:-1], weights[2::-1])) and (weights[3][:4] > 0).all()
    assert all(w.tolist() == [0, 0, 0, 0, 1] for w in weights[4:])


def steps_of(s, monkeypatch, accuracies):
    """The Runs of a training whose gradient is 3 everywhere, and which is validated after every iteration."""
    given, evaluated = iter(accuracies), []

    def evaluate(s, theta, *rest, **keywords):
        evaluated.append(theta)
        return np.array([[next(given)]])

    monkeypatch.setattr(benchmark, "evaluate", evaluate)
    step = lambda theta, *data: (tm.Tensor(1.0), [tm.Tensor(np.full_like(t.data, 3)) for t in theta])
    monkeypatch.setattr(benchmark, "meta_step", lambda s, eager: step)
    runs, parts = [benchmark.begin(s)], benchmark.roles(s, characters())
    while runs[-1].iteration < s.iterations:
        runs.append(benchmark.advance(s, runs[-1], parts, benchmark.Clock(list)))
        assert evaluated[-1] is runs[-1].theta
    return runs


def test_the_best_on_validation_tasks_is_kept_the_latest_among_equals(monkeypatch):
    runs = steps_of(small(iterations=6), monkeypatch, [0.25, 0.5, 0.375, 0.5, 0.125, 0.25])
    kept = [next(r.iteration for r in runs if r.theta is run.best) for run in runs]
    assert kept == [0, 1, 2, 2, 4, 4, 4]
    assert runs[-1].validations == [[1, 0.25], [2, 0.5], [3, 0.375], [4, 0.5], [5, 0.125], [6, 0.25]]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("maml", 0.01 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2),  # Adam's steps have the size β, along a cosine
        ("reptile", 3 * 0.01 * (1 - np.arange(4) / 4)),  # θ goes a share β of the way to φ, along a line
        ("leap", 3 * 0.01 * (1 - np.arange(4) / 4)),
    ],
)
def test_outer_steps_decay(method, expected, monkeypatch):
    runs = steps_of(small(method=method, iterations=4, beta=0.01), monkeypatch, 4 * [0.5])
    thetas = [run.theta[0].data.astype(np.float64) for run in runs]
    np.testing.assert_allclose([(a - b).mean() for a, b in zip(thetas, thetas[1:])], expected, rtol=1e-3)
    if method == "maml":
        assert [run.outer[0].item() for run in runs[1:]] == [1, 2, 3, 4]  # Adam's state goes on


def test_the_time_left_is_that_of_this_process(monkeypatch, capsys):
    """After a resume, what was done before took none of it."""
    now = [100.0]
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for _ in report.progress("MAML", 20, lambda: "", first=10):
        now[0] += 3
    assert re.findall(r"(\d+) s, (\d+) s left", capsys.readouterr().err) == [
        ("6", "24"), ("12", "18"), ("18", "12"), ("24", "6"), ("30", "0"),
    ]  # fmt: skip


# ---- figures and pictures --------------------------------------------------------------------------------------------


def test_summary_is_mean_and_interval_in_percent():
    accuracies = np.array([[0, 0, 1, 1], [0.25, 0.75, 0.75, 0.25], [0.5, 0.5, 0.5, 0.5]])
    assert benchmark.summary(accuracies) == {"mean": [50, 50, 50], "half_width": pytest.approx([49, 24.5, 0])}


def test_what_is_measured(monkeypatch):
    """Trained is the best θ, untrained the first one, both on the test tasks; the score is after test_steps."""
    s, seen = small(iterations=6), []

    def evaluate(s, theta, part, seed, tasks, steps, *rest):
        seen.append((part, seed, tasks, *rest))
        start = theta if isinstance(theta, float) else 0.25
        assert isinstance(theta, float) or all((a.data == b.data).all() for a, b in zip(theta, network(s)))
        return start + np.tile([[k / 128] for k in steps], tasks)

    monkeypatch.setattr(benchmark, "evaluate", evaluate)
    validations = [[1, 0.25], [2, 0.5], [4, 0.5], [6, 0.375]]
    run = benchmark.Run(6, 0.125, None, 0.5, validations, *np.ones((3, 6), np.float32))
    figures = benchmark.measure(s, run, {"test": "T", "validation": "V", "train": "R"}, 30, False, True)
    assert seen == 2 * [("T", benchmark.TEST_SEED, 30, False, True)]
    for name, start in (("trained", 50), ("untrained", 25)):
        assert figures[name]["mean"] == pytest.approx([start + 100 * k / 128 for k in range(11)])
    assert figures["score"] == {"steps": 3, "mean": pytest.approx(50 + 300 / 128), "half_width": 0}
    assert (figures["selected"], figures["tasks"], figures["transductive"]) == (4, 30, False)


def figures_of(mean=20.0):
    """As measured: accuracies `mean`, then 21, 32, 43 % after 0 to 3 steps, ± 1.96."""
    trained = {"mean": [mean, 21.0, 32.0, 43.0], "half_width": 4 * [1.96]}
    untrained = {"mean": [20.5, 22.25, 23.25, 24.25], "half_width": 4 * [0.75]}
    return {
        "data": "glyphs", "tasks": 600, "transductive": True, "trained": trained, "untrained": untrained,
        "score": {"steps": 3, "mean": 43.0, "half_width": 1.96}, "iterations": 6, "selected": 4,
        "validations": [[2, 0.25], [4, 0.75], [6, 0.5]], "loss": [1.5, 1.25, 1.0], "negative_curvature": None,
        "unconverged": None,
    }  # fmt: skip


def test_the_figures_are_told_as_they_are():
    told = lambda mean: "\n".join(benchmark.lines(small(iterations=6), figures_of(mean))).splitlines()
    numbers = lambda line: [float(x) for x in re.findall(r"\d+\.\d+", line)]
    score, paper, _, _, trained, untrained, chance = told(20.0)
    assert numbers(score) == [43, 1.96] and numbers(paper) == [98.7, 0.4]
    assert numbers(trained) == [20, 1.96, 21, 1.96, 32, 1.96, 43, 1.96]
    assert numbers(untrained) == [20.5, 0.75, 22.25, 0.75, 23.25, 0.75, 24.25, 0.75]
    assert numbers(chance) == [20, 20, 4]  # accuracy, chance, four standard errors
    verdict = lambda mean: re.sub(r"\d+\.\d+", "", told(mean)[-1])
    assert verdict(20) == verdict(16.01) == verdict(23.99) and "leak" not in verdict(20)
    assert verdict(15.99) == verdict(24.01) and "leak" in verdict(24.01)


@pytest.fixture
def plt(monkeypatch):
    """matplotlib.pyplot, whose figures stay open until the test has looked at them."""
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", lambda figure: None)
        yield pyplot
    pyplot.close("all")


def test_the_curve_shows_validation_accuracy_in_percent(plt, tmp_path):
    omniglot_pictures.draw_curve(plt, small(iterations=6), figures_of(), tmp_path / "p.png")
    left, right = plt.gcf().axes
    assert left.lines[0].get_xydata().tolist() == [[2, 1.5], [4, 1.25], [6, 1.0]]
    assert right.lines[0].get_xydata().tolist() == [[2, 25], [4, 75], [6, 50]]
    assert right.lines[1].get_xdata() == [4, 4]  # the selected iteration


def test_the_steps_show_both_networks_and_the_published_figure(plt, tmp_path):
    omniglot_pictures.draw_steps(plt, small(), figures_of(), tmp_path / "p.png")
    trained, untrained, paper, chance, *_ = (list(line.get_ydata()) for line in plt.gcf().axes[0].lines)
    assert (trained, untrained) == ([20, 21, 32, 43], [20.5, 22.25, 23.25, 24.25])
    assert (paper, chance) == ([98.7, 98.7], [20, 20])
    band = plt.gcf().axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((20 - 1.96, 43 + 1.96))


def test_all_methods_find_a_place_in_the_picture_of_methods(plt, tmp_path):
    records = [(small(method=method), {"figures": figures_of()}) for method in TITLES]
    omniglot_pictures.draw_methods(plt, records, tmp_path / "p.png")
    left, right = plt.gcf().axes
    labels = [line.get_label() for line in left.lines]
    assert all(label.startswith(f"{title}, ") for label, title in zip(labels, TITLES.values(), strict=True))
    assert len({line.get_color() for line in left.lines}) == len(TITLES)
    assert left.lines[-1].get_xydata().tolist() == [[2, 25], [4, 75], [6, 50]]  # iterations, %
    assert sum(len(line.get_xdata()) == 4 for line in right.lines) == len(TITLES)


def test_right_is_green_and_wrong_is_red(plt, tmp_path):
    s, labels = small(ways=3), np.arange(3)
    support, query = (np.random.default_rng(i).random((3, 28, 28, 1)) for i in range(2))
    omniglot_pictures.draw_task(plt, s, (support, labels), (query, labels), np.array([0, 2, 2]), tmp_path / "p.png")
    axes = plt.gcf().axes
    for axis, drawing in zip(axes, [*support, *query], strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), 1 - drawing[..., 0])  # ink is black
    assert [axis.title.get_color() for axis in axes] == 3 * ["black"] + ["tab:green", "tab:red", "tab:green"]
    assert [re.findall(r"\d+", axis.get_title()) for axis in axes] == [["1"], ["2"], ["3"], ["1"], ["3"], ["3"]]


def test_the_sheet_shows_three_drawings_of_each_character():
    images = characters().images
    for seed in range(8):
        sheet = sheets.sheet(characters(), seed)
        tiles = sheet.reshape(3, 32, 20, 32).transpose(2, 0, 1, 3)[:, :, 2:-2, 2:-2]
        shown = [np.flatnonzero((images[:, 0] == 255 - tile).all(axis=(1, 2))).item() for tile in tiles[:, 0]]
        assert len(set(shown)) == 20
        np.testing.assert_array_equal(tiles, 255 - images[shown, :3])
