"""The library and the benchmarks wherever they are run: other folders, homes, names, locales, flags, and no terminal.

The strange environments are put together, as a Python with NumPy takes a while to start: `MIXED` has one of each kind.
`--long` runs every benchmark in them, and sinusoid in each one alone.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = "Prüfung mit Ätna 日本"

# Environment variables (None: not set at all), Python's flags, and what the process gets otherwise.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
ENVIRONMENTS = {
    "not UTF-8": ({**ASCII, "LANG": None}, [], {}),
    "no home": ({"HOME": None, "XDG_CACHE_HOME": None, "MPLCONFIGDIR": None}, [], {}),
    "a home that can't be written": ({"HOME": __file__, "XDG_CACHE_HOME": None, "MPLCONFIGDIR": None}, [], {}),
    "a dumb terminal": ({"TERM": "dumb", "COLUMNS": "20", "LINES": "1", "NO_COLOR": "1"}, [], {}),
    "warnings as errors": ({"PYTHONWARNINGS": "error"}, [], {}),
    "development mode": ({}, ["-X", "dev", "-W", "error", "-bb"], {}),
    "optimised": ({}, ["-OO"], {}),  # no assertions and no docstrings
    "another hash seed": ({"PYTHONHASHSEED": "4242"}, [], {}),
    "another time zone": ({"TZ": "Pacific/Chatham"}, [], {}),
    "a narrow umask": ({}, [], {"umask": 0o077}),
    "isolated from the user's packages": ({"PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}, [], {}),
}
MIXED = {
    "mixed": (
        {**ASCII, "LANG": None, "HOME": __file__, "XDG_CACHE_HOME": None, "MPLCONFIGDIR": None, "TERM": "dumb",
         "COLUMNS": "20", "PYTHONHASHSEED": "4242", "TZ": "Pacific/Chatham"},
        ["-X", "dev", "-W", "error", "-bb", "-OO"],
        {"umask": 0o077},
    ),
}  # fmt: skip

BENCHMARKS = {  # each as short as it can be
    "chain": [],
    "characters": [],
    "complexity": ["--quick", "--rounds", "1"],
    "implicit": [],
    "leap": "--glyphs --methods leap --iterations 1 --seeds 1 --steps 2 --alphabets 1".split(),
    "omniglot": "--glyphs --iterations 1 --test-tasks 2 --filters 4".split(),
    "sinusoid": "--methods maml --iterations 2".split(),
    "speed": "--quick --workloads sinusoid-maml-1 --contestants tinymeta --rounds 1".split(),
    "taylor": ["--draws", "2"],
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the packages in a folder that isn't easy to name."""
    folder = tmp_path_factory.mktemp(NAME)
    for package in ("tinymeta", "benchmarks"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    return folder


def run(arguments, environment=({}, [], {}), **options):
    """Run Python with these arguments in this environment."""
    variables, flags, more = environment
    env = {key: value for key, value in {**os.environ, **variables}.items() if variables.get(key, "") is not None}
    env.pop("TINYMETA_DATA", None)
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 600, "check": False, **more, **options}
    return subprocess.run([sys.executable, *flags, *map(str, arguments)], env=env, **options)


def quiet(stderr):
    """What was said, without the plain lines of progress and matplotlib's about its cache."""
    text = stderr.decode("utf-8", "replace")
    return [
        line
        for line in text.splitlines()
        if not re.search(r"s left$|^no pictures|^not here: |^mkdir -p failed for path.*matplotlib|^Matplotlib ", line)
    ]


def benchmark(name, checkout, out, environment=({}, [], {})):
    """A short run from the root of the checkout: (its table, its figures, its pictures)."""
    record = out / NAME / f"{name} {NAME}.json"
    arguments = ["-m", f"benchmarks.{name}", *BENCHMARKS[name], "--out", out / NAME]
    if name != "characters":
        arguments += ["--json", record]
    result = run(arguments, environment, cwd=checkout)
    if name == "characters" and b"no pictures: matplotlib is not installed" in result.stderr:
        pytest.skip("a picture needs matplotlib")
    assert result.returncode == 0 and not quiet(result.stderr), result.stderr.decode("utf-8", "replace")
    figures = json.loads(record.read_text(encoding="utf-8"))["figures"] if name != "characters" else None
    pictures = {path.name: path.read_bytes() for path in (out / NAME).glob("*.png")}
    return result.stdout, figures, pictures


