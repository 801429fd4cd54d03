"""How much do the tests catch? One small mistake at a time is put into tinymeta, and the tests that run its line too.

    python -m tests.mutate                              everything
    python -m tests.mutate --only ops.py conv.py        some files
    python -m tests.mutate --sample 200 --seed 1        a sample

The mistakes are of one expression each: another operator; a term, factor, operand, argument, sign or `not` left out; a
number or flag changed; two neighbours exchanged; a condition turned round; a statement dropped; every pullback negated
and doubled. What only makes an error message is left alone. A mistake that no test catches is a survivor: a test is
missing, or the mistake changes no result. The latter are listed in equivalent.txt, by reasons, and not made.

All tests are collected once. Each mistake then gets a fork of that process, where the code of the live functions is
exchanged; only if other code has changed does the fork import everything afresh. Which tests run which lines, and for
how long, is found out first, by sys.settrace, and kept beside --out. Tests that run in a process of their own, and
those of the benchmarks, don't count. All of it takes about 50 minutes on two cores, 8 of them for the tracing.
"""

import argparse
import ast
import gc
import hashlib
import itertools
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import types
from collections import Counter, defaultdict
from functools import cache, partial
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from tests.mistakes import SOURCE, mutants, parsed

ROOT = SOURCE.parent
OURS = tuple(f"{ROOT / folder}{os.sep}" for folder in ("tinymeta", "tests", "benchmarks"))  # a .venv may lie beside
FILES = [
    *("ops.py", "conv.py", "nn.py", "solvers.py", "calculus.py", "tensor.py"),
    *sorted(f"meta/{path.name}" for path in (SOURCE / "meta").glob("[!_]*.py")),
    *("kernels.py", "program.py", "compiled.py", "tasks/sinusoid.py", "tasks/episodes.py", "check.py"),
]
OTHER_TESTS = """mutate readme speed complexity omniglot omniglot_data glyphs implicit_benchmark leap_benchmark draw
    lesson everywhere faults hostile long differential""".split()
TESTS = ["tests", "tinymeta", *(f"--ignore=tests/test_{name}.py" for name in OTHER_TESTS)]
QUIET = ["-s", "-p", "no:terminal", "-p", "no:cacheprovider"]
MEMORY = 4 << 30  # bytes that a mistake may take
CALLS = 300  # of a function, that are traced in a test

# ---- running tests ---------------------------------------------------------------------------------------------------


class Plugin:
    """Lets pytest collect, and takes over: work(plugin, {name: test}, did the collection fail)."""

    def __init__(self, work):
        self.work, self.failed = work, False

    def pytest_runtestloop(self, session):
        self.work(self, {item.nodeid: item for item in session.items}, session.testsfailed)
        return True

    def pytest_runtest_logreport(self, report):
        self.failed |= report.failed

    def fails(self, item, following=None):
        self.failed = False
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return self.failed

    def first_failure(self, items, tests):
        """The first of {name: seconds} that fails, or None. One that takes far too long ends this process."""
        names = [name for name in tests if name in items]
        for name, following in zip(names, [*names[1:], None]):
            signal.alarm(20 + int(10 * tests[name]))
            if self.fails(items[name], items.get(following)):
                return name
        return None


def trial(mutant, tests, plugin, items):
    """The test that catches it, or None. Call it in a fork: nothing is put back."""
    path = str(SOURCE / mutant.file)
    old = compile((SOURCE / mutant.file).read_bytes(), path, "exec")
    mutant.put()
    new = compile(ast.fix_missing_locations(parsed(mutant.file)), path, "exec")
    live = {key: found for key, found in functions(path).items() if key[1] not in run_at_import(mutant.file)}
    if exchange(old, new, live, False):
        return plugin.first_failure(items, tests)
    return trial_afresh(path, new, tests)


@cache
def run_at_import(file):
    """The names that are called outside of functions, as decorators or by map: the makers of functions."""
    todo, names = list(parsed(file).body), set()
    while todo:
        node = todo.pop()
        decorators = getattr(node, "decorator_list", None)
        calls = [n for root in (decorators or [node]) for n in ast.walk(root) if isinstance(n, ast.Call)]
        called = [part for call in calls for part in (call.func, *call.args)] if decorators != [] else []
        names |= {n.id for n in [*(decorators or []), *called] if isinstance(n, ast.Name)}
        todo += node.body if isinstance(node, ast.ClassDef) else []
    return names


