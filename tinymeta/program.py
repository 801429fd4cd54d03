"""Compile: run the graph again instead of building it again.

A graph is a program: every node has a kernel that can be called on other arrays. `compile(f)` calls f and writes down
every node that is made, those of gradients of any order too, and turns them into a *plan*: a flat list of NumPy calls,
each between arrays that are fixed in advance. From then on a call copies the arguments into their places, runs the list
and copies the results out. No Python of f, of a pullback or of the backward walk runs again.

    trace     call f: the nodes that it makes, oldest first
    passes    fold      what depends on no argument is a constant
              dead      what no result needs is dropped
              common    what is computed twice is computed once
              masks     a mask is prepared once for all that choose by it
              views     what only looks at another array is made once, with the plan
              inplace   an elementwise kernel writes over an input that nobody reads later
              reuse     arrays that are never needed at the same time share a place
    plan      the arrays and the calls

The kernels are those of the eager run, on the same values: the results are the same, bit for bit, unless BLAS adds up
in another order for arrays that lie otherwise in memory.
"""

import functools
import inspect
import itertools
import math
import os
import threading
import warnings
import weakref
from bisect import bisect, insort
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from heapq import heapify, heappop, heappush
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from . import kernels, ops
from .arguments import describe, function, refusal, whole
from .tensor import Tensor, make, op_name, state, stopped, tracing

PROGRAMS = 16  # that a compiled function keeps: one for each nesting, shapes and types of arguments

# ---- trace -----------------------------------------------------------------------------------------------------------


class Node:
    """A value of the program: kernel(*inputs), an argument (its position given), or a constant."""

    __slots__ = ("kernel", "inputs", "shape", "dtype", "argument", "array", "looks_at", "whole", "over", "place")

    def __init__(self, tensor, kernel=None, inputs=(), argument=None):
        self.kernel, self.inputs, self.shape, self.dtype = kernel, list(inputs), tensor.shape, tensor.dtype
        self.argument, known = argument, argument is None and all(x.array is not None for x in inputs)
        self.array = tensor.data if known else None  # its value, if that depends on no argument
        self.looks_at = None  # of a view: the node whose array it looks at, itself no view
        self.whole = True  # all of that array, in its order? A reshape is, a transpose or a slice is not
        self.over = None  # the node in whose place it is computed
        self.place = None  # the number of that place

    constant = property(lambda n: not n.inputs and n.argument is None)
    view = property(lambda n: n.looks_at is not None)
    computed = property(lambda n: bool(n.inputs) and not n.view)
    nbytes = property(lambda n: math.prod(n.shape) * n.dtype.itemsize)

    @property
    def op(self):
        return "constant" if self.constant else "argument" if self.argument is not None else op_name(self.kernel)


class Program:
    """`nodes`, each after its inputs; those of them that are the `outputs`; `tree`, how these are nested."""

    def __init__(self, f, tree, arrays, most=math.inf):
        leaves = [make(a, None, (), ()) for a in arrays]
        nodes = {leaf.serial: Node(leaf, argument=i) for i, leaf in enumerate(leaves)}

        def node(x):
            if x.serial not in nodes:  # not made by an op of f: a constant
                nodes[x.serial] = Node(x)
            return nodes[x.serial]

        def tape(z, kernel, inputs):
            if len(nodes) > most:  # a loop that would end by a value may never end on other values
                raise Differs(
                    f"compile: on other values f goes on, after {most} nodes, with {op_name(kernel)}: {OUTSIDE}"
                )
            inputs = [node(x) for x in inputs]
            nodes[z.serial] = Node(z, kernel, inputs)

        with tracing(tape):
            args, keywords = unflatten(tree, iter(leaves))
            self.tree, results = flatten(f(*args, **keywords), results=True)
        self.outputs = [node(y) for y in results]
        self.nodes = list(nodes.values())

    def keep(self, nodes, instead):
        """Go on with these nodes only; `instead` maps a dropped one to the one that is read in its stead."""
        for n in nodes:
            n.inputs = [instead.get(x, x) for x in n.inputs]
        self.nodes, self.outputs = nodes, [instead.get(y, y) for y in self.outputs]

    def __str__(self):
        name = {n: f"%{i}" for i, n in enumerate(self.nodes)}
        lines = []
        for n in self.nodes:
            call = f"{n.op}({', '.join(name[x] for x in n.inputs)})" if n.inputs else n.op
            where = "view" if n.view else "" if n.place is None else f"in {n.place}"
            lines.append(f"{name[n]:>6} = {call:36} {n.dtype.name:8} {n.shape!s:20} {where}".rstrip())
        return "\n".join([*lines, f"return {', '.join(name[y] for y in self.outputs)}"])


