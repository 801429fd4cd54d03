"""Compile: run the graph again instead of building it again.

A graph is a program: every node has a kernel that can be called on other arrays. So f is called once, every node that
it makes is written down, those of gradients of any order too, and all of that is turned into a *plan*: a flat list of
NumPy calls, each between arrays that are fixed in advance. From then on a call copies the arguments into their places,
runs the list and copies the results out. No Python of f, of a pullback or of the backward walk runs again.

    nesting   arguments and results: how they are nested, and the Tensors in them
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
in another order for arrays that lie otherwise in memory. When f is traced, and whether that is right for other values
too, is told in compiled.py.
"""

import itertools
import math
from bisect import bisect, insort
from functools import partial
from heapq import heapify, heappop, heappush
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from . import kernels, ops
from .arguments import describe, refusal
from .tensor import Tensor, make, op_name, stopped, tracing

# ---- nesting ---------------------------------------------------------------------------------------------------------


class Fixed(NamedTuple):
    """A value that is part of the program, with its type: 1, 1.0 and True are three values, 0.0 and −0.0 two."""

    kind: type
    value: object
    sign: float = 1.0


def flatten(x, results=False):
    """(how x is nested, hashable; the Tensors in it, which arrays become). Results hold nothing but Tensors."""
    if isinstance(x, Tensor):
        return Tensor, [x]
    if isinstance(x, dict):
        tree, tensors = flatten(list(x.values()), results)
        return (dict, tuple(x), tree), tensors
    if isinstance(x, (list, tuple)):
        parts = [flatten(part, results) for part in x]
        return (type(x), *[tree for tree, _ in parts]), [t for _, tensors in parts for t in tensors]
    if results and x is not None:
        raise TypeError(f"compile: f returned {describe(x)}: it returns Tensors, nested in lists, tuples and dicts")
    if isinstance(x, (np.ndarray, np.generic)):
        return Tensor, [Tensor(x)]
    try:
        hash(x)
    except TypeError:
        raise TypeError(f"compile: a fixed value must be hashable, got {describe(x)}: pass a list or a tuple") from None
    if type(x).__hash__ is object.__hash__ and not callable(x) and x is not None and x is not ...:
        raise TypeError(
            f"compile: {describe(x)} would stay as it is now, whatever changes in it: pass what f reads of it"
        )
    if isinstance(x, float):
        return Fixed(type(x), x if x == x else math.nan, math.copysign(1.0, x)), []  # one NaN, which is equal to itself
    return Fixed(type(x), x), []


def unflatten(tree, tensors):
    """What is nested as the tree says, of an iterator's Tensors."""
    if tree is Tensor:
        return next(tensors)
    if isinstance(tree, Fixed):
        return tree.value
    kind, *parts = tree
    if kind is dict:
        return dict(zip(parts[0], unflatten(parts[1], tensors)))
    values = [unflatten(part, tensors) for part in parts]
    return kind(*values) if hasattr(kind, "_fields") else kind(values)


def holds_fixed(tree):
    """Is there anything but arrays, and None, in what `flatten` has made this tree of?"""
    if tree is Tensor:
        return False
    if isinstance(tree, Fixed):
        return tree.value is not None
    kind, *parts = tree
    return any(map(holds_fixed, parts[1:] if kind is dict else parts))


# ---- trace -----------------------------------------------------------------------------------------------------------


class Node:
    """A value of the program: kernel(*inputs), an argument (its position given), or a constant."""

    __slots__ = ("kernel", "inputs", "shape", "dtype", "argument", "array", "looks_at", "all_of_it", "over", "place")

    def __init__(self, shape, dtype, array=None, kernel=None, inputs=(), argument=None):
        self.shape, self.dtype, self.kernel, self.inputs, self.argument = shape, dtype, kernel, list(inputs), argument
        self.array = array  # its value, if that is known to depend on no argument
        self.looks_at = None  # of a view: the node whose array it looks at, itself no view
        self.all_of_it = True  # and in its order? So a reshape looks at an array; a transpose or a slice does not
        self.over = None  # the node in whose place it is computed
        self.place = None  # the number of that place

    constant = property(lambda n: not n.inputs and n.argument is None)
    view = property(lambda n: n.looks_at is not None)
    computed = property(lambda n: bool(n.inputs) and not n.view)
    nbytes = property(lambda n: math.prod(n.shape) * n.dtype.itemsize)

    @property
    def op(self):
        return "constant" if self.constant else "argument" if self.argument is not None else op_name(self.kernel)


class Differs(ValueError):
    """On other values f makes another program."""


OUTSIDE = "branches, loops and sizes must not depend on values; use tm.where, or do it outside of f"


