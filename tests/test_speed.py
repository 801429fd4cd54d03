"""The race: all contestants compute the same, who does not is named, and the command runs and writes its record.

Peers that are not installed are skipped by name.
"""

import dataclasses
import json
import subprocess
import sys
import types

import numpy as np
import pytest

from benchmarks import peers, speed
from benchmarks.peers import tinymeta_peer

FOUND, _ = peers.load()
TINY = {name: speed.smaller(speed.WORKLOADS[name]) for name in speed.WORKLOADS if not name.endswith("-32")}


@pytest.fixture(params=peers.LIBRARIES)
def library(request):
    if request.param not in FOUND:
        pytest.skip(f"{request.param} is not installed")
    return FOUND[request.param]


@pytest.mark.filterwarnings("default")  # the peers' own
@pytest.mark.parametrize("workload", TINY)
def test_contestants_agree_with_our_float64(workload, library):
    w = TINY[workload]
    for name in library.contestants(w):
        if "torch-compile" not in name:
            speed.check(name, library, w, library.build(name, w), seed=0)


@pytest.mark.filterwarnings("default")
def test_torch_compile_agrees():
    if "torch" not in FOUND:
        pytest.skip("torch is not installed")
    w = TINY["sinusoid-maml-1"]
    speed.check("torch-compile", FOUND["torch"], w, FOUND["torch"].build("torch-compile", w), seed=0)


def test_each_workload_has_a_second_order_that_the_check_can_see():
    for w in TINY.values():
        if w.algorithm != "fomaml":
            first_order = speed.reference(dataclasses.replace(w, algorithm="fomaml"), 0, np.float64)
            assert speed.disagreement(first_order, speed.reference(w, 0, np.float64)) > 2 * speed.TOLERANCE


def wrong(change):
    """A contestant whose gradient is changed."""

    def to_numpy(name, w, result):
        query_loss, grads = tinymeta_peer.to_numpy(name, w, result)
        return query_loss, change(grads)

    namespace = {**vars(tinymeta_peer), "to_numpy": to_numpy}
    return types.SimpleNamespace(**namespace)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: [-g[0], *g[1:]],
        lambda g: [*g[:-1], 1.01 * g[-1]],
        lambda g: [x * 2 for x in g],
        lambda g: g[:-1],
        lambda g: [g[0] * np.nan, *g[1:]],
        lambda g: [g[0].T, *g[1:]],
    ],
    ids=["sign", "one factor", "all factors", "one missing", "nan", "transposed"],
)
def test_a_wrong_contestant_is_named(change):
    w = TINY["sinusoid-maml-1"]
    with pytest.raises(ValueError, match="tinymeta-compiled computes something else than maml"):
        speed.race(w, {"tinymeta-compiled": (wrong(change), (1,))}, 0, 1, 1.0)


def test_a_wrong_loss_is_found_too():
    w = TINY["sinusoid-maml-1"]
    library = types.SimpleNamespace(
        **{**vars(tinymeta_peer), "to_numpy": lambda name, w, result: (2 * result[0].data, [g.data for g in result[1]])}
    )
    with pytest.raises(ValueError, match="something else"):
        speed.check("tinymeta-eager", library, w, library.build("tinymeta-eager", w), 0)


def test_missing_peers_are_named(monkeypatch, capsys, tmp_path):
    def absent(library, found=peers.import_module):
        if library in ("torch", "jax", "autograd"):
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return found(library)

    monkeypatch.setattr(peers, "import_module", absent)
    path = tmp_path / "s.json"
    options = ["--quick", "--workloads", "sinusoid-maml-1", "--json", str(path), "--out", str(tmp_path)]
    speed.main(options)
    told = capsys.readouterr()
    for name in ("PyTorch", "JAX", "HIPS autograd"):
        assert f"not here: {name}" in told.err
    figures = json.loads(path.read_text())["figures"]
    assert figures["missing"] == ["torch", "jax", "autograd"]
    assert figures["races"]["sinusoid-maml-1"]["fastest_peer"] is None


def test_the_race_measures_every_contestant():
    w = TINY["sinusoid-maml-1"]
    names = tinymeta_peer.contestants(w)
    results = speed.race(w, {name: (tinymeta_peer, choices) for name, choices in names.items()}, 0, 4, 0.0)
    assert set(results) == set(names)
    for name, r in results.items():
        assert 0 < r["low"] <= r["median"] <= r["high"] and r["threads"] in names[name]


def test_the_floor_is_made_of_the_programs_products():
    w = TINY["sinusoid-maml-1"]
    ground = speed.floor(w, 0, 1)
    assert ground["median"] > 0 and ground["products"] == len(speed.products(w, 0))
    forward = 2 * 2 * w.tasks * 10 * (40 + 40 * 40 + 40)  # 2 forward passes of 10 points, 2 operations per weight
    assert 5 < ground["gflop"] * 1e9 / forward < 7  # and what backward walks of both orders add