@cache
def functions(path):
    """{(line, name): the live functions that are defined there}"""
    live = defaultdict(list)
    for f in gc.get_objects():
        if isinstance(f, types.FunctionType) and f.__code__.co_filename == path:
            live[f.__code__.co_firstlineno, f.__code__.co_name].append(f)
    return live


def exchange(old, new, live, within):
    """Give the new code to the live functions; False if that isn't enough, because what runs at import differs."""
    found = live.get((old.co_firstlineno, old.co_name), [])
    within = within or bool(found)
    if not within and looks(old) != looks(new) or found and old.co_freevars != new.co_freevars:
        return False
    for f in found:
        f.__code__ = new
    inner = [[c for c in code.co_consts if isinstance(c, types.CodeType)] for code in (old, new)]
    return all([exchange(*pair, live, within) for pair in zip(*inner)])


def looks(code):
    constants = [repr(c) for c in code.co_consts if not isinstance(c, types.CodeType)]
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_cellvars


def trial_afresh(path, code, tests):
    for name, module in list(sys.modules.items()):
        if name != __name__ and str(getattr(module, "__file__", "")).startswith(OURS):
            del sys.modules[name]
    get_code, caught = SourceFileLoader.get_code, ["import"]
    SourceFileLoader.get_code = lambda self, name: code if self.path == path else get_code(self, name)

    def work(plugin, items, broken):
        if not broken:
            caught[0] = plugin.first_failure(items, tests)

    signal.alarm(60)
    pytest.main([*QUIET, *dict.fromkeys(name.split("::")[0] for name in tests)], plugins=[Plugin(work)])
    return caught[0]


def forked(tasks, jobs, work):
    """(task, work(task)) of each, `jobs` at a time in forks of this process; "time" if the alarm ended one, or "end"."""
    tasks, running = iter(tasks), {}
    while True:
        for task in itertools.islice(tasks, jobs - len(running)):
            reader, writer = os.pipe()
            pid = os.fork()
            if not pid:
                for stream in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
                try:
                    with open(writer, "w") as pipe:
                        json.dump(work(task), pipe)
                finally:
                    os._exit(0)
            os.close(writer)
            running[reader] = task, pid, bytearray()
        if not running:
            return
        for reader in select.select([*running], [], [])[0]:
            task, pid, result = running[reader]
            part = os.read(reader, 1 << 16)
            result += part
            if not part:
                os.close(reader)
                del running[reader]
                died = os.waitpid(pid, 0)[1]
                yield task, "time" if died == signal.SIGALRM else json.loads(result) if result else "end"


# ---- which tests run which lines -------------------------------------------------------------------------------------


def coverage(path, jobs, plugin, items):
    """{test: (seconds, {file: lines that it runs, those in lambdas negative})}. What `path` knows is not run again."""
    digest = lambda paths: hashlib.sha1(b"".join(p.read_bytes() for p in sorted(paths))).hexdigest()
    helpers = [ROOT / "tests" / f"{name}.py" for name in ("conftest", "programs", "regression")]
    shared = digest([*SOURCE.rglob("*.py"), *helpers])
    key = {name: f"{shared} {digest([item.path])} {name}" for name, item in items.items()}
    known = dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}
    todo = [name for name in items if key[name] not in known]
    with path.open("a") as file:
        for i, (name, found) in enumerate(forked(todo, jobs, lambda name: traced(plugin, items[name])), 1):
            known[key[name]] = found
            print(json.dumps([key[name], found]), file=file, flush=True)
            progress(f"{i} of {len(todo)} tests traced")
    broken = [name for name in items if not isinstance(known[key[name]], list)]
    print(*(f"left out, fails without a mistake: {name}\n" for name in broken), end="")
    return {name: known[key[name]] for name in items if name not in broken}