# ---- passes ----------------------------------------------------------------------------------------------------------


def fold(program):
    """Make a constant of every kernel of constants: its value is known from the trace."""
    for n in program.nodes:
        if n.array is not None:
            n.inputs = []


def dead(program):
    """Drop what no output needs."""
    needed, todo = set(), list(program.outputs)
    while todo:
        n = todo.pop()
        if n not in needed:
            needed.add(n)
            todo.extend(n.inputs)
    program.keep([n for n in program.nodes if n in needed], {})


def common(program):
    """Of nodes with the same kernel and the same inputs, and of equal small constants, keep the first."""
    first, instead, kept = {}, {}, []
    for n in program.nodes:
        inputs = [instead.get(x, x) for x in n.inputs]
        if n.kernel in COMMUTATIVE:
            inputs.sort(key=id)
        if n.inputs:
            key = (kernel_key(n.kernel), *inputs)
        else:
            key = (n.dtype, n.shape, n.array.tobytes()) if n.constant and n.array.size < 1000 else n
        if key in first:
            instead[n] = first[key]
        else:
            first[key] = n
            kept.append(n)
    program.keep(kept, instead)


def masks(program):
    """Turn the mask of every `where` into bits, once: relu's is read again in each of its derivatives."""
    nodes, made = [], {}
    for n in program.nodes:
        if n.kernel is kernels.where:
            mask, integer = n.inputs[0], f"i{n.dtype.itemsize}"
            if (mask, integer) not in made:
                kernel = partial(kernels.bits, integer=integer)
                made[mask, integer] = Node(np.broadcast_to(np.empty((), integer), mask.shape), kernel, [mask])
                nodes.append(made[mask, integer])
            n.kernel, n.inputs = kernels.choose, [made[mask, integer], *n.inputs[1:]]
        nodes.append(n)
    program.keep(nodes, {})


def views(program):
    """Mark what needs no copy. Whether a reshape does is found out on arrays that lie as the plan's will."""
    arrays = {}
    for n in program.nodes:
        arrays[n] = n.array if n.constant else np.empty(n.shape, n.dtype)
        if len(n.inputs) == 1 and function_of(n.kernel) in VIEWS:
            (x,) = n.inputs
            y = n.kernel(arrays[x])
            if np.may_share_memory(arrays[x], y):
                n.looks_at, arrays[n] = root(x), y
                n.whole = x.whole and function_of(n.kernel) in (ops._reshape, stopped)


def inplace(program):
    """Compute an elementwise node over an input of its shape and type whose array is read here for the last time."""
    last = last_reads(program)
    for i, n in enumerate(program.nodes):
        if not n.computed or not is_elementwise(n.kernel):
            continue
        for x in n.inputs:
            r = root(x)
            alone = all(y is x or root(y) is not r for y in n.inputs)
            fits = (x.shape, x.dtype) == (n.shape, n.dtype) and x.whole
            if r.computed and last[r] == i and alone and fits:
                n.over = r
                break


def reuse(program):
    """Number the places: the largest arrays first, each into the gap that ends soonest after its last reader has run.

    A gap, (its last position, its first, a place), is when nobody uses that place, which is always large enough. Among
    arrays of one size, taken as they begin, only the gaps that have begun are searched: no array is held against all
    places, of which a long program has as many as it has arrays.
    """
    last, owner, lives, places, unused = last_reads(program), {}, {}, itertools.count(), []
    for i, n in enumerate(program.nodes):
        if n.computed:
            owner[n] = n if n.over is None else owner[n.over]
            lives[owner[n]] = lives.get(owner[n], (i, i))[0], last.get(n, i)
    size = attrgetter("nbytes")
    for _, alike in itertools.groupby(sorted(lives, key=size, reverse=True), size):
        ahead, begun = [(first, end, place) for end, first, place in unused], []
        heapify(ahead)
        for n in alike:
            start, stop = lives[n]
            while ahead and ahead[0][0] <= start:
                first, end, place = heappop(ahead)
                insort(begun, (end, first, place))
            k = bisect(begun, (stop,))
            end, first, n.place = begun.pop(k) if k < len(begun) else (math.inf, 0, next(places))
            insort(begun, (start - 1, first, n.place))
            heappush(ahead, (stop + 1, end, n.place))
        unused = begun + [(end, first, place) for first, end, place in ahead]
    for n in owner:
        n.place = owner[n].place


