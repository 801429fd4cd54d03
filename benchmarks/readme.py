"""Write the tables of README.md and benchmarks/README.md from results/ and from the source: all there was measured.

A test fails when one of them is not what this command would write. It also draws omniglot_5way_1shot.png.
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.complexity import METHODS
from benchmarks.omniglot_pictures import draw_methods
from tinymeta.tasks.files import write_whole

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "README.md", ROOT / "benchmarks/README.md"
READING_ORDER = [
    "lesson/first_order", "tensor", "ops", "kernels", "conv", "calculus", "check", "program", "compiled", "nn",
    "solvers", "meta/adapt", "meta/maml", "meta/meta_sgd", "meta/maml_plus_plus", "meta/anil", "meta/dropout",
    "meta/reptile", "meta/leap", "meta/imaml", "meta/shrinkage", "meta/hypergradient", "meta/es_maml", "meta/finite",
    "tasks/sinusoid", "tasks/episodes", "tasks/files", "tasks/omniglot", "tasks/glyphs", "draw", "lesson/explain",
    "arguments",
]  # fmt: skip


def recorded(path):
    """The record of a run. ValueError, with its name, if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from error


def sinusoid():
    """K = 5 after 0, 1, 5 and 10 steps, the published figures below ours."""
    from benchmarks.sinusoid import COLUMNS, METHODS, PUBLISHED

    record = recorded(ROOT / "benchmarks/results/sinusoid.json")
    rows = ["| gradient steps | " + " | ".join(map(str, COLUMNS)) + " | median after 10 | worse |", "|---" * 7 + "|"]
    for name, figures in record["figures"].items():
        r = figures["5"]
        cells = [f"{r['mean'][k]:.2f} ± {r['half_width'][k]:.2f}" for k in COLUMNS]
        rows.append(f"| {METHODS[name].title} | {' | '.join(cells)} | {r['median'][10]:.2f} | {r['worse']:.1%} |")
        if name in PUBLISHED:
            cells = [str(PUBLISHED[name].get(k, "")) for k in COLUMNS]
            rows.append(f"| *published* | {' | '.join(f'*{c}*' if c else '' for c in cells)} | | |")
    machine = record["machine"]
    rows.append(
        f"\nMeasured on {machine['processor']}, {machine['cores']} cores, NumPy {machine['numpy']}, in"
        f" {record['seconds']['total'] / 60:.0f} minutes; seed {record['settings']['seed']}, commit {record['commit']}."
    )
    return rows


def omniglot_records():
    """[(settings, record, record of the test that is not transductive, or None)] of the methods, 5-way 1-shot."""
    from benchmarks.omniglot_protocols import TITLES, Settings

    def read(name):
        path = ROOT / f"benchmarks/results/omniglot_5way_1shot_{name}.json"
        return recorded(path) if path.exists() else None

    records = [(read(method), read(f"{method}_not_transductive")) for method in TITLES]
    if not any(record for record, _ in records):
        raise FileNotFoundError("no record benchmarks/results/omniglot_5way_1shot_METHOD.json")
    return [(Settings(**record["settings"]), record, alone) for record, alone in records if record]


def omniglot():
    """5-way 1-shot, by method, the published figures below ours."""
    from benchmarks.omniglot_protocols import TITLES, published

    rows = ["| | transductive | not | untrained | iterations × tasks | minutes |", "|---" * 6 + "|"]
    for s, record, alone in omniglot_records():
        scores = [r["figures"]["score"] if r else None for r in (record, alone)]
        cells = [f"{score['mean']:.2f} ± {score['half_width']:.2f}" if score else "" for score in scores]
        untrained = record["figures"]["untrained"]["mean"][s.test_steps]
        rows.append(
            f"| {TITLES[s.method]} | {' | '.join(cells)} | {untrained:.1f} | {s.iterations} × {s.tasks} |"
            f" {record['seconds']['total'] / 60:.0f} |"
        )
        known = [published(s, transductive) for transductive in (True, False)]
        rows.append(f"| *published* | {' | '.join(f'*{k[1]} ± {k[2]}*' if k else '' for k in known)} | | | |")
    machine, figures = record["machine"], record["figures"]
    commits = dict.fromkeys(r["commit"] for _, *pair in omniglot_records() for r in pair if r)
    rows.append(
        f"\nMeasured on {machine['processor']}, {machine['cores']} cores, NumPy {machine['numpy']}, several trainings"
        f" at a time; {figures['tasks']} test tasks, seed {s.seed}, commits {', '.join(commits)}."
    )
    return rows


def family():
    """The sine waves by every algorithm after the same number of iterations, K = 5."""
    from benchmarks.sinusoid import METHODS

    record = recorded(ROOT / "benchmarks/results/sinusoid_family.json")
    rows = ["| | after 1 step | 5 | 10 | worse |", "|---" * 5 + "|"]
    for name, figures in record["figures"].items():
        r = figures["5"]
        cells = [f"{r['mean'][k]:.2f} ± {r['half_width'][k]:.2f}" if r["mean"][k] < 20 else "–" for k in (1, 5, 10)]
        rows.append(f"| {METHODS[name].title} | {' | '.join(cells)} | {r['worse']:.1%} |")
    iterations, machine = record["settings"]["maml"]["iterations"], record["machine"]
    rows.append(
        f"\n{iterations:,} iterations of 25 tasks each, seed {record['settings']['seed']}; measured on"
        f" {machine['processor']}, {machine['cores']} cores, NumPy {machine['numpy']}, in"
        f" {record['seconds']['total'] / 60:.0f} minutes, commit {record['commit']}."
    )
    return rows


