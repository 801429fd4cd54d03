"""A Tensor is an array plus the op that made it. Here is the Tensor, and the walk that carries derivatives back.

    z = f(x, y)             a node keeps its kernel f (on arrays), its inputs (x, y) and one pullback per input
    x̄ = pullback(z, z̄)      z̄ = ∂L/∂z is the cotangent of z, and x̄ = (∂z/∂x)ᵀ z̄ the part that reaches x through z

The pullbacks are written in the same ops as everything else, on Tensors. So a gradient is a Tensor with a graph of
its own, and can be differentiated again, to any order, with no special case:

>>> import tinymeta as tm
>>> x, y = tm.Tensor(3.0), tm.Tensor(2.0)
>>> inner, = tm.grad(x * y, [y], create_graph=True)            # ∂(x y)/∂y = x: a Tensor that knows its x
>>> tm.grad(x * inner, [x])[0].item()                          # ∂(x·x)/∂x = 2x
6.0

One law keeps this true: a pullback uses Tensors, and as plain constants only what follows from shapes. Whatever
depends on a value is a node too. A variance saved as an array on the side would be right in the first derivative and
silently wrong in the second; a mask saved so is right here, but stays what it was when the graph is run again.
"""

import itertools
import threading
from contextlib import contextmanager

import numpy as np

from .arguments import DATA, FLOATS, describe, items, refusal


class Tensor:
    """An array that remembers how it was made.

    `Tensor(array)` is a leaf over the same memory (don't change the array afterwards); `Tensor(t)` of a Tensor is t.
    Takes float32 and float64, and booleans and integers as data. Every Tensor is tracked: there is no `requires_grad`.
    `.data` is the bare array, `.item()` the number in a Tensor of one element.
    """

    __slots__ = ("data", "kernel", "inputs", "pullbacks", "serial", "origin", "__weakref__")
    __array_priority__ = 1000  # makes `array + t` call t.__radd__ instead of adding up objects

    serials = itertools.count()  # an input is older than its output: this order is a topological order

    def __new__(cls, array):
        if isinstance(array, Tensor):
            return array
        if type(array) is not np.ndarray and isinstance(array, np.ndarray) and type(array) is not np.memmap:
            raise TypeError(f"a Tensor holds a plain array, and would lose what {describe(array)} adds: np.asarray(x)?")
        try:
            data = np.asarray(array)
        except ValueError as error:
            raise ValueError(f"a Tensor holds an array, and this is {describe(array)} with rows that differ") from error
        if data.dtype not in FLOATS and data.dtype not in DATA:
            came = describe(array) if data.dtype == object else f"{data.dtype} (shape {data.shape})"
            raise TypeError(
                f"a Tensor holds float32, float64, integers or booleans, not {came}: convert it first, e.g."
                " np.asarray(x, np.float64)"
            )
        return make(data, None, (), ())

    shape = property(lambda t: t.data.shape)
    dtype = property(lambda t: t.data.dtype)
    ndim = property(lambda t: t.data.ndim)
    size = property(lambda t: t.data.size)
    op = property(lambda t: op_name(t.kernel), doc="The name of the op that made it; 'leaf' if none did.")

    def item(self):
        if self.size != 1:
            raise ValueError(f"item() needs a Tensor of one element, got shape {self.shape}: reduce it first")
        return self.data.item()

    def __len__(self):
        if not self.ndim:
            raise TypeError("a 0-d Tensor has no length: .item() gives its number")
        return len(self.data)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        return f"Tensor({np.array2string(self.data, separator=', ', prefix='Tensor(')}, {self.dtype}, {self.op})"

    def __setitem__(self, index, value):
        raise TypeError("a Tensor is never changed in place: build a new one with tm.where, tm.concatenate or tm.pad")

    def __bool__(self):
        raise TypeError("a branch on a Tensor is not differentiable: use tm.where, or t.item() for the bare number")

    def __float__(self):
        raise TypeError("a number would lose the graph: stay with t, or use t.item() for the bare number")

    def __array__(self, *args, **kwargs):
        raise TypeError(
            "NumPy would lose the graph: use the op of the same name in tinymeta (tm.exp(t) for np.exp(t),"
            " tm.stack for a list of Tensors), or t.data for the bare array"
        )

    def __array_function__(self, function, types, args, kwargs):
        name = function.__name__
        raise TypeError(f"np.{name} would lose the graph: use tm.{name} if there is one, or t.data for the bare array")

    def __reduce__(self):  # a copy or a pickle is a leaf
        return Tensor, (self.data,)

    __int__ = __float__