def traced(plugin, item):
    lines, calls = defaultdict(set), Counter()
    files = {str(SOURCE / file): file for file in FILES}

    def tracer(frame, event, _):
        code = frame.f_code
        calls[code] += 1
        if code.co_filename not in files or calls[code] > CALLS:
            return None
        sign, found = -1 if code.co_name == "<lambda>" else 1, lines[files[code.co_filename]]

        def note(frame, event, _):
            found.add(sign * frame.f_lineno)
            return note

        return note

    threading.settrace(tracer)
    sys.settrace(tracer)
    plugin.fails(item)
    sys.settrace(None)
    threading.settrace(None)
    start = time.monotonic()
    failed = plugin.fails(item)
    return not failed and [round(time.monotonic() - start, 4), {file: sorted(found) for file, found in lines.items()}]


# ---- the run ---------------------------------------------------------------------------------------------------------


def campaign(args, plugin, items, broken):
    if broken:
        raise SystemExit("some tests can't be collected: run pytest first")
    seconds, tests_of = {}, defaultdict(set)
    for name, (duration, files) in coverage(args.out.with_suffix(".lines"), args.jobs, plugin, items).items():
        seconds[name] = duration
        for file, lines in files.items():
            for line in (None, *lines):
                tests_of[file, line].add(name)
    equivalent = set((ROOT / "tests/equivalent.txt").read_text().splitlines())
    chosen = [m for file in args.only or FILES for m in mutants(file) if f"{m.file} {m.name}" not in equivalent]
    if args.sample:
        chosen = sorted(random.Random(args.seed).sample(chosen, min(args.sample, len(chosen))), key=chosen.index)
    digest = {file: hashlib.sha1((SOURCE / file).read_bytes()).hexdigest() for file in FILES}
    caught = dict(map(json.loads, args.out.read_text().splitlines())) if args.out.exists() else {}
    key = {m: f"{digest[m.file]} {m.file} {m.name}" for m in chosen}
    todo = [m for m in chosen if key[m] not in caught or args.again and not caught[key[m]]]
    successful = defaultdict(set)  # tests that have caught a mistake in the same function, which come first

    def tests(m):
        names = set().union(*(tests_of[m.file, line] for line in m.lines)) or tests_of[m.file, None]  # run at import?
        own = f"test_{Path(m.file).stem}."
        order = sorted(names, key=lambda name: (name not in successful[m.scope], own not in name, seconds[name]))
        total = itertools.accumulate(seconds[name] for name in order)
        return {name: seconds[name] for name, until in zip(order, total) if until < args.budget}

    def work(m):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        return trial(m, tests(m), plugin, items)

    for file in FILES:
        functions(str(SOURCE / file))
    gc.freeze()  # or every fork would copy what its collector looks at
    with args.out.open("a") as file:
        for i, (m, by) in enumerate(forked(todo, args.jobs, work), 1):
            caught[key[m]] = by
            successful[m.scope].add(by)
            print(json.dumps([key[m], by]), file=file, flush=True)
            progress(f"{i} of {len(todo)} mistakes, {sum(not caught.get(key[n], True) for n in chosen)} survive")
    page([(m, caught[key[m]]) for m in chosen])


def progress(text):
    print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def page(outcomes):
    print(f"\n{'file':<25} {'mistakes':>9} {'caught':>9} {'by time':>9} {'survive':>9} {'share caught':>13}")
    for file in [*dict.fromkeys(m.file for m, _ in outcomes), "all"]:
        by = [by for m, by in outcomes if file in (m.file, "all")]
        late, alive = by.count("time"), by.count(None)
        print(f"{file:<25} {len(by):>9} {len(by) - late - alive:>9} {late:>9} {alive:>9} {1 - alive / len(by):>13.1%}")
    print(*(m for m, by in outcomes if by is None), sep="\n")


def main():
    parser = argparse.ArgumentParser(
        "python -m tests.mutate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="FILE", choices=FILES, help=f"some of {', '.join(FILES)}")
    parser.add_argument("--sample", type=int, metavar="N", help="so many mistakes, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (2)")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests for one mistake (60), fastest first")
    out = Path(tempfile.gettempdir(), "tinymeta-mutate.jsonl")
    parser.add_argument("--out", type=Path, default=out, help=f"results; a run goes on where another stopped ({out})")
    parser.add_argument("--again", action="store_true", help="run survivors again: there are new tests")
    args = parser.parse_args()
    args.out = args.out.resolve()
    os.chdir(ROOT)
    sys.exit(pytest.main([*QUIET, *TESTS], plugins=[Plugin(partial(campaign, args))]))


if __name__ == "__main__":
    main()
