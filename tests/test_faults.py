"""Kills, full and read-only disks, a clock that jumps, damaged files: what was good stays, the rest is one clear line.

The loops of kills are in tests/kills.py; `--long` makes them hundreds, and flips every byte instead of some.
"""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import test_omniglot
import test_omniglot_data
import tinymeta as tm
from benchmarks import checkpoint, report
from benchmarks import omniglot as benchmark
from test_omniglot import TINY, refused, run
from test_omniglot_data import NAMES, Handler, Server, is_tiny, kept, zipped
from tinymeta.tasks import omniglot

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="fork, signals, limits")
folder, quick = test_omniglot.folder, test_omniglot.quick  # fixtures, as those below
tiny, empty_home, server = (
    test_omniglot_data.tiny,
    test_omniglot_data.tiny_set_and_empty_home,
    test_omniglot_data.server,
)


# ---- kills -----------------------------------------------------------------------------------------------------------


def killed(kind, kills, place):
    """What tests/kills.py says of so many kills."""
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))
    environment = {**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, "-W", "error", ROOT / "tests/kills.py", kind, str(kills), place]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    print(f"{kind}: {result.stdout}", end="")
    return json.loads(result.stdout)


@posix
@pytest.mark.parametrize(
    ("kind", "few", "many"),
    [("training", 5, 100), ("saving", 15, 500), ("caching", 12, 300), ("recording", 3, 100), ("together", 3, 50)],
)
def test_killed_at_random_moments(kind, few, many, tmp_path, long):
    if kind == "caching" or kind == "together":
        pytest.importorskip("PIL")
    if kind == "recording":
        pytest.importorskip("matplotlib")
    counts = killed(kind, many if long else few, tmp_path / kind)
    assert counts.get("kills", many if long else few) == (many if long else few)
    if long and kind in ("training", "saving", "caching"):
        assert counts["killed while writing"] > 0