def op_name(kernel):
    f = getattr(kernel, "func", kernel)  # func: of a partial
    return "leaf" if f is None else getattr(f, "__name__", type(f).__name__).strip("_")


# ---- recording -------------------------------------------------------------------------------------------------------


class State(threading.local):
    recording = True
    tape = None  # while `compile` calls a function: told of every node, also of those where a derivative is cut
    origin = None  # while a backward pass is recorded: (its order: 1, 2, ..., the kernel whose pullback is running)


state = State()


@contextmanager
def recording(on):
    """Nodes made inside recording(False) keep neither inputs nor pullbacks."""
    before, state.recording = (state.recording, state.origin), on
    try:
        yield
    finally:
        state.recording, state.origin = before


@contextmanager
def tracing(tape):
    """tape(z, kernel, inputs) is called for every node that is made."""
    before, state.tape = state.tape, tape
    try:
        yield
    finally:
        state.tape = before


def make(data, kernel, inputs, pullbacks):
    z = object.__new__(Tensor)
    z.data, z.kernel, z.inputs, z.pullbacks = data, kernel, inputs, pullbacks
    z.serial, z.origin = next(Tensor.serials), state.origin
    return z


def apply(kernel, *inputs, pullbacks=()):
    """z = kernel(*inputs), recorded.

    kernel(*arrays, out=None) returns an array, which is `out` if that is given; it can be run again at any time.
    pullbacks: one per input, (z, z̄) -> x̄ in Tensor ops, or None for an input without a derivative (a mask, an index).
    None at all: z is piecewise constant. A pullback calls neither grad nor vjp, as without create_graph nothing is
    recorded. It is handed z: closing over its own output would be a reference cycle, and graphs not freed at once.
    """
    try:
        data = kernel(*[x.data for x in inputs])
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise refusal(op_name(kernel), inputs, error) from error
    if type(data) is not np.ndarray:  # NumPy turns 0-d results into scalars
        data = np.asarray(data)
    history = (inputs, pullbacks) if state.recording else ((), ())  # a cut node knows only the name of its op
    z = make(data, kernel, *history)
    if state.tape:
        state.tape(z, kernel, inputs)
    return z


