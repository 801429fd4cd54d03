"""The mutation run itself: mistakes that must be caught, and one that changes no result and can't be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import mistakes

CAUGHT = [
    "ops.py tanh: lambda y, y_bar: y_bar * (1 - y * y)  ->  lambda y, y_bar: 2 * (y_bar * (1 - y * y))",
    "ops.py : setattr(Tensor, f'__{_name}__', _op)  ->  pass",  # runs at import
    "solvers.py step: p - lr * d  ->  p + lr * d",
    "solvers.py update: rule(params, grads, state, lr=lr)  ->  rule(grads, params, state, lr=lr)",
    "meta/reptile.py reptile: mean(p, axis=0)  ->  mean(p)",
    "meta/reptile.py reptile: 0  ->  1",
]
EQUIVALENT = "solvers.py gradient_descent: 1  ->  2"  # deque(..., maxlen=1).pop()

RUN = """
import json, sys, pytest
from tests import mutate

def work(plugin, items, broken):
    wanted, tests = json.loads(sys.argv[1]), dict.fromkeys(items, 1.0)
    made = {f"{m.file} {m.name}": m for file in ("ops.py", "solvers.py", "meta/reptile.py") for m in mutate.mutants(file)}
    for name, by in mutate.forked(wanted, 2, lambda name: mutate.trial(made[name], tests, plugin, items)):
        print(json.dumps([name, by]))

pytest.main([*mutate.QUIET, "tests/test_reptile.py", "tests/test_calculus.py"], plugins=[mutate.Plugin(work)])
"""


def test_mistakes_are_caught():
    command = [sys.executable, "-c", RUN, json.dumps([*CAUGHT, EQUIVALENT])]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    by = dict(map(json.loads, result.stdout.splitlines()))
    assert set(by) == {*CAUGHT, EQUIVALENT}, result.stderr
    assert [name for name in by if "::" not in str(by[name])] == [EQUIVALENT] and by[EQUIVALENT] is None, by


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 puts other parentheses around tuples")
def test_the_mistakes_that_are_left_alone_exist():
    """An entry of equivalent.txt that fits no line any more would leave alone nothing, or another mistake."""
    entries = (Path(__file__).parent / "equivalent.txt").read_text(encoding="utf-8").splitlines()
    entries = [entry for entry in entries if not entry.startswith("# ")]
    files = dict.fromkeys(entry.split()[0] for entry in entries)
    assert set(entries) <= {f"{file} {m.name}" for file in files for m in mistakes.mutants(file)}


def test_mistakes_of_every_kind_are_made():
    """In the file of conv2d; none of them twice, and none in an error message."""
    made = [m.name for m in mistakes.mutants("conv.py")]
    assert len(set(made)) == len(made)
    for name in [
        "conv2d: k * k * c  ->  k * k / c",
        "conv2d: n * h * w_out  ->  n * h",
        "padding_of: (-(-n // stride) - 1) * stride + size - n  ->  -n",
        "padding_of: padding >= 0  ->  padding > 0",
        "padding_of: padding >= 0  ->  padding <= 0",
        "padding_of: -n  ->  n",
        "max_pool: 3  ->  4",
        "average_pool: mean(patches(x, size, size if stride is None else stride), axis=(-3, -2))"
        "  ->  mean(patches(x, size, size if stride is None else stride))",
        "unpatch: y.ndim < 5 or len(shape) < 3  ->  y.ndim < 5 and len(shape) < 3",
        "unpatch: y.ndim < 5 or len(shape) < 3  ->  len(shape) < 3",
        "patches: lambda y, y_bar: unpatch(y_bar, x.shape, stride, padding)"
        "  ->  lambda y, y_bar: -unpatch(y_bar, x.shape, stride, padding)",
        "patches: x = Tensor(x)  ->  pass",
        "patches: unpatch(y_bar, x.shape, stride, padding)  ->  unpatch(x.shape, y_bar, stride, padding)",
    ]:
        assert name in made
    assert not any("whole number" in name for name in made)