class Program:
    """What f makes of these arrays, nested as `tree` says.

    nodes: in order, inputs first; outputs: those that f returned; tree: how it nested them; values: what they were for
    these arrays. Raises Differs where f goes on after `most` nodes.
    """

    def __init__(self, f, tree, arrays, most=math.inf):
        leaves = [make(a, None, (), ()) for a in arrays]
        nodes = {leaf.serial: Node(leaf.shape, leaf.dtype, argument=i) for i, leaf in enumerate(leaves)}

        def node(x):
            if x.serial not in nodes:  # not made by an op of f: a constant
                nodes[x.serial] = Node(x.shape, x.dtype, x.data)
            return nodes[x.serial]

        def tape(z, kernel, inputs):
            if len(nodes) > most:  # a loop that would end by a value may never end on other values
                raise Differs(
                    f"compile: on other values f goes on, after {most} nodes, with {op_name(kernel)}: {OUTSIDE}"
                )
            inputs = [node(x) for x in inputs]
            array = z.data if all(x.array is not None for x in inputs) else None
            nodes[z.serial] = Node(z.shape, z.dtype, array, kernel, inputs)

        with tracing(tape):
            args, keywords = unflatten(tree, iter(leaves))
            self.tree, results = flatten(f(*args, **keywords), results=True)
        self.outputs, self.values = [node(y) for y in results], [y.data for y in results]
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
                made[mask, integer] = Node(mask.shape, np.dtype(integer), kernel=kernel, inputs=[mask])
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
                n.all_of_it = x.all_of_it and function_of(n.kernel) in (ops._reshape, stopped)


def inplace(program):
    """Compute an elementwise node over an input of its shape and type whose array is read here for the last time."""
    last = last_reads(program)
    for i, n in enumerate(program.nodes):
        if not n.computed or not is_elementwise(n.kernel):
            continue
        for x in n.inputs:
            r = root(x)
            alone = all(y is x or root(y) is not r for y in n.inputs)  # no other input looks at that array
            fits = (x.shape, x.dtype) == (n.shape, n.dtype) and x.all_of_it
            if r.computed and last[r] == i and alone and fits:
                n.over = r
                break


def reuse(program):
    """Number the places: the largest arrays first, each into the gap that ends soonest after its last reader has run.

    A gap, (its last position, its first, a place), is when nobody uses that place, which is always large enough. Arrays
    of one size are taken as they begin, and the gaps are two lists: `ahead` are those that begin later, by their first
    position, and `begun` the others, by their last. Only `begun` is searched: no array is held against all places, of
    which a long program has up to as many as it has arrays.
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
            k = bisect(begun, (stop,))  # the gap that ends soonest, but not before stop: (stop,) < (stop, first, place)
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
    static = [*getattr(kernel, "args", ()), *sorted(getattr(kernel, "keywords", {}).items())]
    return function_of(kernel), text(static)


def text(x):
    """repr, but of all elements of an array."""
    if isinstance(x, np.ndarray):
        return f"array({x.dtype}, {x.shape}, {x.tobytes()})"
    if isinstance(x, dict):
        return text(list(x.items()))
    if isinstance(x, (list, tuple)):
        return f"{type(x).__name__}({', '.join(map(text, x))})"
    return text(x.data) if isinstance(x, Tensor) else repr(x)


def is_elementwise(kernel):
    f = function_of(kernel)
    # np.matmul is a ufunc too, but no op's kernel
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
    """The arrays of a program, and the calls from one to the next: a function of arrays that returns arrays."""

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
        self.first = True

    def __call__(self, values):
        for i, array in self.arguments:
            np.copyto(array, values[i])
        try:
            if self.first:
                for call in self.calls:
                    require_written(call)
                self.first = False
            else:
                for call in self.calls:
                    call()
        except (TypeError, ValueError, IndexError) as error:  # an index out of range
            n = next(n for n, calls in self.kernels if call in calls)
            inputs = [np.broadcast_to(np.zeros((), x.dtype), x.shape) for x in n.inputs]  # to be described
            raise refusal(f"compile: {n.op}", inputs, error) from error
        return [y.copy() for y in self.outputs]  # the next call overwrites y


def bind(kernel, inputs, out):
    """The kernel's calls, from these arrays into that one."""
    prepared = getattr(function_of(kernel), "calls", None)
    if prepared:
        return list(prepared(*inputs, out=out, **getattr(kernel, "keywords", {})))
    if isinstance(kernel, np.ufunc):
        return [partial(kernel, *inputs, out)]
    return [partial(kernel, *inputs, out=out)]


def require_written(call):
    """Run it, and raise TypeError where a kernel has made an array of its own: what it was to fill is still garbage."""
    result, out = call(), getattr(call, "keywords", {}).get("out")
    if out is not None and result is not out:
        raise TypeError("the kernel must write into `out` if that is given, and return it")
