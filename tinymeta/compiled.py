"""What `compile` returns: a function that is traced at its first call, and replayed at all that are like it.

Calls are alike if their arguments are nested alike, of the same shapes and types, and equal in what is no array. Each
kind of call has a program of its own, which must hold for all values:

    first call    f is traced, and traced again on other values: every node must be the same, and every constant
    other calls   the plan is replayed, see program.py; the results are leaves, for a replay makes no graph
    shards        the parts of the tasks, each in a thread with a plan of its own, whose results are joined
    threads       one trace at a time, one call of a function at a time: a plan has one set of arrays
    forks         have none of their parent's threads, and so new locks
"""

import functools
import inspect
import itertools
import math
import os
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import numpy as np

from .arguments import describe, function, whole
from .program import OUTSIDE, PASSES, Differs, Plan, Program, flatten, holds_fixed, kernel_key, unflatten
from .tensor import Tensor, ancestors, make, recording, replayed, state

PROGRAMS = 16  # that a compiled function keeps: one for each nesting, shapes and types of arguments


def compile(f, *, tasks=(), stacked=(), shards=1, passes=PASSES):
    """f, faster from the second call on: called like f, with the same results, all of them leaves.

    f takes arrays, Tensors and fixed values (numbers, text, None, functions), nested in lists, tuples and dicts, and
    returns Tensors, nested likewise. It may take gradients of any order and adapt, solve and update in loops; `grad` of
    what it returns would find no graph, so it goes inside. Inside of f every array is a Tensor. Another nesting, shape,
    type or fixed value makes another program, of which the last 16 are kept; what changes from call to call, such as an
    annealed step size, is therefore passed as a 0-d array. Calls from several threads wait for each other, and a forked
    process can go on calling.

    f runs as Python at the first call only. So nothing in it may depend on the values of its arguments but through
    Tensors: no branch, no .data, .item() or NumPy mask, no random numbers (draw them outside and pass them in). The
    first call runs f twice more, on other values, first of the same and then of the other sign (unless f doesn't take
    these), and raises ValueError where the programs differ. What it can't find: a branch or a mask that comes out the
    same each time; checks of values and warnings happen at the first call only; and what f reads besides its
    arguments, a global or an attribute, stays as it was then.

    tasks, stacked, shards: with shards > 1, f is called on that many parts of the tasks at once, each in a thread with
    a plan of its own. tasks names the parameters of f whose arrays all have the tasks as first axis; stacked are the
    positions in what f returns of results that have it too. The others must be means over tasks, and the result is the
    mean of the parts', weighted by their numbers of tasks. Without the package threadpoolctl, which keeps BLAS from
    starting threads of its own, the parts run one after the other, to the same results.

    passes: those of `PASSES` to run, in their order; `.program(*args)` is the program after them (of all tasks), to be
    printed.
    """
    return Compiled(f, tasks, stacked, shards, passes)


