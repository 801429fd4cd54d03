"""The mutation run itself: mistakes that must be caught, and one that changes no result and can't be."""

import json
import subprocess
import sys
from pathlib import Path

import mutate

CAUGHT = [
    (
        "ops.py",
        "lambda y, y_bar: y_bar * (1 - y * y)",
        "lambda y, y_bar: 2 * (y_bar * (1 - y * y))",
    ),  # a pullback, doubled
    ("solvers.py", "p - lr * d", "p + lr * d"),
    ("solvers.py", "rule(phi, g, state, lr=lr)", "rule(g, phi, state, lr=lr)"),
    ("meta/reptile.py", "mean(p, axis=0)", "mean(p)"),
    ("meta/reptile.py", "0", "1"),
    ("ops.py", "setattr(Tensor, f'__{_name}__', _op)", "pass"),  # runs at import
]
EQUIVALENT = ("solvers.py", "1", "2")  # deque(..., maxlen=1).pop()

RUN = """
import json, sys, pytest
from tests import mutate

def work(plugin, items, broken):
    wanted, tests = json.loads(sys.argv[1]), dict.fromkeys(items, 1.0)
    chosen = [m for file in ("ops.py", "solvers.py", "meta/reptile.py") for m in mutate.mutants(file) if str(m) in wanted]
    for m, by in mutate.forked(chosen, 2, lambda m: mutate.trial(m, tests, plugin, items)):
        print(json.dumps([str(m), by]))

pytest.main([*mutate.QUIET, "tests/test_reptile.py", "tests/test_calculus.py"], plugins=[mutate.Plugin(work)])
"""


def find(file, before, after, scope=None):
    return next(
        str(m) for m in mutate.mutants(file) if (m.before, m.after) == (before, after) and scope in (None, m.scope)
    )


def test_mistakes_are_caught():
    caught, equivalent = [find(*mistake) for mistake in CAUGHT], find(*EQUIVALENT, scope="gradient_descent")
    command = [sys.executable, "-c", RUN, json.dumps([*caught, equivalent])]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    by = dict(map(json.loads, result.stdout.splitlines()))
    assert set(by) == {*caught, equivalent}, result.stderr
    assert [mistake for mistake in by if by[mistake] is None] == [equivalent]


def test_all_kinds_of_mistakes_are_made():
    """In conv2d's file; none of them twice, and none in an error message."""
    made = list(mutate.mutants("conv.py"))
    assert len(set(map(str, made))) == len(made) > 150
    for before, after in [
        ("n * h * w_out", "n * h / w_out"),
        ("n * h * w_out", "n * h"),
        ("size - n", "size + n"),  # of a longer sum only the last operator: see below
        ("x.ndim < 3", "x.ndim <= 3"),
        ("-3", "3"),
        ("y.ndim < 5 or len(shape) < 3", "len(shape) < 3"),
        ("mean(x, axis=(-3, -2))", "mean(x)"),
        ("lambda y, y_bar: unpatch(y_bar, x.shape, stride, padding)",
         "lambda y, y_bar: -unpatch(y_bar, x.shape, stride, padding)"),
    ]:  # fmt: skip
        assert any(before in m.before and after in m.after for m in made), (before, after)
    assert not any("whole number" in m.before for m in made)