def assert_same_run(name, checkout, tmp_path, environments):
    """What is deterministic must not depend on where it runs, to the byte."""
    _, figures, pictures = benchmark(name, ROOT, tmp_path / "here")
    for i, environment in enumerate(environments.values()):
        _, others, drawn = benchmark(name, checkout, tmp_path / str(i), environment)
        assert drawn.keys() == pictures.keys()
        if name not in ("complexity", "speed", "characters"):  # times; and the images that are found at home
            assert others == figures and drawn == pictures
    left = [path.name for path in checkout.iterdir() if path.name not in ("tinymeta", "benchmarks")]
    assert not left, f"{name} wrote into the current directory"


# ---- the benchmarks --------------------------------------------------------------------------------------------------


def test_sinusoid_in_a_strange_place(checkout, tmp_path, long):
    assert_same_run("sinusoid", checkout, tmp_path, {**MIXED, **ENVIRONMENTS} if long else MIXED)


@pytest.mark.parametrize("name", sorted(BENCHMARKS.keys() - {"sinusoid"}))
def test_every_benchmark_in_a_strange_place(name, checkout, tmp_path, long):
    if not long:
        pytest.skip("the long form: the short one is sinusoid's and what every command says of itself")
    assert_same_run(name, checkout, tmp_path, MIXED)


ASK = """
import contextlib, io, json, runpy, sys
said = {}
for name in sys.argv[1:]:
    sys.argv[1:], text = ["--help"], io.StringIO()
    sys.modules.pop(f"benchmarks.{name}", None)  # another one has imported it
    with contextlib.redirect_stdout(text):
        try:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            said[name] = end.code, text.getvalue()
print(json.dumps(said))
"""