PASSES = (fold, dead, common, masks, views, inplace, reuse)

VIEWS = {ops._broadcast_to, ops._reshape, ops._transpose, ops._gather, stopped}
COMMUTATIVE = {np.add, np.multiply, np.equal, np.not_equal, np.logical_and, np.logical_or}


def function_of(kernel):
    return getattr(kernel, "func", kernel)


def kernel_key(kernel):
    """What tells kernels apart: the function, and its static arguments (axes, shapes, slices) as text."""
    return function_of(kernel), repr(sorted(getattr(kernel, "keywords", {}).items()))


def is_elementwise(kernel):
    f = function_of(kernel)
    return isinstance(f, np.ufunc) or f in (kernels.where, kernels.choose, ops._power, ops._softplus)


def root(n):
    """The node whose array this one looks at; itself, if it is no view."""
    return n.looks_at if n.view else n


def last_reads(program):
    """{root: position of the last node that reads its array, through any view}. Outputs are read after the end."""
    last = {root(x): i for i, n in enumerate(program.nodes) for x in n.inputs}
    return last | {root(y): len(program.nodes) for y in program.outputs}


# ---- plan ------------------------------------------------------------------------------------------------------------


class Plan:
    """The arrays of a program, and the calls from one to the next."""

    def __init__(self, program):
        sizes, buffers, arrays = {}, {}, {}
        for n in program.nodes:
            if n.computed:
                if n.place is None:  # without the pass `reuse`
                    n.place = n.over.place if n.over else len(sizes)
                sizes[n.place] = max(sizes.get(n.place, 0), n.nbytes)
        self.kernels = []  # [(node, its calls)], for whoever wants to time them
        for n in program.nodes:
            inputs = [arrays[x] for x in n.inputs]
            if n.computed:
                if n.place not in buffers:
                    buffers[n.place] = np.empty(sizes[n.place], np.uint8)
                arrays[n] = buffers[n.place][: n.nbytes].view(n.dtype).reshape(n.shape)
                self.kernels.append((n, bind(n.kernel, inputs, arrays[n])))
            elif n.view:
                arrays[n] = n.kernel(*inputs)
            else:
                arrays[n] = n.array if n.constant else np.empty(n.shape, n.dtype)
        self.calls = [call for _, calls in self.kernels for call in calls]
        self.arguments = [(n.argument, arrays[n]) for n in program.nodes if n.argument is not None]
        self.outputs, self.tree, self.buffers = [arrays[y] for y in program.outputs], program.tree, buffers.values()

    def __call__(self, values):
        for i, array in self.arguments:
            np.copyto(array, values[i])
        try:
            for call in self.calls:
                call()
        except (TypeError, ValueError, IndexError) as error:  # an index out of range
            n = next(n for n, calls in self.kernels if call in calls)
            raise refusal(f"compile: {n.op}", n.inputs, error) from error
        return [make(y.copy(), None, (), ()) for y in self.outputs]  # the next call overwrites y


def bind(kernel, inputs, out):
    """The kernel's calls, from these arrays into that one."""
    prepared = getattr(function_of(kernel), "calls", None)
    if prepared:
        return list(prepared(*inputs, out=out, **getattr(kernel, "keywords", {})))
    if isinstance(kernel, np.ufunc):
        return [partial(kernel, *inputs, out)]
    return [partial(kernel, *inputs, out=out)]


# ---- compile ---------------------------------------------------------------------------------------------------------