def test_the_profile_adds_up():
    w = TINY["sinusoid-maml-1"]
    kernels = speed.profile(w, 0, calls=2)
    assert sum(calls for _, calls, op, _ in kernels if op == "matmul") == len(speed.products(w, 0))
    assert [s for s, *_ in kernels] == sorted((s for s, *_ in kernels), reverse=True) and kernels[-1][0] > 0


def test_the_peak_of_a_process_is_that_of_its_arrays():
    w = TINY["sinusoid-maml-1"]
    record = speed.in_a_process("tinymeta-compiled", w, 0)
    assert set(record) == {"first", "median", "first_mb", "steady_mb"} and record["first"] > 0 < record["median"]
    # a process of its own: one that has freed much takes new arrays from what it kept
    script = (
        "import numpy as np; from benchmarks import speed;"
        " print(speed.peak(lambda: np.ones(5_000_000))[1], speed.peak(lambda: None)[1])"
    )
    high, low = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split()
    if high == "None":
        pytest.skip("this system does not tell the peak")
    assert 35 < float(high) - float(low) < 60


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="nonsense, in a process of its own"):
        speed.in_a_process("nonsense", TINY["sinusoid-maml-1"], 0)


def test_the_command(tmp_path):
    path = tmp_path / "s.json"
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--rounds", "1", "--json", path, "--out", tmp_path]
    contestants = ["tinymeta", "torch-hand"][: 1 + ("torch" in FOUND)]
    result = subprocess.run([*command, "--contestants", *contestants], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    record = json.loads(path.read_text())
    assert record["settings"]["quick"] and record["settings"]["tolerance"] == speed.TOLERANCE
    assert set(record["figures"]["races"]) == set(speed.WORKLOADS)
    for name, r in record["figures"]["races"].items():
        assert name in result.stdout and {"median", "how", "gflop"} <= set(r["floor"])
        assert {"tinymeta-eager", "tinymeta-compiled", "tinymeta-sharded"} <= set(r["contestants"])
        for c in r["contestants"].values():
            assert {"low", "median", "high", "threads", "errors"} <= set(c)


RACE = {"contestants": {"tinymeta-eager": {"median": 1.0}}, "floor": {"median": 1.0}}


def tried(options, capsys):
    """(what a command that must not race says, its status)."""
    with pytest.raises(SystemExit) as end:
        speed.main(options)
    *missing, said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("not here: ") for line in missing)
    return said, end.value.code


@pytest.mark.parametrize(
    "figures",
    [
        {},
        [],
        {"races": []},
        {"races": {"a": {}}},
        {"races": {"a": {"contestants": {}}}},
        {"races": {"a": RACE | {"contestants": {}}}},
        {"races": {"a": RACE | {"contestants": {"tinymeta-eager": {}}}}},
        {"races": {"a": RACE | {"contestants": {"tinymeta-eager": {"median": None}}}}},
        {"races": {"a": RACE | {"floor": {"median": 0.0}}}},
        {"races": {"a": RACE}, "growth": []},
        {"races": {"a": RACE}, "growth": {"steps": {"tinymeta-eager": {"x": {"median": 1.0, "steady_mb": 1.0}}}}},
        {"races": {"a": RACE}, "growth": {"steps": {"tinymeta-eager": {"1": {"median": 1.0}}}}},
    ],
    ids=str,
)
def test_a_damaged_record_is_refused_before_the_race_and_stays(figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "run", lambda *args: pytest.fail("it raced"))
    path = tmp_path / "s.json"
    settings = {"seed": 0, "rounds": 3, "quick": True, "tolerance": speed.TOLERANCE}
    path.write_text(record := json.dumps({"settings": settings, "figures": figures}))
    options = ["--quick", "--workloads", "sinusoid-maml-1", "--json", str(path), "--out", str(tmp_path)]
    said, status = tried(options, capsys)
    assert status == 2 and "it holds something else than a record" in said and path.read_text() == record


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", "3", '{"figures": {}}'], ids=lambda text: text[:20])
def test_something_else_than_a_record_is_refused(text, tmp_path, capsys):
    path = tmp_path / "s.json"
    path.write_text(text)
    said, status = tried(["--quick", "--json", str(path), "--out", str(tmp_path)], capsys)
    assert status == 2 and "it holds something else than a record" in said and path.read_text() == text


def test_a_sound_record_is_gone_on_with(tmp_path):
    path, growth = tmp_path / "s.json", {"steps": {"jax": {"1": {"median": 1.0, "steady_mb": None}}}}
    figures = {"races": {"a": RACE}, "growth": growth, "missing": []}
    path.write_text(json.dumps({"settings": {"seed": 0}, "figures": figures}))
    assert speed.recorded(path, {"seed": 0}) == figures and speed.recorded(path, {"seed": 1}) == {"races": {}}


@pytest.mark.parametrize("option", ["--quick", "--profile"])
def test_growth_alone_where_it_is_left_out_is_refused(option, tmp_path, capsys):
    said, status = tried([option, "--workloads", "growth", "--out", str(tmp_path)], capsys)
    assert status == 2 and "nothing to do: --profile, and --quick without --memory, leave growth out" in said


def test_unknown_contestants_are_refused(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--contestants", "theano"])
    assert "no contestant begins with theano" in capsys.readouterr().err