class Compiled:
    one_at_a_time = threading.RLock()  # traces: what catch_warnings changes belongs to all threads
    alive = weakref.WeakSet()

    def __init__(self, f, tasks, stacked, shards, passes):
        function(f=f)
        whole(1, shards=shards)
        for name, collection in (("tasks", tasks), ("stacked", stacked), ("passes", passes)):
            if not isinstance(collection, (list, tuple, set, frozenset, range)):
                raise TypeError(f"compile: {name} is a tuple, got {describe(collection)}: write ({name},)")
        for i in stacked:
            whole(**{"a position in stacked": i})
        try:
            self.signature = inspect.signature(f)
        except ValueError:
            raise TypeError(f"compile: Python can't tell the parameters of {f!r:.60}: wrap it in a function") from None
        functools.update_wrapper(self, f)
        self.f, self.passes = f, [p for p in PASSES if p in passes]
        self.tasks, self.stacked, self.shards = set(tasks), set(stacked), shards
        unknown = self.tasks - set(self.signature.parameters)
        if unknown or shards > 1 and not tasks:
            raise ValueError(f"compile: shards={shards}, tasks={tuple(tasks)}: tasks are names of parameters of f")
        self.programs, self.lock, self.pool = {}, threading.Lock(), None
        self.running = None  # the thread that holds the lock
        self.alive.add(self)

    def __call__(self, *args, **keywords):
        if state.tape:  # a part of another program
            tree, xs = flatten((args, keywords))
            args, keywords = unflatten(tree, iter(xs))
            return self.f(*args, **keywords)
        if self.running == threading.get_ident():
            raise RuntimeError(
                "compile: this function was called while it runs in the same thread, by a signal handler?"
            )
        with self.lock:  # a plan has one set of arrays
            try:
                self.running = threading.get_ident()
                if self.shards > 1:
                    return self.sharded(self.signature.bind(*args, **keywords))
                tree, xs = flatten((args, keywords))
                arrays = [x.data for x in xs]
                plan = self.plan(0, tree, arrays)
                return returned(plan.tree, plan(arrays), xs)
            finally:
                self.running = None

    def program(self, *args, **keywords):
        tree, xs = flatten((args, keywords))
        return self.trace(tree, [x.data for x in xs])

    def plan(self, shard, tree, arrays):
        """A shard's own plan of the program for such arrays."""
        key = key_of(tree, arrays)
        if key not in self.programs:
            program = self.trace(tree, arrays)
            if len(self.programs) == PROGRAMS:
                del self.programs[next(iter(self.programs))]
            self.programs[key] = program, {}
        program, plans = self.programs[key]
        if shard not in plans:
            plans[shard] = Plan(program)
        return plans[shard]

    def trace(self, tree, arrays):
        with Compiled.one_at_a_time, recording(True):  # the first caller may have turned it off
            program = Program(self.f, tree, arrays)
            for sign in (1, -1):
                try:
                    require_same(program, self.tried(tree, moved(arrays, sign), len(program.nodes)))
                except Differs:
                    raise
                except Exception:
                    if sign > 0:  # otherwise f asks for positive numbers
                        raise
        for optimise in self.passes:
            optimise(program)
        for n in program.nodes:
            if n.constant:
                n.array = copied(n.array)
        return program

    def tried(self, tree, arrays, most=math.inf):
        """The Program of f on other arrays, whose warnings nobody wants."""
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return Program(self.f, tree, arrays, most)

    def sharded(self, bound):
        """The call in parts: to each its share of the arrays that have tasks, and all of the others."""
        if self.tasks - set(bound.arguments):
            bound.apply_defaults()
        tree, xs = flatten((bound.args, bound.kwargs))
        arrays = [x.data for x in xs]
        for name in self.tasks & set(bound.arguments):
            if holds_fixed(flatten(bound.arguments[name])[0]):
                raise TypeError(f"compile: {name} has tasks and must be arrays, got {describe(bound.arguments[name])}")
        of_tasks = [name in self.tasks for name, x in bound.arguments.items() for _ in flatten(x)[1]]
        sizes = {a.shape[:1] for a, split in zip(arrays, of_tasks) if split}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(f"compile: arrays of {sorted(self.tasks)} must have the tasks as first axis, got {sizes}")
        ((n,),) = sizes
        shards = max(1, min(self.shards, n))
        ends = [n * i // shards for i in range(shards + 1)]
        parts = [(a, b) for a, b in zip(ends, ends[1:]) if a < b] or [(0, 0)]
        values = [[x[a:b] if split else x for x, split in zip(arrays, of_tasks)] for a, b in parts]
        if len(parts) > 1 and key_of(tree, values[0]) not in self.programs:
            self.require_joinable(tree, arrays, of_tasks)
        plans = [self.plan(i, tree, part) for i, part in enumerate(values)]
        results = self.run(plans, values)
        tree, weights = plans[0].tree, [(b - a) / n if n else 1.0 for a, b in parts]
        ys = [combine(ys, weights, i in self.stacked) for *ys, i in zip(*results, positions(tree))]
        return returned(tree, ys, xs)

    def require_joinable(self, tree, arrays, of_tasks):
        """Raise ValueError unless `stacked` is what grows with the number of tasks, and the others are means.

        Of the first two tasks, and in float32 only to 10 %: Adam makes whole steps of gradients that are all rounding.
        """
        parts = slice(0, 1), slice(1, 2), slice(0, 2)
        with Compiled.one_at_a_time, recording(True):
            one, other, both = (
                self.tried(tree, [a[part] if split else a for a, split in zip(arrays, of_tasks)]) for part in parts
            )
        of = positions(one.tree)
        for i, y, z in zip(of, one.values, both.values):
            if (y.shape != z.shape) != (i in self.stacked):
                does = "does not have" if i in self.stacked else "has"
                raise ValueError(f"compile: stacked is {sorted(self.stacked)}, but result {i} {does} an axis of tasks")
        for i in sorted(set(of) - self.stacked):
            values = [[y for y, k in zip(p.values, of) if k == i and y.dtype.kind == "f"] for p in (one, other, both)]
            tolerance = 0.1 if any(y.dtype == np.float32 for y in values[0]) else 1e-4
            x, y, mean = map(flat, values)
            with np.errstate(all="ignore"):
                error, *sizes = map(np.linalg.norm, (mean - (x + y) / 2, x, y, mean))
            if error > tolerance * max(sizes):  # not so for NaN
                raise ValueError(
                    f"compile: result {i} is no mean over tasks, which is how the results of shards are joined: return"
                    " a mean, or what has the tasks as first axis, named in `stacked`"
                )

    def run(self, plans, values):
        """Each plan on its values, at once. Ctrl-C waits for all of them, as any error does."""
        limit = one_blas_thread()
        if limit is None:
            return [plan(part) for plan, part in zip(plans, values)]
        if self.pool is None:
            self.pool = ThreadPoolExecutor(self.shards)
        parts = []
        errors = np.geterr()  # each thread has its own

        def work(plan, part):
            with np.errstate(**errors):
                return plan(part)

        with limit():
            try:
                parts.extend(self.pool.submit(work, *pair) for pair in zip(plans, values))
                return [part.result() for part in parts]
            except BaseException:
                self.programs.clear()  # if a second Ctrl-C ends the wait, the next call doesn't write into their arrays
                raise
            finally:
                wait(parts)


def key_of(tree, arrays):
    return tree, tuple([(a.shape, a.dtype) for a in arrays])


def returned(tree, arrays, xs):
    """What the function returns: leaves that know by their kernel what it was called on, which `vjp` looks for.

    And what that was computed from, back to leaves. What a compiled function has returned is one too: if its arguments
    were kept along, those of a loop θ = f(θ) would grow forever.
    """
    sources = ancestors(xs, ()) if any(x.inputs for x in xs) else xs
    kernel = functools.partial(replayed, *[x.serial for x in sources])
    return unflatten(tree, iter([make(y, kernel, (), ()) for y in arrays]))


def copied(a):
    """The array, which nobody else can change; what is broadcast stays so."""
    part = a[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in a.strides)]
    return np.broadcast_to(part.copy("K"), a.shape)