@pytest.mark.parametrize("environment", [({}, [], {}), MIXED["mixed"]], ids=["here", "mixed"])
def test_every_benchmark_says_what_it_does_how_and_how_long_it_takes(environment, checkout):
    names = sorted(BENCHMARKS)
    assert names == sorted(
        path.stem
        for path in ROOT.glob("benchmarks/*.py")
        if "report.parser(" in path.read_text("utf-8") and path.stem != "report"
    )
    result = run(["-c", ASK, *names], environment, cwd=checkout)
    assert result.returncode == 0, result.stderr.decode("utf-8", "replace")
    for name, (status, text) in json.loads(result.stdout).items():
        text = " ".join(text.split())
        assert status == 0 and f"python -m benchmarks.{name}" in text, name
        assert "-OO" in environment[1] or re.search(r"second|minute|hour", text), (
            f"{name} doesn't say how long it takes"
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&- >&-", "2>&-"])
def test_without_standard_streams(closed, checkout, tmp_path, long):
    if closed != "<&- >&- 2>&-" and not long:
        pytest.skip("the long form: the short one closes all three")
    command = [sys.executable, "-m", "benchmarks.sinusoid", *BENCHMARKS["sinusoid"], "--out", str(tmp_path)]
    record = tmp_path / "s.json"
    line = ["sh", "-c", f'exec "$@" {closed}', "sh", *command, "--json", str(record)]
    result = subprocess.run(line, cwd=checkout, capture_output=True, check=False)
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr
    assert json.loads(record.read_text())["figures"]["maml"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_reader_that_stops_reading_is_no_error(name, stream, checkout, tmp_path, long):
    """As `| head` is: no traceback, neither when the text is written nor when Python ends."""
    options = [["--help"], *([BENCHMARKS[name]] if name == "sinusoid" or long else [])]
    if not long and name not in ("sinusoid", "omniglot") or not long and stream == "stderr" and name != "sinusoid":
        pytest.skip("the long form: the short one is sinusoid's and omniglot's")
    for arguments in options:
        read, write = os.pipe()
        os.close(read)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write}
        command = ["-m", f"benchmarks.{name}", *arguments, "--out", tmp_path]
        result = run(command, cwd=checkout, capture_output=False, **streams)
        os.close(write)
        said = (result.stdout or b"") + (result.stderr or b"")
        assert not re.search(rb"Traceback|Exception ignored|BrokenPipe", said), said.decode()
        assert result.returncode in (0, 1)


# ---- the library -----------------------------------------------------------------------------------------------------

LIBRARY = """
import sys, warnings
import numpy as np
import tinymeta as tm

third_party = {name.split(".")[0] for name in sys.modules} & {"matplotlib", "torch", "jax", "PIL", "tqdm", "scipy"}
assert_ = lambda truth: None if truth else sys.exit("wrong")
assert_(not third_party)
rng = np.random.default_rng(0)
loss = lambda phi, data: tm.nn.mse(tm.nn.mlp(phi, data[0], activation=tm.tanh), data[1])
theta = tm.nn.init_mlp(rng, (1, 4, 1), np.float64)
support, query = tm.tasks.sinusoid.training_batch(rng, 4, 5, dtype=np.float64)
calls = {
    "maml": lambda theta, s, q: tm.meta.maml(loss, theta, s, q, alpha=0.01, steps=2),
    "imaml": lambda theta, s, q: tm.meta.imaml(loss, theta, s, q, alpha=0.01, steps=2, lam=50.0, cg_steps=2),
}
digest = []
for f in calls.values():
    for g in (f, tm.compile(f), tm.compile(f, passes=())):
        query_loss, meta_grad = g(theta, support, query)
        digest += [query_loss.data.tobytes().hex(), *(m.data.tobytes().hex() for m in meta_grad)]
tm.check_grads(lambda w: tm.sum(tm.tanh(w) ** 2), [rng.standard_normal(3)])
x = tm.Tensor([1.0, 2.0])
for wrong, said in [
    (lambda: np.exp(x), "would lose the graph"),
    (lambda: tm.grad(x, [x]), "grad needs a scalar"),
    (lambda: tm.meta.maml(loss, theta, np.ones((2, 3)), np.ones((3, 3)), alpha=0.1, steps=1), "first axis"),
    (lambda: tm.compile(lambda y: y * y.item())(np.ones(())), "depends on values"),
]:
    try:
        wrong()
        sys.exit(said)
    except (TypeError, ValueError) as error:
        assert_(said in str(error))
images = tm.tasks.glyphs.load().images
graph = tm.tensor.graph(tm.sum(x * x))
sys.stdout.write(__import__("hashlib").sha256("".join(digest).encode() + images.tobytes()).hexdigest())
"""


def library(environment, cwd, path):
    variables, flags, more = environment
    result = run(["-c", LIBRARY], ({**variables, "PYTHONPATH": str(path)}, flags, more), cwd=cwd)
    assert result.returncode == 0 and not result.stderr, result.stderr.decode("utf-8", "replace")
    return result.stdout


def test_the_library_anywhere(checkout, tmp_path, long):
    """From another folder than its own, of which it needs nothing and where it leaves nothing; with NumPy alone."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o555)
    expected = library(({}, [], {}), elsewhere, ROOT)
    for environment in ({**MIXED, **ENVIRONMENTS} if long else MIXED).values():
        assert library(environment, elsewhere, checkout) == expected
    assert not list(elsewhere.iterdir())


def test_no_code_depends_on_assertions_or_docstrings():
    """`assert` is gone under -O, and so is a check that consists of one."""
    for path in [*ROOT.glob("tinymeta/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        assert not re.search(r"^\s*assert\b", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_files_are_read_in_a_stated_encoding():
    """Text in the locale's own is another text elsewhere."""
    opened = re.compile(r"\.(?:read_text|write_text)\((?![^\n]*encoding=)|\bopen\((?![^\n]*(?:\"[rwxa]b\"|encoding=))")
    found = []
    for path in [*ROOT.glob("tinymeta/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [f"{path.name}:{i + 1}: {line.strip()}" for i, line in enumerate(lines) if opened.search(line)]
    allowed = "/proc/|archive.open|Image.open|Redirects|os.open"
    assert [line for line in found if not re.search(allowed, line)] == []
