"""Both READMEs are true: their code runs, their commands, links and files exist, their tables are what was measured."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import tinymeta as tm
from benchmarks import readme, report
from regression import assert_close, loss, problem

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page: page.read_text(encoding="utf-8") for page in readme.PAGES}
LINKS = [(page, target) for page, text in PAGES.items() for target in re.findall(r"\]\(([^)]+)\)", text)]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_tables_are_up_to_date(page):
    assert readme.updated(PAGES[page]) == PAGES[page], "run: python -m benchmarks.readme"


def test_the_code_runs_and_the_inner_loop_is_maml():
    names = {"tm": tm, "np": np}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        if not block.startswith(">>>"):  # those are doctests
            exec(block, names)
    assert np.isfinite(names["result"][0].item())
    theta, support, query = problem(tasks=1)

    def one_task(theta, data):
        return loss([t[None] for t in theta], data)[0]

    meta_grad = names["meta_gradient"](one_task, theta, support, query, alpha=0.05, steps=3)
    _, expected = tm.meta.maml(loss, theta, support, query, alpha=0.05, steps=3)
    assert_close(meta_grad, [g.data for g in expected], rtol=1e-12)


@pytest.mark.parametrize("page, target", LINKS, ids=lambda x: x if isinstance(x, str) else x.parent.name)
def test_linked_files_and_headings_exist(page, target):
    path, _, anchor = target.partition("#")
    assert (page.parent / path).exists()
    headings = re.findall(r"^#+ (.*)", (page.parent / path).read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
    assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]


@pytest.mark.parametrize(
    "module", sorted(set(re.findall(r"python -m (benchmarks\.[a-z_]+\b|tinymeta|tests\.\w+)", "".join(PAGES.values()))))
)
def test_commands_exist(module):
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("record", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.name)
def test_no_record_names_a_folder_of_a_machine(record):
    assert not re.search(r"[\s=]/\w", json.loads(record.read_text(encoding="utf-8"))["command"])


def test_records_name_files_without_their_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["a.py", "--json", "/home/me/a.json", "--out=/x/y", "--data", "zips/a", "--seed", "1"]
    )
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    report.write_json(tmp_path / "r.json", {}, {}, {"total": 1})
    command = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["command"]
    assert command == "a.py --json a.json --out=y --data zips/a --seed 1"


def test_the_engine_stays_small():
    lines = sum(
        len((ROOT / f"tinymeta/{name}.py").read_text(encoding="utf-8").splitlines())
        for name in ("tensor", "ops", "calculus")
    )
    assert lines < 900