@posix
def test_killed_while_downloading(tmp_path, long):
    rng = np.random.default_rng(0)
    content = {name: rng.bytes(40_000) for name in NAMES}

    def slices(name):
        def answer(handler):
            with contextlib.suppress(OSError):  # the client was killed
                handler.answer(200, Content_Length="40000")
                for i in range(0, 40_000, 4000):
                    handler.wfile.write(content[name][i : i + 4000])
                    time.sleep(0.001)

        return answer

    with Server(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *args: None  # the client was killed before it had asked
        server.answers.update({name: slices(name) for name in NAMES})
        described = {
            "url": f"http://127.0.0.1:{server.server_port}/",
            "files": {n: c.hex() for n, c in content.items()},
        }
        (tmp_path / "server.json").write_text(json.dumps(described))
        counts = killed("downloading", 300 if long else 15, tmp_path / "place")
    assert counts["kills"] == (300 if long else 15)


@posix
def test_a_fault_at_every_step_of_a_write(tmp_path):
    counts = killed("steps", 0, tmp_path / "steps")
    assert min(counts[name] for name in ("killed", "failed", "new")) > 3, counts


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """(a disk of 400 KB, a function that makes it read-only)."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", f"size=400k,{options}", "none", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a tmpfs")

    mount("rw")
    try:
        yield place, lambda: mount("remount,ro")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(place, room=0):
    """Leave so many bytes of room: the file that takes the rest."""
    filler = place / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - room)
    return filler


def stopped(capsys, status, *options):
    """The last line of a command that ends with that status, and the only one but for progress."""
    capsys.readouterr()
    assert run(*options) == status
    *before, last = capsys.readouterr().err.splitlines()
    assert all(line.startswith("MAML ") for line in before), before
    return last


def test_a_disk_that_fills_up_while_training(disk, folder, monkeypatch, capsys):
    place, _ = disk
    command = [*TINY, 4, "--save-every", 0, "--checkpoint"]
    assert run(*command, "whole.npz") == 0
    advance, reached = benchmark.advance, []

    def fills(*args):
        reached.append(1)
        if len(reached) == 3:
            fill(place)
        return advance(*args)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "advance", fills)
        said = stopped(capsys, 1, *command, place / "c.npz")
    assert "No space left on device" in said and "iteration 2 is saved in" in said and "--resume goes on" in said
    assert {file.name for file in place.iterdir()} == {"c.npz", "filler"}
    assert benchmark.restore(place / "c.npz")[1].iteration == 2
    saved = (place / "c.npz").read_bytes()
    assert "No space left on device" in refused(capsys, *command, place / "c.npz", "--resume")
    assert (place / "c.npz").read_bytes() == saved
    (place / "filler").unlink()
    assert run(*command, place / "c.npz", "--resume") == 0
    assert (place / "c.npz").read_bytes() == (folder / "whole.npz").read_bytes()


def test_a_disk_that_is_full_from_the_start(disk, folder, capsys):
    place, _ = disk
    fill(place)
    assert "No space left on device" in refused(capsys, *TINY, 1, "--checkpoint", place / "c.npz")
    assert "No space left on device" in stopped(capsys, 1, *TINY, 1, "--json", place / "r.json")
    assert {file.name for file in place.iterdir()} == {"filler"}


def test_a_full_disk_for_pictures(disk, folder, monkeypatch, capsys):
    place, _ = disk
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    monkeypatch.setattr(report, "pyplot", lambda: pyplot)
    fill(place, room=4096)
    assert "No space left on device" in stopped(capsys, 1, *TINY, 1, "--out", place, "--checkpoint", "c.npz")
    pyplot.close("all")
    assert {file.name for file in place.iterdir()} == {"filler"}


def test_a_full_or_read_only_disk_for_the_copy_and_the_download(tiny, server, disk, tmp_path, monkeypatch):
    place, read_only = disk
    zips = zipped(tmp_path / "zips", tiny[1])
    monkeypatch.setattr(omniglot, "cache_directory", lambda: place / "cache")
    filler = fill(place)
    for _ in range(2):
        assert is_tiny(omniglot.load(zips), tiny[0])
        with pytest.raises(OSError, match="No space left|Read-only"):
            omniglot.download()
        assert not (place / "cache").exists() or not list((place / "cache").iterdir())
        read_only()
    assert filler.exists()


def test_a_read_only_disk_is_one_line(disk, folder, capsys):
    place, read_only = disk
    path = place / "c.npz"
    assert run(*TINY, 1, "--checkpoint", path) == 0
    saved = path.read_bytes()
    read_only()
    for options in (
        ["--checkpoint", place / "other.npz"],
        ["--checkpoint", path, "--resume"],
        ["--out", place / "new"],
        ["--checkpoint", folder / "here.npz", "--json", place / "r.json"],
        ["--checkpoint", folder / "here.npz", "--out", place],
    ):
        said = refused(capsys, *TINY, 1, *options)
        assert str(place) in said and ("Read-only file system" in said or "can't be written to" in said)
        assert not (folder / "here.npz").exists()
    assert run("--evaluate", path, "--test-tasks", 20) == 0
    assert [file.name for file in place.iterdir()] == ["c.npz"] and path.read_bytes() == saved


@pytest.mark.parametrize(
    "name", ["sinusoid", "implicit", "taylor", "complexity", "leap", "speed", "chain", "characters"]
)
def test_no_benchmark_runs_for_nothing(name, disk, folder, monkeypatch, capsys):
    """Where record and pictures can't be written, that is said before anything is computed."""
    place, read_only = disk
    module = importlib.import_module(f"benchmarks.{name}")
    read_only()
    for options in (["--json", place / "r.json"], ["--out", place], ["--out", place / "new"], ["--out", "file/new"]):
        (folder / "file").write_text("kept")
        with pytest.raises(SystemExit) as end:
            module.main([*map(str, options)])
        out, err = capsys.readouterr()
        assert end.value.code == 2 and ": error: " in err.splitlines()[-1] and not out
        assert all(line.startswith("not here: ") for line in err.splitlines()[:-1])
    assert (folder / "file").read_text() == "kept" and not list(place.iterdir())


PICTURES = {
    "chain": "chain.png",
    "complexity": "complexity.png",
    "implicit": "implicit.png",
    "leap": "leap.png",
    "omniglot": "glyphs_5way_1shot_maml_task.png",
    "sinusoid": "sinusoid_steps.png",
    "speed": "speed.png",
    "taylor": "taylor.png",
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_record_that_could_not_be_kept_is_refused_before_anything_is_computed(name, folder, capsys):
    """Its name leaves no room for that of the file written first; or a picture would replace it, in the end."""
    more = ["--glyphs"] if name == "omniglot" else []
    (folder / "link.json").symlink_to(folder / "out" / PICTURES[name])
    for file, said in (
        ("r" * 245, "File name too long"),
        (f"out/../out/{PICTURES[name]}", "would overwrite the checkpoint, the record or a picture"),
        ("link.json", "would overwrite the checkpoint, the record or a picture"),
    ):
        with pytest.raises(SystemExit) as end:
            importlib.import_module(f"benchmarks.{name}").main([*more, "--json", file])
        out, err = capsys.readouterr()
        assert end.value.code == 2 and said in err.splitlines()[-1] and not out
    assert not [file for file in folder.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    "options",
    [
        "taylor --draws 1",
        "taylor --draws 99999999999999",
        "complexity --rounds 0",
        "speed --rounds -5",
        "speed --rounds 0",
        "speed --patience nan",
        "speed --patience -3",
        "sinusoid --iterations -1",
        "leap --seeds 99999999999",
        "omniglot --shots 1" + 5000 * "0",
    ],
    ids=lambda options: options[:30],
)
def test_numbers_that_cannot_be_meant_are_refused(options, folder, capsys):
    name, option, number = options.split()
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{name}").main([f"{option}={number}"])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and err.count("\n") == 1 and len(err) < 200
    assert f"argument {option}: must " in err and number[:30] in err


def test_a_picture_never_replaces_the_checkpoint(folder, capsys):
    said = refused(capsys, *TINY, 1, "--checkpoint", "out/glyphs_5way_1shot_maml_curve.png")
    assert "would overwrite the checkpoint" in said and not list((folder / "out").iterdir())
    assert run(*TINY, 1, "--checkpoint", "c.npz") == 0
    os.rename("c.npz", "out/glyphs_5way_1shot_maml_not_transductive_steps.png")
    evaluated = ["--evaluate", "out/glyphs_5way_1shot_maml_not_transductive_steps.png", "--test-tasks", 2]
    assert "would overwrite the checkpoint" in refused(capsys, *evaluated, "--not-transductive")
    assert run(*evaluated) == 0


@pytest.mark.parametrize(
    ("wanted", "change", "said"),
    [
        ("speed*", lambda path: path.unlink(), "No such file or directory"),
        ("omniglot_5way*", lambda path: path.unlink(), "no record benchmarks/results/omniglot_5way_1shot_METHOD"),
        ("omniglot_family*", lambda path: path.unlink(), "no record benchmarks/results/omniglot_family_METHOD"),
        ("sinusoid.json", lambda path: path.write_bytes(path.read_bytes()[:-9]), "sinusoid.json is no JSON"),
        ("sinusoid.json", lambda path: path.write_text("[" * 100_000), "sinusoid.json is no JSON"),
        (
            "complexity.json",
            lambda path: path.write_text("{}"),
            "is not what its benchmark writes: KeyError('settings'",
        ),
        ("complexity.json", lambda path: path.write_text("[]"), "is not what its benchmark writes: TypeError"),
    ],
)
def test_a_missing_or_damaged_record_leaves_the_readmes_as_they_are(
    wanted, change, said, tmp_path, monkeypatch, capsys
):
    readme = importlib.import_module("benchmarks.readme")
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    shutil.copytree(ROOT / "tinymeta", tmp_path / "tinymeta", ignore=shutil.ignore_patterns("__pycache__"))
    pages = [tmp_path / page.relative_to(ROOT) for page in readme.PAGES]
    for page, original in zip(pages, readme.PAGES):
        page.write_text(original.read_text("utf-8").replace("| MAML |", "| to be written |"), encoding="utf-8")
    before = [page.read_bytes() for page in pages]
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PAGES", pages)
    monkeypatch.setattr(report, "pyplot", lambda: None)
    for path in (tmp_path / "benchmarks/results").glob(wanted):
        if path.suffix == ".json":
            change(path)
    with pytest.raises(SystemExit) as end:
        report.command(lambda: readme.main([]))
    assert end.value.code.startswith("stopped: ") and said in end.value.code and "\n" not in end.value.code
    assert [page.read_bytes() for page in pages] == before


def test_a_full_disk_ends_any_benchmark_in_one_line():
    with pytest.raises(SystemExit) as end:
        report.command(lambda: os.truncate("nowhere/file", 0))
    assert end.value.code == "stopped: [Errno 2] No such file or directory: 'nowhere/file'"


def test_ctrl_c_ends_any_benchmark_in_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        report.command(interrupted)
    assert end.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"


def test_a_record_or_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    path, figure = tmp_path / "new" / "file", SimpleNamespace(savefig=lambda file: file.write(b"new"))
    path.parent.mkdir()
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        for write in (lambda: report.write_picture(path, figure), lambda: report.write_json(path, {}, {}, {})):
            with pytest.raises(OSError, match="no space left"):
                write()
            assert [file.name for file in path.parent.iterdir()] == ["file"] and path.read_bytes() == b"old"
    report.write_picture(path, figure)
    assert path.read_bytes() == b"new"


@posix
def test_a_file_that_may_not_grow_is_one_line(tmp_path):
    """A quota, for those who may not mount."""
    program = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.path[:0] = [{str(ROOT)!r}]
from benchmarks import omniglot
omniglot.main()
"""
    command = [sys.executable, "-c", program, *TINY, "1", "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "File too large" in result.stderr and result.stderr.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


# ---- what is left, and the clock -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "goes"), [(61, True), (1e9, True), (-61, True), (-1e9, True), (0, False), (-50, False)]
)
def test_leftovers_go_whatever_the_clock_did_since(tiny, server, age, goes, tmp_path):
    """With a file that is written again, a copy that is good, a download that is there."""
    zips = zipped(tmp_path / "zips", tiny[1])
    places = {kept(): lambda: omniglot.load(zips), tmp_path / "c.npz": lambda: checkpoint.save(tmp_path / "c.npz", {})}
    places[tmp_path / "data" / NAMES[0]] = lambda: omniglot.download(tmp_path / "data")
    for file, write in places.items():
        write()
        part = file.with_name(f"{file.name}.{'0f' * 16}.part")
        part.write_bytes(b"half of it")
        os.utime(part, times=2 * (time.time() - age,))
        write()
        assert part.exists() != goes and file.exists()


# ---- damaged files ---------------------------------------------------------------------------------------------------


def damages(data, every):
    """The file cut short at every length, one byte of it flipped or one bit, all of them or one of `every`."""
    for i in range(0, len(data), every):
        yield data[:i]
        yield data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :]
        yield data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :]
    yield data + b"\0"


def test_a_damaged_checkpoint_is_one_line_or_as_good_as_whole(folder, capsys, long):
    """Some bytes of a zip say nothing: dates, attributes."""
    path, state = folder / "c.npz", {"n": 3, "a": np.arange(5.0), "list": [tm.Tensor(np.eye(2, dtype="f4"))]}
    checkpoint.save(path, state)
    data, outcomes = path.read_bytes(), {"refused": 0, "whole": 0}
    for bad in damages(data, 1 if long else 7):
        path.write_bytes(bad)
        try:
            read = checkpoint.load(path)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            outcomes["refused"] += 1
        else:
            assert read["n"] == 3 and (read["a"] == state["a"]).all() and (read["list"][0].data == np.eye(2)).all()
            outcomes["whole"] += 1
    print(f"damaged checkpoints: {outcomes}")
    assert outcomes["whole"] < 0.2 * outcomes["refused"]


def test_a_damaged_training_is_one_line_and_stays_as_it_is(folder, capsys, long):
    path = folder / "c.npz"
    command = [*TINY[:-2], 2, "--iterations", 1, "--checkpoint", path]
    assert run(*command) == 0
    data, refusals = path.read_bytes(), 0
    for bad in damages(data, 37 if long else len(data) // 12):
        path.write_bytes(bad)
        with contextlib.suppress(ValueError):
            benchmark.restore(path)
            continue
        assert str(path) in refused(capsys, *command, "--resume") and path.read_bytes() == bad
        refusals += 1
    assert refusals > 24


def test_a_damaged_copy_is_never_used(tiny, tmp_path, long):
    folder = zipped(tmp_path / "zips", tiny[1])
    omniglot.load(folder)
    data = kept().read_bytes()
    for bad in damages(data, 1 if long else 61):
        kept().write_bytes(bad)
        assert omniglot.read_cache(kept(), None) is None
    assert is_tiny(omniglot.load(folder), tiny[0]) and kept().read_bytes() == data


def altered(path, alter):
    """The checkpoint with another content, and with the SHA-256 of that."""
    state = checkpoint.load(path)
    alter(state)
    checkpoint.save(path, state)


@pytest.mark.parametrize("format", [checkpoint.FORMAT - 1, checkpoint.FORMAT + 1])
def test_a_checkpoint_of_another_version_is_refused_and_kept(format, folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", format)
        assert run(*TINY, 1, "--checkpoint", "c.npz") == 0
    saved = (folder / "c.npz").read_bytes()
    for options in ([*TINY, 1, "--checkpoint", "c.npz", "--resume"], ["--evaluate", "c.npz"]):
        assert f"has format {format}, this version reads and writes" in refused(capsys, *options)
    assert (folder / "c.npz").read_bytes() == saved


def test_a_checkpoint_without_a_field_or_with_one_more_is_refused_and_kept(folder, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "require_keys", lambda state: None)  # which would not write the last two
    path = folder / "c.npz"
    assert run(*TINY, 1, "--checkpoint", path) == 0
    whole = path.read_bytes()
    state = checkpoint.load(path)
    lacking = [(part, name) for part in ("omniglot", "run") for name in state[part]]
    for alter in (
        *[lambda state, part=part, name=name: state[part].pop(name) for part, name in lacking],
        lambda state: state.pop("omniglot"),
        lambda state: state.pop("run"),
        lambda state: state["omniglot"].update(unheard_of=1),
        lambda state: state["run"].update(unheard_of=1),
        lambda state: state.update(omniglot=None),
        lambda state: state.update(run=[1, 2]),
        lambda state: state.update(run={"array": 99}),
        lambda state: state.update(run={"tensor": "text"}),
    ):
        path.write_bytes(whole)
        altered(path, alter)
        bad = path.read_bytes()
        for options in ([*TINY, 1, "--checkpoint", path, "--resume"], ["--evaluate", path]):
            assert str(path) in refused(capsys, *options)
        assert path.read_bytes() == bad != whole
