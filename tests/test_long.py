"""Long runs: memory stays flat, no step does more work than the first, graphs of a million nodes; threads and forks.

Work is counted, in nodes, calls and lines, never timed; times are printed with the other figures (`pytest -s`).
"""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

import tinymeta as tm
from regression import assert_close, finite_difference, loss, problem
from test_program import assert_same, leaves
from tinymeta import program as p
from tinymeta import tensor

ROOT = Path(__file__).parents[1]

ALGORITHMS = {
    "maml": lambda theta, s, q, steps=1: tm.meta.maml(loss, theta, s, q, alpha=0.05, steps=steps),
    "fomaml": lambda theta, s, q, steps=1: tm.meta.fomaml(loss, theta, s, q, alpha=0.05, steps=steps),
    "imaml": lambda theta, s, q, steps=1: tm.meta.imaml(
        loss, theta, s, q, alpha=0.05, steps=steps, lam=9.0, cg_steps=2, report=True
    )[:2],
    "reptile": lambda theta, s, q, steps=1: tm.meta.reptile(loss, theta, s, q, alpha=0.05, steps=steps),
}


def resident():
    """Bytes of memory that the process has now, or where that can't be told, the most that it ever had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        resource = pytest.importorskip("resource", reason="there is no /proc/self/statm and no module resource")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def collector_off():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def visits():
    """A list of the number of nodes visited in each backward walk."""
    counts, walk = [], tensor.ancestors

    def counted(ys, xs):
        counts.append(0)
        for z in walk(ys, xs):
            counts[-1] += 1
            yield z

    tensor.ancestors = counted
    try:
        yield counts
    finally:
        tensor.ancestors = walk


def marathon(name, step, steps):
    """step(), that often: the last steps must do the work of the first ones, and nothing may pile up."""
    window = min(1000, steps // 5)

    def timed():
        start = time.perf_counter()
        for _ in range(window):
            step()
        return time.perf_counter() - start

    def counted():
        """(bytes that five steps left behind, the different numbers of nodes made and visited in a step)."""
        work, held = set(), []
        tracemalloc.start()
        with visits() as visited:
            for _ in range(10):
                before = next(tm.Tensor.serials), len(visited)
                step()
                work.add((next(tm.Tensor.serials) - before[0], sum(visited[before[1] :])))
                held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        return held[-1] - held[-6], work

    def state():
        return resident(), sys.getallocatedblocks(), len(gc.get_objects())

    with collector_off():
        for _ in range(window // 5):
            step()
        counted()  # what is made once, by the counting too
        first, start = timed(), state()
        left_first, work_first = counted()
        for _ in range(steps - 2 * window - window // 5 - 20):
            step()
        left_last, work_last = counted()
        last, end = timed(), state()
        found = gc.collect()
    megabytes = [f"{s[0] / 1e6:.1f}" for s in (start, end)]
    print(
        f"\n{name}: {steps} steps; first and last {window}: {first:.2f} s, {last:.2f} s; resident {megabytes[0]} MB,"
        f" {megabytes[1]} MB; blocks {start[1]}, {end[1]}; left by 5 steps {left_first}, {left_last} bytes;"
        f" nodes made and visited in a step {sorted(work_last)}"
    )
    assert len(work_first) == 1 and work_first == work_last
    assert max(left_first, left_last) < 150_000  # what CPython keeps of freed tuples; a leaked graph a step is more
    assert end[1] - start[1] < 20_000 and end[2] - start[2] < 200
    assert end[0] - start[0] < 3_000_000
    assert found == 0


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eager", "compiled", "sharded"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_training_steps_all_do_the_same_work_and_leave_nothing_behind(name, mode, long, monkeypatch):
    if mode == "sharded":
        pytest.importorskip("threadpoolctl")
    theta = tm.nn.init_mlp(np.random.default_rng(0), (1, 1), np.float64)  # one layer: as few calls a step as can be
    batches = [problem(seed, tasks=2)[1:] for seed in range(3)]
    retraced, trace = [], tm.compiled.Compiled.trace
    monkeypatch.setattr(tm.compiled.Compiled, "trace", lambda *args: [retraced.append(1), trace(*args)][1])
    meta = ALGORITHMS[name]
    if mode == "sharded":
        meta = compiled = tm.compile(meta, tasks=["s", "q"], shards=2)

    def update(theta, state, support, query):
        query_loss, meta_grad = meta(theta, support, query)
        return *tm.stop_gradient(tm.solvers.adam(theta, meta_grad, state, lr=1e-3)), query_loss

    if mode == "compiled":
        update = compiled = tm.compile(update)
    run = [theta, None, 0]

    def step():
        run[:] = *update(*run[:2], *batches[run[2] % 3])[:2], run[2] + 1

    def calls():
        return [len(plan.calls) for _, plans in compiled.programs.values() for plan in plans.values()]

    step()
    step()
    before = calls() if mode != "eager" else []
    marathon(f"{name}, {mode}", step, 100_000 if long else 60)
    assert all(np.isfinite(t.data).all() for t in run[0])
    if mode != "eager":
        # Without a state, then with one: two programs of the whole step; one of the meta-gradient, for two shards
        assert len(retraced) == (2 if mode == "compiled" else 1) and len(before) == 2
        assert calls() == before


def test_a_million_small_gradients(long):
    x = tm.Tensor(np.ones(3))
    marathon("grad", lambda: tm.grad(tm.sum(tm.tanh(x) * x), [x]), 1_000_000 if long else 10_000)


# ---- inner loops -----------------------------------------------------------------------------------------------------


def frozen_body(params, grads, state=None, *, lr):
    """A rule that hands the first two parameters on as they came."""
    moved, state = tm.solvers.sgd(params[2:], grads[2:], state, lr=lr)
    return [*params[:2], *moved], state


def in_turn(params, grads, state=None, *, lr):
    """A rule that moves the weights in one step, the biases in the next."""
    moved, _ = tm.solvers.sgd(params, grads, lr=lr)
    k = state or 0
    return [new if i % 2 == k % 2 else old for i, (new, old) in enumerate(zip(moved, params))], k + 1


def with_options(algorithm, **options):
    return lambda theta, s, q, steps: algorithm(loss, theta, s, q, steps=steps, **options)


INNER = {
    **ALGORITHMS,
    "a frozen body": with_options(tm.meta.maml, alpha=0.05, rule=frozen_body),
    "in turn": with_options(tm.meta.maml, alpha=0.05, rule=in_turn),
    "steps of size 0": with_options(tm.meta.maml, alpha=[0.0, 0.0, 0.05, 0.05]),
    "inner Adam": with_options(tm.meta.maml, alpha=0.05, rule=tm.solvers.adam),
    "anil": with_options(tm.meta.anil, alpha=0.05, head=2),
    "anil, first order": with_options(tm.meta.anil, alpha=0.05, head=2, first_order=True),
    "truncated": with_options(tm.meta.truncated, alpha=0.05, last=2),
    "meta-sgd": lambda theta, s, q, steps: tm.meta.meta_sgd(
        loss, tm.meta.init_meta_sgd(theta, 0.05), s, q, steps=steps
    ),
    "maml++": lambda theta, s, q, steps: tm.meta.maml_plus_plus(
        loss, tm.meta.init_lslr(theta, 0.05, steps), s, q, steps=steps, weights=np.ones(steps) / steps
    ),
    "leap": with_options(tm.meta.leap, alpha=0.05),
}


@pytest.mark.parametrize("name", INNER)
def test_every_inner_step_adds_the_same_work(name):
    """Nodes made, and nodes visited by all walks together: of k steps, a k + b."""
    work = []
    for steps in (4, 8, 12, 16):
        args = problem()
        with visits() as visited:
            before = next(tm.Tensor.serials)
            INNER[name](*args, steps)
            work.append((next(tm.Tensor.serials) - before, sum(visited)))
    more = np.diff(work, axis=0)
    assert (more == more[0]).all(), work


def test_a_body_that_a_rule_freezes_is_anils():
    theta, support, query = problem()
    frozen = tm.meta.maml(loss, theta, support, query, alpha=0.05, steps=5, rule=frozen_body)
    anil = tm.meta.anil(loss, theta, support, query, alpha=0.05, steps=5, head=2)
    assert frozen[0].item() == anil[0].item()
    assert_close(frozen[1], [g.data for g in anil[1]], 1e-13)


def test_a_parameter_that_a_rule_hands_on_has_the_gradient_of_its_step():
    """And not, by way of the other parameters, that of all steps since it was last moved."""
    theta, support, query = problem()

    def query_loss(theta):
        phi = tm.meta.adapt(loss, theta, support, alpha=0.3, steps=4, rule=in_turn)  # leaves after every step
        return tm.mean(loss(phi, query)).item()

    value, meta_grad = tm.meta.maml(loss, theta, support, query, alpha=0.3, steps=4, rule=in_turn)
    assert value.item() == query_loss(theta)
    assert_close(meta_grad, finite_difference(query_loss, theta), 1e-7)


def test_a_thousand_inner_steps(long):
    theta, support, query = problem()
    steps = 1000 if long else 100
    eager = tm.meta.maml(loss, theta, support, query, alpha=0.01, steps=steps)
    compiled = tm.compile(lambda *args: tm.meta.maml(loss, *args, alpha=0.01, steps=steps))
    for _ in range(2):
        assert_same(compiled(theta, support, query), eager)
    ((program, plans),) = compiled.programs.values()
    print(f"\nMAML, {steps} inner steps: {len(program.nodes)} nodes, {len(plans[0].calls)} calls")


# ---- large graphs ----------------------------------------------------------------------------------------------------


def chain(x, nodes):
    for _ in range(nodes):
        x = -x
    return x, (-1.0) ** nodes, 0.0


def polynomial(x, nodes):
    """Every node reads the one before and x."""
    y = x
    for _ in range(nodes // 2):
        y = y * 0.5 + x
    return y * y, 8.0, 8.0  # y → 2x


def diamonds(x, nodes):
    for _ in range(nodes // 5):
        x = x * 0.25 + x * 0.75
    return x, 1.0, 0.0


def wide(x, nodes):
    terms = [x * 2.0 for _ in range(nodes // 2)]
    return tm.sum(tm.concatenate([t[None] for t in terms])), nodes // 2 * 2.0, 0.0


# The stack that one thread may have. CPython 3.13 recurses into nested objects ten thousand deep before it puts off
# freeing the rest, tuples and all other containers too, and needs more than 512 KiB for it.
STACK = {"default": 0, "small": 1 << 20 if sys.version_info[:2] == (3, 13) else 1 << 18}


@pytest.mark.parametrize("stack", STACK)
@pytest.mark.parametrize("build", [chain, polynomial, diamonds, wide])
def test_graphs_of_a_million_nodes(build, stack, long):
    """Made, differentiated once and twice, listed and freed, at the default recursion limit."""
    results, limit = [], sys.getrecursionlimit()

    def work():
        for nodes, twice in [(10**6, False), (10**5, True)] if long else [(10_000, True)]:
            x = tm.Tensor(1.0)
            start = time.perf_counter()
            y, first, second = build(x, nodes)
            (g,) = tm.grad(y, [x], create_graph=twice)
            found = g.item(), tm.grad(g, [x])[0].item() if twice else second
            listed = len(tensor.graph(y, g))
            middle = time.perf_counter()
            del y, g
            spent = middle - start, time.perf_counter() - middle
            print(f"\n{build.__name__}, {stack} stack: {listed} nodes, {spent[0]:.1f} s; freed in {spent[1]:.2f} s")
            results.append((found, (pytest.approx(first), pytest.approx(second)), listed > 0.9 * nodes))

    before = threading.stack_size(STACK[stack])
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert results and all(found == expected and whole for found, expected, whole in results)
    assert sys.getrecursionlimit() == limit == 1000 or limit > 1000


def reshapes(x, nodes):
    for _ in range(nodes // 2):
        x = x.reshape(3, 1).reshape(3)
    return x + 1.0


def backward(x, nodes):
    """Arrays that all live until the walk comes back."""
    y = x
    for _ in range(nodes // 4):
        y = tm.sin(y)
    return tm.grad(tm.sum(y), [x])


def results_of_many_sizes(x, nodes):
    return [tm.broadcast_to(tm.sum(x * float(i)), (i % 7 + 1,)) * 2.0 for i in range(nodes // 4)]


def sums(x, nodes):
    terms = [tm.sin(x * float(i)) for i in range(nodes // 4)]
    total = 0.0
    for t in terms:
        total = total + t
    return total


def selected(x, nodes):
    y = x
    for _ in range(nodes // 3):
        y = tm.where(y > 0, tm.sin(y), y)
    return y


LONG_PROGRAMS = [reshapes, backward, results_of_many_sizes, sums, selected]


def lines_run(f):
    """How many lines of program.py and compiled.py f() runs."""
    count, before, files = 0, sys.gettrace(), (p.__file__, tm.compiled.__file__)

    def local(frame, event, arg):
        nonlocal count
        count += event == "line"
        return local

    sys.settrace(lambda frame, event, arg: local if frame.f_code.co_filename in files else None)
    try:
        f()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("f", LONG_PROGRAMS)
def test_the_work_of_compiling_is_in_proportion_to_the_program(f):
    lines = []
    for nodes in (200, 800, 1400):
        compiled = tm.compile(f)
        lines.append(lines_run(lambda: str(compiled.program(np.ones(3), nodes))))  # noqa: B023
    assert lines[2] - lines[1] < 1.1 * (lines[1] - lines[0]), lines


@pytest.mark.parametrize("f", LONG_PROGRAMS)
def test_long_programs_compile(f, long):
    nodes, x = 100_000 if long else 1000, np.linspace(-0.5, 1, 3)
    compiled, start = tm.compile(f), time.perf_counter()
    first = compiled(x, nodes)
    middle = time.perf_counter()
    assert_same(compiled(x, nodes), first)
    assert_same(first, tm.stop_gradient(f(tm.Tensor(x), nodes)))
    ((program, plans),) = compiled.programs.values()
    assert len(str(program).splitlines()) == len(program.nodes) + 1
    times = f"{middle - start:.2f} s for the first call"
    print(f"\n{f.__name__}: {len(program.nodes)} nodes, {len(plans[0].buffers)} places, {times}")


# ---- threads ---------------------------------------------------------------------------------------------------------


def in_threads(*jobs):
    """Run these functions at once; the first exception of any is raised."""
    errors, ready = [], threading.Barrier(len(jobs))

    def run(job):
        try:
            ready.wait(60)
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # many switches
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def repeat(times, f, args, expected):
    """A job: f(*args), that often, each time to the same bytes."""
    wanted = [y.data.tobytes() for y in leaves(expected)]

    def job():
        for _ in range(times):
            assert [y.data.tobytes() for y in leaves(f(*args))] == wanted

    return job


def hammered(count, long):
    times = 5_000 if long else 12
    print(f"\n{count} threads, {times} calls each")
    return times


def test_several_functions_in_several_threads(long):
    """Eager, compiled and sharded, all algorithms, at once: the bytes of each are those of one thread."""
    pytest.importorskip("threadpoolctl")
    jobs = []
    for i, f in enumerate(ALGORITHMS.values()):
        args = problem(seed=i, tasks=4)
        compiled, sharded = tm.compile(f), tm.compile(f, tasks=["s", "q"], shards=2)
        with_two = compiled, sharded  # each called from two threads
        jobs += [(g, args, tm.compile(f)(*args) if g is compiled else sharded(*args)) for g in with_two * 2]
        jobs.append((f, args, f(*args)))
    times = hammered(len(jobs), long)
    in_threads(*[repeat(times, *job) for job in jobs])


@pytest.mark.parametrize("shards", [1, 2])
def test_one_function_in_several_threads_on_several_shapes(shards, long):
    """Among more shapes than are kept, so that plans come and go while others run."""
    if shards > 1:
        pytest.importorskip("threadpoolctl")
    compiled = tm.compile(
        lambda x, y: (tm.grad(tm.sum(tm.tanh(x @ y) ** 2), [x]), tm.mean(x)), tasks=["x"], stacked=[0], shards=shards
    )
    rng, jobs = np.random.default_rng(0), []
    for i in range(tm.compiled.PROGRAMS + 4 if not long else tm.compiled.PROGRAMS):
        args = rng.standard_normal((2 + i % 3, i + 1)), rng.standard_normal((i + 1, 2))
        jobs.append((compiled, args, compiled(*args)))
    times = hammered(len(jobs), long)
    in_threads(*[repeat(times, *job) for job in jobs])


def test_an_exception_in_one_thread_is_that_threads():
    f = tm.compile(lambda x: (tm.log(x), tm.mean(x)), tasks=["x"], stacked=[0], shards=2)
    x = np.ones((4, 3))
    expected = f(x)

    def fails():
        for _ in range(20):
            with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
                f(np.zeros((4, 3)))
            with pytest.raises(ValueError, match="first axis"):
                f(np.ones(()))

    in_threads(fails, repeat(40, f, (x,), expected), repeat(40, f, (x,), expected))
    assert tensor.state.tape is None and tensor.state.recording


def test_warning_filters_outlive_functions_that_are_traced_at_once():
    """The second run of a trace is silent; two at once would each restore what the other one had set."""
    inside, done = threading.Event(), threading.Event()

    def first(x):
        if not runs.append(1) and len(runs) == 2:  # the silent one
            inside.set()
            entered.wait(0.3)
        return x * 2.0

    def second(x):
        if not others.append(1) and len(others) == 2:
            entered.set()
            done.wait(0.3)
        return x * 3.0

    runs, others, entered, before = [], [], threading.Event(), list(warnings.filters)

    def one():
        tm.compile(first)(np.ones(2))
        done.set()

    def two():
        assert inside.wait(10)
        tm.compile(second)(np.ones(2))

    in_threads(one, two)
    assert list(warnings.filters) == before


def test_blas_has_its_threads_back_after_overlapping_calls():
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def threads():
        return {library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"}

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        if threads() != {2}:
            pytest.skip("this BLAS has no threads")
        first, second = tm.compiled.one_blas_thread()(), tm.compiled.one_blas_thread()()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert threads() == {1}
        second.__exit__(None, None, None)
        assert threads() == {2}


def test_functions_that_are_gone_take_their_threads_with_them():
    pytest.importorskip("threadpoolctl")
    before = threading.active_count()
    for _ in range(5):
        tm.compile(lambda x: [tm.mean(x)], tasks=["x"], shards=4)(np.ones((4, 2)))
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals to a thread")
@pytest.mark.parametrize("interrupts", [1, 2])
def test_ctrl_c_during_shards(interrupts, monkeypatch):
    """The first one waits for the shards, a second one doesn't, and leaves them arrays that nobody else writes into."""
    pytest.importorskip("threadpoolctl")
    f = tm.compile(lambda x: (tm.mean(x), x * 2.0), tasks=["x"], stacked=[1], shards=2)
    x, expected = np.arange(6.0).reshape(2, 3), f(np.arange(6.0).reshape(2, 3))
    late, ended, used, go_on, left, call = [], [], [], threading.Event(), threading.Event(), p.Plan.__call__

    def slow(plan, values):
        late.append(plan)
        go_on.wait(20)
        ended.append(call(plan, values))

    def interrupt():
        while len(late) < 2:
            time.sleep(0.01)
        for _ in range(interrupts):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            if left.wait(0.3):
                break
        if interrupts == 1:
            go_on.set()

    monkeypatch.setattr(p.Plan, "__call__", slow)
    thread, handler = threading.Thread(target=interrupt), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            f(x)
        left.set()
        ended_before = len(ended)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, handler)
    assert ended_before == (2 if interrupts == 1 else 0)
    if interrupts == 2:
        f.pool = None  # both of its threads still wait
    monkeypatch.setattr(p.Plan, "__call__", lambda plan, values: [used.append(plan), call(plan, values)][1])
    assert_same(f(x), expected)
    assert len(used) == 2 and not any(plan is other for plan in used for other in late)
    go_on.set()