def compile(f, *, tasks=(), stacked=(), shards=1, passes=PASSES):
    """f, faster from the second call on: called like f, with the same results, all of them leaves.

    f takes arrays, Tensors and fixed values (numbers, text, None, functions), nested in lists, tuples and dicts, and
    returns Tensors, nested likewise. It may take gradients of any order and adapt, solve and update in loops. Inside of
    f every array is a Tensor. Another nesting, shape, type or fixed value makes another program, of which the last 16
    are kept; what changes from call to call, such as an annealed step size, is therefore passed as a 0-d array. Calls
    from several threads wait for each other, and a forked process can go on calling.

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
    tracing = threading.RLock()  # by one thread at a time: what catch_warnings changes belongs to all of them
    alive = weakref.WeakSet()

    def __init__(self, f, tasks, stacked, shards, passes):
        function(f=f)
        whole(1, shards=shards)
        for name, collection in (("tasks", tasks), ("stacked", stacked), ("passes", passes)):
            if not isinstance(collection, (list, tuple, set, frozenset, range)):
                raise TypeError(f"compile: {name} is a tuple, got {describe(collection)}: write ({name},)")
        for i in stacked:
            whole(**{"a position in stacked": i})
        functools.update_wrapper(self, f)
        self.f, self.signature, self.passes = f, inspect.signature(f), [p for p in PASSES if p in passes]
        self.tasks, self.stacked, self.shards = set(tasks), set(stacked), shards
        unknown = self.tasks - set(self.signature.parameters)
        if unknown or shards > 1 and not tasks:
            raise ValueError(f"compile: shards={shards}, tasks={tuple(tasks)}: tasks are names of parameters of f")
        self.programs, self.lock, self.pool = {}, threading.Lock(), None
        self.running = None  # the thread that holds the lock
        self.alive.add(self)

    def __call__(self, *args, **keywords):
        if state.tape:  # a part of another program
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
                tree, arrays = flatten((args, keywords))
                plan = self.plan(0, tree, arrays)
                return unflatten(plan.tree, iter(plan(arrays)))
            finally:
                self.running = None

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

    def sharded(self, bound):
        tree, arrays = flatten((bound.args, bound.kwargs))
        for name in self.tasks & set(bound.arguments):
            if holds_fixed(flatten(bound.arguments[name])[0]):
                raise TypeError(f"compile: {name} has tasks and must be arrays, got {describe(bound.arguments[name])}")
        of_tasks = [name in self.tasks for name, x in bound.arguments.items() for _ in flatten(x)[1]]
        sizes = {a.shape[:1] for a, split in zip(arrays, of_tasks) if split}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(f"compile: arrays of {sorted(self.tasks)} must have the tasks as first axis, got {sizes}")
        ((n,),) = sizes
        ends = [n * i // self.shards for i in range(self.shards + 1)]
        parts = [(a, b) for a, b in zip(ends, ends[1:]) if a < b] or [(0, 0)]
        values = [[x[a:b] if split else x for x, split in zip(arrays, of_tasks)] for a, b in parts]
        if len(parts) > 1 and key_of(tree, values[0]) not in self.programs:
            self.require_stacked(tree, arrays, of_tasks)
        plans = [self.plan(i, tree, part) for i, part in enumerate(values)]
        results = self.run(plans, values)
        tree, weights = plans[0].tree, [(b - a) / n if n else 1.0 for a, b in parts]
        return unflatten(tree, (combine(ys, weights, i in self.stacked) for *ys, i in zip(*results, positions(tree))))

    def require_stacked(self, tree, arrays, of_tasks):
        """Raise ValueError unless `stacked` is what grows with the number of tasks."""
        with Compiled.tracing:
            one, two = (self.tried(tree, [a[:n] if split else a for a, split in zip(arrays, of_tasks)]) for n in (1, 2))
        for i, y, z in zip(positions(one.tree), one.outputs, two.outputs):
            if (y.shape != z.shape) != (i in self.stacked):
                does = "does not have" if i in self.stacked else "has"
                raise ValueError(f"compile: stacked is {sorted(self.stacked)}, but result {i} {does} an axis of tasks")

    def run(self, plans, values):
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
                self.programs.clear()  # if Ctrl-C ends the wait, too, the next call doesn't write into their arrays
                raise
            finally:
                wait(parts)

    def program(self, *args, **keywords):
        return self.trace(*flatten((args, keywords)))

    def trace(self, tree, arrays):
        with Compiled.tracing:
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
        return program

    def tried(self, tree, arrays, most=math.inf):
        """The Program of f on other arrays, whose warnings nobody wants."""
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return Program(self.f, tree, arrays, most)


def key_of(tree, arrays):
    return tree, tuple((a.shape, a.dtype) for a in arrays)


def positions(tree):
    """For each Tensor in a nested result, its place in the outermost list or tuple."""
    if tree is Tensor or tree[0] not in (list, tuple):
        raise TypeError("compile: with shards, f returns a list or a tuple: its positions tell how to join results")
    return [i for i, part in enumerate(tree[1:]) for _ in range(count(part))]


def forked():
    """A child process has none of its parent's threads: not the shards', and not those that held a lock."""
    Compiled.tracing = threading.RLock()
    one_blas_thread.cache_clear()
    for compiled in Compiled.alive:
        compiled.lock, compiled.pool, compiled.running = threading.Lock(), None, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forked)


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


def combine(ys, weights, stack):
    """One result of all shards: their arrays one after the other, or their mean."""
    if stack:
        return make(np.concatenate([y.data for y in ys]), None, (), ())
    if ys[0].dtype.kind != "f":
        raise TypeError(f"compile: a result is {describe(ys[0])}, which has no mean over shards: name it in `stacked`")
    total = weights[0] * ys[0].data
    for weight, y in zip(weights[1:], ys[1:]):
        total += weight * y.data
    return make(np.asarray(total, ys[0].dtype), None, (), ())


def count(tree):
    """The number of Tensors in a nested result."""
    return len(flatten(unflatten(tree, itertools.repeat(Tensor(0.0))))[1])


def moved(arrays, sign):
    """Arrays of other values: the same ones in another order, floats also larger or smaller, and times `sign`."""
    rng, result = np.random.default_rng(0), []
    for a in arrays:
        b = a.ravel()[rng.permutation(a.size)].reshape(a.shape)
        if b.dtype.kind == "f":
            b = sign * np.where(b == 0, 0.1, b) * np.exp(0.5 + 0.5 * rng.standard_normal(b.shape))
        result.append(b.astype(a.dtype))
    return result


class Differs(ValueError):
    """On other values f makes another program."""


OUTSIDE = "branches, loops and sizes must not depend on values; use tm.where, or do it outside of f"


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


# ---- nested arguments and results ------------------------------------------------------------------------------------


class Fixed(NamedTuple):
    """A value that is part of the program, with its type: 1, 1.0 and True are three, and so are 0.0 and -0.0 two."""

    kind: type
    value: object
    sign: float = 1.0


def flatten(x, results=False):
    """(how x is nested, hashable; the arrays in it, or of results the Tensors)."""
    if isinstance(x, Tensor):
        return Tensor, [x if results else x.data]
    if isinstance(x, dict):
        tree, arrays = flatten(list(x.values()), results)
        return (dict, tuple(x), tree), arrays
    if isinstance(x, (list, tuple)):
        parts = [flatten(part, results) for part in x]
        return (type(x), *(tree for tree, _ in parts)), [a for _, arrays in parts for a in arrays]
    if results and x is not None:
        raise TypeError(f"compile: f returned {describe(x)}: it returns Tensors, nested in lists, tuples and dicts")
    if isinstance(x, (np.ndarray, np.generic)):
        return Tensor, [Tensor(x).data]
    try:
        hash(x)
    except TypeError:
        raise TypeError(f"compile: a fixed value must be hashable, got {describe(x)}: pass a list or a tuple") from None
    if isinstance(x, float):
        return Fixed(type(x), x if x == x else math.nan, math.copysign(1.0, x)), []  # one NaN, which is equal to itself
    return Fixed(type(x), x), []


def holds_fixed(tree):
    """Is there anything but arrays, and None, in what `flatten` has made this tree of?"""
    if tree is Tensor or isinstance(tree, Fixed):
        return tree is not Tensor and tree.value is not None
    kind, *parts = tree
    return any(map(holds_fixed, parts[1:] if kind is dict else parts))


def unflatten(tree, arrays):
    if tree is Tensor:
        return next(arrays)
    if isinstance(tree, Fixed):
        return tree.value
    kind, *parts = tree
    if kind is dict:
        return dict(zip(parts[0], unflatten(parts[1], arrays)))
    values = [unflatten(part, arrays) for part in parts]
    return kind(*values) if hasattr(kind, "_fields") else kind(values)