def stop_gradient(x):
    """The same values with no way back: ∂ stop_gradient(x) / ∂x = 0.

    x: a Tensor, or lists, tuples and dicts of Tensors (parameters, an optimiser's state); anything else is kept as is.
    """
    if isinstance(x, Tensor):
        z = make(x.data, stopped, (), ())
        if state.tape:
            state.tape(z, stopped, (x,))
        return z
    if isinstance(x, dict):
        return {key: stop_gradient(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        parts = [stop_gradient(value) for value in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    if hasattr(x, "__iter__") and not isinstance(x, (str, bytes, np.ndarray, np.generic)):
        raise TypeError(f"stop_gradient takes a Tensor, or lists, tuples and dicts of them, got {describe(x)}")
    return x


def stopped(x, out=None):
    """The kernel of stop_gradient. `apply(stopped, x)` stops the derivative too, but stays in the program (`graph`)."""
    if out is None:
        return x
    np.copyto(out, x)
    return out


def replayed(*serials):
    """The kernel of a leaf that a compiled function has returned, with the serials of all that its arguments are of."""


# ---- the walk --------------------------------------------------------------------------------------------------------


def graph(*roots):
    """All that the roots were computed from, masks included, oldest first: a program that can be run again."""
    found, todo = {}, list(roots)
    while todo:
        z = todo.pop()
        if z.serial not in found:
            found[z.serial] = z
            todo.extend(z.inputs)
    return [found[serial] for serial in sorted(found)]


def ancestors(ys, xs):
    """All that derivatives of ys flow through, unordered, back to the oldest x: so every inner step's walk is short."""
    oldest = min((x.serial for x in xs), default=0)
    found, todo = set(), list(ys)
    while todo:
        z = todo.pop()
        if z.serial >= oldest and z.serial not in found:
            found.add(z.serial)
            todo.extend(x for x, pullback in zip(z.inputs, z.pullbacks) if pullback)
            yield z


def between(ys, xs):
    """The nodes on a path from xs to ys, both included, newest first: nobody differentiates the images."""
    found = {z.serial: z for z in ancestors(ys, xs)}
    path = {x.serial: x for x in xs if x.serial in found}
    for serial in sorted(found):
        z = found[serial]
        if any(pullback and x.serial in path for x, pullback in zip(z.inputs, z.pullbacks)):
            path[serial] = z
    return [path[serial] for serial in sorted(path, reverse=True)]


def vjp(y, xs, y_bar, *, create_graph=False):
    """[(∂y/∂x)ᵀ ȳ for x in xs]: the vector-Jacobian product of a Tensor y, or of a list of them with a list of ȳ.

    y_bar has y's shape. Zeros where y does not depend on x. Pure: nothing is stored. create_graph: see `grad`.
    """
    xs, ys, y_bars = check_targets(xs), *check_cotangents(y, y_bar)
    path = between(ys, xs)
    on_path, wanted = {z.serial for z in path}, {x.serial for x in xs}
    lost = wanted - on_path
    if lost and not state.recording:
        raise ValueError("grad finds no graph: where it is called, as in a pullback, nothing is recorded")
    of_lost = lambda z: getattr(z.kernel, "func", None) is replayed and not lost.isdisjoint(z.kernel.args)
    if lost and any(map(of_lost, ancestors(ys, xs))):
        raise ValueError("y comes from a compiled function of xs: call grad inside of it, or stop_gradient its results")
    cotangents = {}

    def accumulate(x, x_bar):
        cotangents[x.serial] = cotangents[x.serial] + x_bar if x.serial in cotangents else x_bar

    order = 1 + max((z.origin[0] for z in path if z.origin), default=0)
    with recording(create_graph):
        for y, y_bar in zip(ys, y_bars):
            accumulate(y, y_bar if create_graph else stop_gradient(y_bar))
        for z in path:  # newest first: when z's turn comes, all that z flows into has been visited and z̄ is complete
            z_bar = cotangents[z.serial] if z.serial in wanted else cotangents.pop(z.serial)  # popped, z̄ is freed
            if create_graph:
                state.origin = order, z.kernel  # for `draw` and `check_grads`
            for x, pullback in zip(z.inputs, z.pullbacks):
                if pullback and x.serial in on_path:
                    x_bar = pullback(z, z_bar)
                    if x_bar.shape != x.shape or x_bar.dtype != x.dtype:
                        raise ValueError(f"the pullback of {z.op} gave {describe(x_bar)}, not {describe(x)}")
                    accumulate(x, x_bar)
    return [cotangents[x.serial] if x.serial in cotangents else Tensor(np.zeros_like(x.data)) for x in xs]


def grad(y, xs, *, create_graph=False):
    """[∂y/∂x for x in xs] of a scalar y: a list of Tensors, each with its x's shape and type.

    Zeros where y does not depend on x. create_graph=True makes the gradients differentiable in turn: the second order
    of MAML hangs on this one argument. Raises ValueError if y is not a scalar, or depends on an x only by way of what a
    compiled function returned, which are leaves; TypeError for integers and non-Tensors.
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"grad needs the Tensor to differentiate, got {describe(y)}: was it computed with tm ops?")
    if y.shape != ():
        raise ValueError(f"grad needs a scalar, got {y.op} of shape {y.shape}: sum it, or use vjp with a cotangent")
    return vjp(y, xs, Tensor(np.ones((), y.dtype)), create_graph=create_graph)


def check_targets(xs):
    xs = items("xs", xs, remedy="grad(y, [x])")
    for i, x in enumerate(xs):
        if not isinstance(x, Tensor):
            raise TypeError(f"xs[{i}] is {describe(x)}: make it a Tensor before y is computed from it")
        if x.dtype not in FLOATS:
            raise TypeError(f"xs[{i}] is {describe(x)}, which has no derivative: take floats, x.astype(np.float64)")
    return xs


def check_cotangents(y, y_bar):
    ys, y_bars = ([y], [y_bar]) if isinstance(y, Tensor) else (items("y", y), items("y_bar", y_bar))
    if len(ys) != len(y_bars):
        raise ValueError(f"{len(ys)} outputs but {len(y_bars)} cotangents: vjp needs one for each")
    for i, (y, y_bar) in enumerate(zip(ys, y_bars)):
        if not isinstance(y, Tensor) or y.dtype not in FLOATS:
            raise TypeError(f"the output to differentiate is {describe(y)}: it must be a Tensor of floats")
        if not isinstance(y_bar, Tensor):  # an array or number takes y's type, so that float32 stays float32
            y_bars[i] = y_bar = Tensor(Tensor(y_bar).data.astype(y.dtype, copy=False))
        if y_bar.shape != y.shape or y_bar.dtype != y.dtype:
            raise ValueError(f"the cotangent is {describe(y_bar)}, the output {describe(y)}: they must be alike")
    return ys, y_bars