# ---- the trace on other values ---------------------------------------------------------------------------------------


def moved(arrays, sign):
    """Arrays of other values: the same ones in another order, floats also larger or smaller, and times `sign`.

    Of integers and booleans that are the same in any order as a single one is, those with sign −1 are others.
    """
    rng, result = np.random.default_rng(0), []
    for a in arrays:
        b = a.ravel()[rng.permutation(a.size)].reshape(a.shape)
        if b.dtype.kind == "f":
            b = sign * np.where(b == 0, 0.1, b) * np.exp(0.5 + 0.5 * rng.standard_normal(b.shape))
        elif sign < 0 and (a == b).all():
            b = ~b if b.dtype.kind == "b" else np.where(b > 0, b - 1, b + 1)  # an index stays one, nearly always
        result.append(b.astype(a.dtype))
    return result


def require_same(program, other):
    """Raise Differs where f, called on other values, made another program."""
    position = {n: i for p in (program, other) for i, n in enumerate(p.nodes)}

    def signature(n):
        return n.op, n.shape, n.dtype, n.argument, kernel_key(n.kernel)[1], [position[x] for x in n.inputs]

    for n, m in zip(program.nodes, other.nodes):
        if signature(n) != signature(m):
            raise Differs(
                f"compile: on other values f does something else, {m.op} of shape {m.shape} for {n.op} of shape"
                f" {n.shape}: {OUTSIDE}"
            )
    if [position[y] for y in program.outputs] != [position[y] for y in other.outputs]:
        raise Differs(f"compile: on other values f returns something else: {OUTSIDE}")
    for n, m in zip(program.nodes, other.nodes):
        if n.constant and n.array.tobytes() != m.array.tobytes():
            reader = next((x.op for x in program.nodes if n in x.inputs), "the result")
            raise Differs(
                f"compile: {describe(n.array)}, read by {reader}, depends on values but was computed outside of the"
                " graph, by way of .data or .item(), or is random: it would stay as it was at the first call. Compute"
                " it with tm ops, or pass it to f"
            )


# ---- the results of shards -------------------------------------------------------------------------------------------


def positions(tree):
    """For each Tensor in a nested result, its place in the outermost list or tuple."""
    if tree is Tensor or tree[0] not in (list, tuple):
        raise TypeError("compile: with shards, f returns a list or a tuple: its positions tell how to join results")
    return [i for i, part in enumerate(tree[1:]) for _ in range(count(part))]


def count(tree):
    """The number of Tensors in a nested result."""
    return len(flatten(unflatten(tree, itertools.repeat(Tensor(0.0))))[1])


def flat(ys):
    return np.concatenate([np.zeros(0), *[np.ravel(y) for y in ys]])


def combine(ys, weights, stack):
    """One result of all shards: their arrays one after the other, or their mean."""
    if stack:
        return np.concatenate(ys)
    if ys[0].dtype.kind != "f":
        raise TypeError(f"compile: a result is {describe(ys[0])}, which has no mean over shards: name it in `stacked`")
    total = weights[0] * ys[0]
    for weight, y in zip(weights[1:], ys[1:]):
        total += weight * y
    return np.asarray(total, ys[0].dtype)


# ---- threads and forks -----------------------------------------------------------------------------------------------


@functools.cache
def one_blas_thread():
    """A function that makes the context in which BLAS starts no threads, or None where threadpoolctl is missing."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        warnings.warn(
            "compile: the shards run one after the other, because threadpoolctl is not installed", RuntimeWarning,
            stacklevel=5,
        )  # fmt: skip
        return None
    limit = functools.partial(ThreadpoolController().limit, limits=1, user_api="blas")
    lock, inside = threading.Lock(), []

    @contextmanager
    def limited():
        with lock:  # one limit for all who are inside: each one's own would restore what another one had set
            inside.append(inside[0] if inside else limit())
        try:
            yield
        finally:
            with lock:
                if len(inside) == 1:
                    inside[0].restore_original_limits()
                inside.pop()

    return limited


def forked():
    """A child process has none of its parent's threads: not the shards', and not those that held a lock."""
    Compiled.one_at_a_time = threading.RLock()
    one_blas_thread.cache_clear()
    for compiled in Compiled.alive:
        compiled.lock, compiled.pool, compiled.running = threading.Lock(), None, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forked)
