"""README.md is true: its code runs, its commands and files exist, its tables are what was measured."""

import re
from pathlib import Path

import numpy as np
import pytest

import tinymeta as tm
from benchmarks import readme
from regression import assert_close, loss, problem

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_tables_are_up_to_date():
    assert readme.updated(TEXT) == TEXT, "run: python -m benchmarks.readme"


def test_the_code_runs_and_the_inner_loop_is_maml():
    names = {"tm": tm, "np": np}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        if not block.startswith(">>>"):  # those are doctests
            exec(block, names)
    assert np.isfinite(names["query_loss"].item())
    theta, support, query = problem(tasks=1)

    def one_task(theta, data):
        return loss([t[None] for t in theta], data)[0]

    meta_grad = names["meta_gradient"](one_task, theta, support, query, alpha=0.05, steps=3)
    _, expected = tm.meta.maml(loss, theta, support, query, alpha=0.05, steps=3)
    assert_close(meta_grad, [g.data for g in expected], rtol=1e-12)


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)]+)\)", TEXT))
def test_linked_files_exist(path):
    assert (ROOT / path).exists()


def test_the_engine_stays_small():
    lines = sum(len((ROOT / f"tinymeta/{name}.py").read_text().splitlines()) for name in ("tensor", "ops", "calculus"))
    assert lines < 900