def omniglot_family():
    """5-way 1-shot by every algorithm, after the same small number of iterations."""
    from benchmarks.omniglot_protocols import TITLES, Settings

    rows = ["| | accuracy, % | untrained | ms a step | minutes |", "|---" * 5 + "|"]
    paths = [ROOT / f"benchmarks/results/omniglot_family_{method}.json" for method in TITLES]
    records = [recorded(path) for path in paths if path.exists()]
    if not records:
        raise FileNotFoundError("no record benchmarks/results/omniglot_family_METHOD.json")
    for record in records:
        s, score, seconds = Settings(**record["settings"]), record["figures"]["score"], record["seconds"]
        time = ("", "")  # of a run that was taken up again only to be evaluated
        if "step" in seconds:
            time = f"{1000 * seconds['step']['median']:.0f}", f"{seconds['total'] / 60:.1f}"
        rows.append(
            f"| {TITLES[s.method]} | {score['mean']:.1f} ± {score['half_width']:.1f} |"
            f" {record['figures']['untrained']['mean'][s.test_steps]:.0f} | {' | '.join(time)} |"
        )
    machine = record["machine"]
    rows.append(
        f"\n{s.iterations} iterations of {s.tasks} tasks, {s.filters} filters, seed {s.seed}; transductive, 600 test"
        f" tasks; on {machine['processor']}, {machine['cores']} cores, beside other jobs, commit {record['commit']}."
    )
    return rows


def speed():
    """Our step beside the fastest peer's, by workload."""
    record = recorded(ROOT / "benchmarks/results/speed.json")
    rows = [
        "| | ours, ms | PyTorch, eager | fastest peer, ms | ours / peer | ours / products | first result, s | peak"
        " memory, MB |",
        "|---" * 8 + "|",
    ]
    for name, race in record["figures"]["races"].items():
        results, peer = race["contestants"], race["fastest_peer"]
        ours = min((c for c in results if c.startswith("tinymeta")), key=lambda c: results[c]["median"])
        a, b = results[ours], results[peer]
        eager = min(r["median"] for c, r in results.items() if c.startswith(("torch-hand", "torch-vmap")))
        pairs = [
            f"{r[key]:.2f}" if key == "first" else f"{r[key]:.0f}" for key in ("first", "steady_mb") for r in (a, b)
        ]
        rows.append(
            f"| {name} | {1000 * a['median']:.3g} | {1000 * eager:.3g} | {1000 * b['median']:.3g} ({peer}) |"
            f" {a['median'] / b['median']:.2f} | {a['median'] / race['floor']['median']:.1f} |"
            f" {pairs[0]} / {pairs[1]} | {pairs[2]} / {pairs[3]} |"
        )
    machine = record["machine"]
    versions = ", ".join(f"{k} {machine[k]}" for k in ("numpy", "torch", "jax", "autograd") if k in machine)
    commits = ", ".join(dict.fromkeys(race["commit"] for race in record["figures"]["races"].values()))
    rows.append(f"\nMeasured on {machine['processor']}, {machine['cores']} cores, {versions}; commits {commits}.")
    return rows


def cost():
    """A meta-gradient's compute, peak memory and time at 1, 5 and 16 inner steps."""
    record = recorded(ROOT / "benchmarks/results/complexity.json")
    settings, figures, machine = record["settings"], record["figures"]["convnet"], record["machine"]
    at = [settings["steps"].index(k) for k in (1, 5, 16)]
    rows = ["| | compute, gradients | peak memory, MB | seconds | time / FO-MAML's |", "|---" * 5 + "|"]
    for name, (title, *_) in METHODS.items():
        f, first = figures[name], figures["fomaml"]
        cells = [
            " / ".join(form.format(value) for value in values)
            for form, values in [
                ("{:.0f}", [f["compute"][i] for i in at]),
                ("{:.0f}", [f["peak"][i] / 1e6 for i in at]),
                ("{:.2f}", [f["seconds"][i] for i in at]),
                ("{:.1f}", [f["seconds"][i] / first["seconds"][i] for i in at]),
            ]
        ]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    rows.append(
        f"\nEager, one task, {settings['filters']} filters; measured on {machine['processor']}, {machine['cores']}"
        f" cores, NumPy {machine['numpy']}, commit {record['commit']}. `python -m benchmarks.complexity` repeats it."
    )
    return rows


def files():
    """Every file with the first sentence of its docstring."""
    rows = ["| file | lines | what it holds |", "|---|---|---|"]
    for name in READING_ORDER:
        path = ROOT / f"tinymeta/{name}.py"
        source = path.read_text(encoding="utf-8")
        first = re.split(r"(?<=\.)(?<!al\.)\s", ast.get_docstring(ast.parse(source)))[0].rstrip(".")
        rows.append(f"| [`{name}.py`](tinymeta/{name}.py) | {len(source.splitlines())} | {first} |")
    return rows


def updated(text):
    """The text with its tables as they should be."""
    for make in (cost, sinusoid, family, omniglot, omniglot_family, speed, files):
        between = re.compile(rf"(<!-- table: {make.__name__} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = between.sub(lambda m, make=make: m[1] + "\n".join(make()) + "\n" + m[2], text)
    return text


def main(argv=None):
    argparse.ArgumentParser(
        "python -m benchmarks.readme", description=__doc__, epilog="example: python -m benchmarks.readme   (2 seconds)"
    ).parse_args(argv)
    try:
        texts = [updated(page.read_text(encoding="utf-8")) for page in PAGES]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        sys.exit(f"stopped: a record in benchmarks/results is not what its benchmark writes: {error!r}")
    for page, text in zip(PAGES, texts):
        write_whole(page, text.encode())
    if plt := report.pyplot():
        draw_methods(
            plt,
            [(s, record) for s, record, _ in omniglot_records()],
            ROOT / "benchmarks/results/omniglot_5way_1shot.png",
        )


if __name__ == "__main__":
    report.command(main)