FORKS = """
import multiprocessing, os, sys, threading
import numpy as np
import tinymeta as tm

f = tm.compile(lambda x: (tm.mean(tm.tanh(x) ** 2), x * 2.0), tasks=["x"], stacked=[1], shards=2)
x = np.linspace(-1, 1, 12).reshape(4, 3)

def result(_=None):
    return b"".join(y.data.tobytes() for y in f(x))

def in_child():
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, result())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return data

if __name__ == "__main__":
    expected = result()
    assert in_child() == expected, "after use"
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(result, range(4)) == [expected] * 4, "a pool of forks"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(result, range(2)) == [expected] * 2, "a fresh process"

    # While another thread is inside a call and holds every lock there is: f's, the trace's, BLAS's
    inside, go_on, call = threading.Event(), threading.Event(), tm.program.Plan.__call__
    def slow(plan, values):
        if threading.current_thread() is not threading.main_thread() and os.getpid() == parent:
            inside.set()
            go_on.wait(60)
        return call(plan, values)
    def traced(y):
        if os.getpid() == parent:
            tracing.set()
            go_on.wait(60)
        return y * 1.0
    parent, tracing = os.getpid(), threading.Event()
    tm.program.Plan.__call__ = slow
    threads = [threading.Thread(target=result), threading.Thread(target=lambda: tm.compile(traced)(x))]
    for thread in threads:
        thread.start()
    assert inside.wait(60) and tracing.wait(60)
    f.programs.clear()  # so that the child must trace
    assert in_child() == expected, "in the middle of a call"
    go_on.set()
    for thread in threads:
        thread.join()
    assert result() == expected
    print("forks are right")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes_on(tmp_path):
    """It has none of its parent's threads, neither the shards' nor those that hold a lock."""
    pytest.importorskip("threadpoolctl")
    (tmp_path / "forks.py").write_text(FORKS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(tmp_path / "forks.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.stdout.endswith("forks are right\n"), result.stderr
