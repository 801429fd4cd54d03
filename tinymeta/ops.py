"""The ops: every formula with its derivative beside it. x̄ is the cotangent of x, ⊙ the elementwise product.

A primitive is an `apply` of a kernel, a NumPy call on arrays, with its pullbacks, which are written in the ops of this
file. All others are compositions and need no derivative of their own. Binary ops first make their operands alike
(`operands`), so no pullback ever mentions broadcasting: broadcast_to is an op, and sum_to its adjoint.

Singular points, as in NumPy: log 0, x / 0, and x^p at 0 for p < 1 (so sqrt 0). Chosen where mathematics leaves it
open: relu'(0) = abs'(0) = 0, and tied winners of max share the gradient equally.
"""

import math
from functools import partial

import numpy as np

from . import kernels
from .arguments import FLOATS, NUMBERS, axes_of, axis_of, describe, items, refusal, shape_of, type_of
from .tensor import Tensor, apply, make, stopped

LARGEST = float(np.finfo(np.float32).max)


def operands(op, x, y, beside=()):
    """x and y as Tensors of one type and of one shape, by NumPy's rules (for `where`, beside the shape of its mask)."""
    x, y = alike(op, x, y)
    if x.data.shape == y.data.shape and not beside:
        return x, y  # nearly always
    shapes = [t.data.shape for t in (x, y) if t.kernel is not number] + [beside] * bool(beside)
    if len(set(shapes)) < 2:
        return x, y
    shape = broadcast_shape(op, *shapes)
    return [t if t.kernel is number else broadcast_to(t, shape) for t in (x, y)]

def alike(op, x, y):
    """x and y as Tensors of one type. Two floats must be of one; integers and booleans beside floats take theirs.

    float32 and float64 don't mix: that would double a model's memory without a word. A plain number takes the type of
    the other; it stays 0-d, which NumPy broadcasts, because nobody can ask for its gradient.
    """
    if type(x) is type(y) is Tensor and x.data.dtype == y.data.dtype:
        return x, y  # nearly always
    xs = [x if isinstance(x, NUMBERS) else Tensor(x) for x in (x, y)]
    dtypes = {x.data.dtype for x in xs if type(x) is Tensor}
    if len(dtypes) > 1 or dtypes.isdisjoint(FLOATS):  # else all Tensors have one type of float
        floats = dtypes.intersection(FLOATS)
        if len(floats) > 1:
            raise TypeError(f"{op} of float32 and float64: convert one of them, e.g. x.astype(np.float32)")
        numbers = [int if isinstance(x, (int, np.integer)) else float for x in xs if type(x) is not Tensor]
        whole = dtypes and not floats and float not in numbers
        dtypes = floats or {np.result_type(*dtypes, *(numbers if dtypes else [float]))}
        if whole and not dtypes.isdisjoint(FLOATS):
            raise TypeError(f"{op} of uint64 and integers with a sign, which no type holds: use x.astype(np.int64)")
        xs = [int(x) if isinstance(x, np.integer) else x for x in xs]  # NumPy would wrap its own around
    dtype = dtypes.pop()
    try:
        if dtype == FLOATS[0] and any(LARGEST < math.fabs(x) < math.inf for x in xs if type(x) is not Tensor):
            raise OverflowError  # NumPy would make ∞ of it, with no more than a warning
        return [astype(x, dtype) if type(x) is Tensor else make(np.asarray(x, dtype), number, (), ()) for x in xs]
    except OverflowError:
        raise ValueError(f"{op} of {' and '.join(map(describe, xs))}: the number is too large for {dtype}") from None

def number():
    """Stands as the kernel of a number that was written into a formula."""

def as_float(x):
    x = Tensor(x)
    return x if x.dtype in FLOATS else astype(x, np.float64)

# ---- arithmetic ------------------------------------------------------------------------------------------------------

def add(x, y):
    """z = x + y        x̄ = z̄,   ȳ = z̄"""
    x, y = operands("add", x, y)
    return apply(np.add, x, y, pullbacks=(lambda z, z_bar: z_bar, lambda z, z_bar: z_bar))

def subtract(x, y):
    """z = x − y        x̄ = z̄,   ȳ = −z̄"""
    x, y = operands("subtract", x, y)
    return apply(np.subtract, x, y, pullbacks=(lambda z, z_bar: z_bar, lambda z, z_bar: -z_bar))

def multiply(x, y):
    """z = x ⊙ y        x̄ = z̄ ⊙ y,   ȳ = z̄ ⊙ x"""
    if x is y and type(x) is Tensor and x.dtype in FLOATS:
        return power(x, 2)  # one product in its pullback, not two
    x, y = operands("multiply", x, y)
    return apply(np.multiply, x, y, pullbacks=(lambda z, z_bar: z_bar * y, lambda z, z_bar: z_bar * x))

def divide(x, y):
    """z = x / y        x̄ = z̄ / y,   ȳ = −z̄ ⊙ z / y"""
    x, y = operands("divide", x, y)
    return apply(np.divide, x, y, pullbacks=(lambda z, z_bar: z_bar / y, lambda z, z_bar: -(z_bar * z / y)))

def negative(x):
    """y = −x           x̄ = −ȳ"""
    return apply(np.negative, Tensor(x), pullbacks=(lambda y, y_bar: -y_bar,))

def power(x, y):
    """z = x^y          x̄ = z̄ ⊙ y x^(y−1),   ȳ = z̄ ⊙ z log x

    An exponent that has come down to 0 ends the chain: (x²)''' at 0 is 0, not 0·∞. ȳ is 0 at x = 0, NaN below.
    """
    if isinstance(y, NUMBERS):
        x, y = as_float(x), y.item() if isinstance(y, np.generic) else y
        if y == 0:
            return Tensor(np.ones_like(x.data))
        pullback = lambda z, z_bar: z_bar * (y * (x if y == 2 else power(x, y - 1)))
        return apply(partial(_power, exponent=y), x, pullbacks=(pullback,))
    x, y = map(as_float, operands("power", x, y))
    return apply(np.power, x, y, pullbacks=(
        lambda z, z_bar: z_bar * y * power(x, where(logical_and(equal(x, 0), equal(y, 0)), 1, y) - 1),  # not 0·∞
        lambda z, z_bar: z_bar * z * log(where(equal(x, 0), 1, x))))

def _power(x, exponent, out=None):
    fast = {2: np.square, 0.5: np.sqrt, -1: np.reciprocal}.get(exponent)
    return fast(x, out=out) if fast else np.power(x, x.dtype.type(exponent), out=out)

def sqrt(x):
    """y = √x           x̄ = ȳ / 2√x"""
    return power(x, 0.5)

# ---- elementwise -----------------------------------------------------------------------------------------------------

def exp(x):
    """y = eˣ           x̄ = ȳ ⊙ y"""
    return apply(np.exp, as_float(x), pullbacks=(lambda y, y_bar: y_bar * y,))

def log(x):
    """y = log x        x̄ = ȳ / x"""
    x = as_float(x)
    return apply(np.log, x, pullbacks=(lambda y, y_bar: y_bar / x,))

def log1p(x):
    """y = log(1 + x)   x̄ = ȳ / (1 + x)"""
    x = as_float(x)
    return apply(np.log1p, x, pullbacks=(lambda y, y_bar: y_bar / (1 + x),))

def sin(x):
    """y = sin x        x̄ = ȳ ⊙ cos x"""
    x = as_float(x)
    return apply(np.sin, x, pullbacks=(lambda y, y_bar: y_bar * cos(x),))

def cos(x):
    """y = cos x        x̄ = −ȳ ⊙ sin x"""
    x = as_float(x)
    return apply(np.cos, x, pullbacks=(lambda y, y_bar: -(y_bar * sin(x)),))

def tanh(x):
    """y = tanh x       x̄ = ȳ ⊙ (1 − y²)"""
    return apply(np.tanh, as_float(x), pullbacks=(lambda y, y_bar: y_bar * (1 - y * y),))

def softplus(x):
    """y = log(1 + eˣ)  x̄ = ȳ ⊙ sigmoid(x)"""
    x = as_float(x)
    return apply(_softplus, x, pullbacks=(lambda y, y_bar: y_bar * sigmoid(x),))

def _softplus(x, out=None):
    return np.logaddexp(x.dtype.type(0), x, out=out)

def sigmoid(x):
    """y = 1 / (1 + e⁻ˣ) = exp(−softplus(−x)), which neither overflows nor loses small values"""
    return exp(-softplus(-as_float(x)))

def abs(x):
    """y = |x|          x̄ = ȳ ⊙ sign x"""
    x = as_float(x)
    return apply(np.abs, x, pullbacks=(lambda y, y_bar: y_bar * sign(x),))

def relu(x):
    """y = max(x, 0)    x̄ = 0 where x ≤ 0, else ȳ: NaN stays NaN"""
    x = as_float(x)
    return where(less_equal(x, 0), 0, x)

# ---- piecewise constant: nodes without pullbacks ---------------------------------------------------------------------

def comparison(ufunc):
    def op(x, y):
        return apply(ufunc, *operands(ufunc.__name__, x, y))

    op.__name__, op.__doc__ = ufunc.__name__, f"np.{ufunc.__name__} of two Tensors: a boolean Tensor, a mask"
    return op

equal, not_equal, greater, greater_equal, less, less_equal = map(comparison, (
    np.equal, np.not_equal, np.greater, np.greater_equal, np.less, np.less_equal))

def logical_and(x, y):
    """z = x and y of two masks; also x & y"""
    return apply(np.logical_and, *operands("logical_and", mask_of(x), mask_of(y)))

def logical_or(x, y):
    """z = x or y of two masks; also x | y"""
    return apply(np.logical_or, *operands("logical_or", mask_of(x), mask_of(y)))

def logical_not(x):
    """y = not x, of a mask; also ~x"""
    return apply(np.logical_not, mask_of(x))

def mask_of(x):
    x = Tensor(x)
    if x.dtype != bool:
        raise TypeError(f"a mask is boolean, got {describe(x)}: compare first, e.g. x > 0")
    return x

def sign(x):
    """y = −1, 0 or 1"""
    return apply(np.sign, Tensor(x))

# ---- linear: adjoint pairs, each the other's pullback ----------------------------------------------------------------

def view(function):
    """A kernel whose result may share its input's memory; with `out`, a copy."""

    def kernel(*arrays, out=None, **static):
        y = function(*arrays, **static)
        return y if out is None else copy(y, out)

    kernel.__name__ = function.__name__
    return kernel

def copy(y, out):
    if y.shape != out.shape:
        raise ValueError(f"a result of shape {y.shape} for a buffer of shape {out.shape}")
    np.copyto(out, y, casting="unsafe")  # `_astype` copies too
    return out

def broadcast_to(x, shape):
    """y_ij = x_j       x̄ = sum_to(ȳ)"""
    x, shape = Tensor(x), shape_of(shape)
    if x.shape == shape:
        return x
    if not broadcasts(x.shape, shape):
        raise ValueError(f"broadcast_to: shape {x.shape} does not broadcast to {shape}")
    return apply(partial(_broadcast_to, shape=shape), x, pullbacks=(lambda y, y_bar: sum_to(y_bar, x.shape),))

_broadcast_to = view(np.broadcast_to)

def sum_to(x, shape):
    """y_j = Σ_i x_ij   x̄ = broadcast_to(ȳ): sums the axes that broadcasting from `shape` to x's adds or stretches"""
    x, shape = Tensor(x), shape_of(shape)
    if x.shape == shape:
        return x
    if not broadcasts(shape, x.shape):
        raise ValueError(f"sum_to: {shape} does not broadcast to {x.shape}, so {x.shape} cannot be summed to it")
    new = x.ndim - len(shape)
    stretched = tuple(new + i for i, n in enumerate(shape) if n == 1 != x.shape[new + i])
    return reshape(sum(x, tuple(range(new)) + stretched, keepdims=not new), shape)

def sum(x, axis=None, keepdims=False):
    """y = Σ x          x̄ = ȳ, repeated along the axes"""
    x = Tensor(x)
    axes = axes_of(axis, x)
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    pullback = lambda y, y_bar: broadcast_to(reshape(y_bar, kept), x.shape)
    return apply(partial(kernels.sum, axis=axes, keepdims=bool(keepdims)), x, pullbacks=(pullback,))

def mean(x, axis=None, keepdims=False):
    """y = Σ x / n"""
    x = as_float(x)
    n = math.prod(x.shape[i] for i in axes_of(axis, x))
    if n == 0:
        raise ValueError(f"mean over axis {axis} of shape {x.shape}: there is nothing to average")
    return sum(x, axis, keepdims) / n

def reshape(x, *shape):
    """y = x in another shape; one size may be −1        x̄ = ȳ in x's shape"""
    x, given = Tensor(x), shape_of(*shape)
    known = math.prod(n for n in given if n != -1)
    shape = tuple(x.size // (known or 1) if n == -1 else n for n in given)
    if math.prod(shape) != x.size or any(n < -1 for n in given) or given.count(-1) > (known > 0):  # no −1 beside a 0
        raise ValueError(f"reshape: {x.shape} has {x.size} elements, which don't make {given}")
    if x.shape == shape:
        return x
    return apply(partial(_reshape, shape=shape), x, pullbacks=(lambda y, y_bar: reshape(y_bar, x.shape),))

@view
def _reshape(x, shape):
    return x.reshape(shape)

def squeeze(x, axis=None):
    """y = x without these axes, which have size 1; without all such by default"""
    x = Tensor(x)
    axes = [i for i, n in enumerate(x.shape) if n == 1] if axis is None else axes_of(axis, x)
    if any(x.shape[i] != 1 for i in axes):
        raise ValueError(f"squeeze: axis {axis} of shape {x.shape} is not of size 1")
    return reshape(x, tuple(n for i, n in enumerate(x.shape) if i not in axes))

def transpose(x, *axes):
    """y = x with its axes in the order `axes`, by default reversed        x̄ = ȳ with them put back"""
    x = Tensor(x)
    axes = tuple(a + x.ndim if a < 0 else a for a in shape_of(*axes)) if axes else tuple(range(x.ndim))[::-1]
    if sorted(axes) != list(range(x.ndim)):
        raise ValueError(f"transpose: {axes} is no order of the {x.ndim} axes of shape {x.shape}")
    back = tuple(map(axes.index, range(x.ndim)))
    return apply(partial(_transpose, axes=axes), x, pullbacks=(lambda y, y_bar: transpose(y_bar, back),))

_transpose = view(np.transpose)

def swapaxes(x, axis1, axis2):
    """y = x with two axes exchanged        x̄ = ȳ with them exchanged"""
    x = Tensor(x)
    i, j, axes = axis_of(axis1, x), axis_of(axis2, x), list(range(x.ndim))
    axes[i], axes[j] = j, i
    return apply(partial(_transpose, axes=tuple(axes)), x, pullbacks=(lambda y, y_bar: swapaxes(y_bar, i, j),))

def astype(x, dtype):
    """y = x in another type        x̄ = ȳ in x's type, if both are floats"""
    x = Tensor(x)
    if x.data.dtype is dtype or x.data.dtype == (dtype := type_of(dtype)):
        return x
    linear = x.dtype in FLOATS and dtype in FLOATS
    pullbacks = (lambda y, y_bar: astype(y_bar, x.dtype),) if linear else ()
    return apply(partial(_astype, dtype=dtype), x, pullbacks=pullbacks)

def _astype(x, dtype, out=None):
    return x.astype(dtype) if out is None else copy(x, out)

def gather(x, index):
    """y = x[index]     x̄ = scatter(ȳ, index)

    index: integers, slices, None, ..., and arrays or Tensors of integers or booleans, as in NumPy. Also x[index].
    """
    x, (fixed, arrays) = Tensor(x), split_index(index)
    index = join_index(fixed, arrays)  # the same nodes again in the pullback
    pullbacks = (lambda y, y_bar: scatter(y_bar, index, x.shape), *[None] * len(arrays))
    return apply(partial(_gather, index=fixed), x, *arrays, pullbacks=pullbacks)

@view
def _gather(x, *arrays, index):
    return x[join_index(index, arrays)]

def scatter(x, index, shape):
    """y = zeros(shape); y[index] += x, repeated positions adding up; x itself for y[...]        x̄ = ȳ[index]"""
    x, shape, (fixed, arrays) = Tensor(x), shape_of(shape), split_index(index)
    index = join_index(fixed, arrays)
    try:  # the shape of y[index], without a y
        place = np.broadcast_to(np.zeros((), bool), shape)[join_index(fixed, [a.data for a in arrays])].shape
    except (ValueError, IndexError) as error:
        raise refusal(f"scatter to shape {shape}", [x, *arrays], error) from error
    if x.shape != place:
        raise ValueError(f"scatter of shape {x.shape} to {index} of shape {shape}, which has shape {place}")
    pullbacks = (lambda y, y_bar: gather(y_bar, index), *[None] * len(arrays))
    return x if fixed == (...,) else apply(partial(_scatter, index=fixed, shape=shape), x, *arrays, pullbacks=pullbacks)

def _scatter(x, *arrays, index, shape, out=None):
    out = np.empty(shape, x.dtype) if out is None else out
    out[...] = 0
    index = join_index(index, arrays)
    if all(a.dtype == bool for a in arrays):  # no position can occur twice
        out[index] = x
    else:
        np.add.at(out, index, x)
    return out

ARRAY = "array"  # stands in the fixed part of an index where an array goes

def split_index(index):
    """An index as a fixed tuple, and the arrays in it: these are values, so they are nodes."""
    fixed, arrays = [], []
    for part in index if isinstance(index, tuple) else (index,):
        if not (part is None or part is ... or isinstance(part, (slice, np.integer)) or type(part) is int):
            array = Tensor(np.zeros(0, int) if isinstance(part, list) and not part else part)
            if array.dtype in FLOATS:
                raise TypeError(f"an index is made of integers, slices and booleans, got {describe(array)}")
            arrays.append(array)
            part = ARRAY
        fixed.append(part)
    return tuple(fixed), arrays

def join_index(fixed, arrays):
    arrays = iter(arrays)
    return tuple(next(arrays) if part is ARRAY else part for part in fixed)

def pad(x, pad_width):
    """y = x with zeros around it        x̄ = ȳ, cropped. pad_width: n, (before, after), or one such pair per axis"""
    x = Tensor(x)
    widths = Tensor(pad_width).data
    if widths.dtype.kind not in "iu" or not broadcasts(widths.shape, (x.ndim, 2)) or (widths < 0).any():
        raise ValueError(f"pad: widths are 0 or more, a pair for each axis, got {pad_width}; to crop, use a slice")
    pairs = np.broadcast_to(widths, (x.ndim, 2)).tolist()
    inside = tuple(slice(before, before + n) for (before, _), n in zip(pairs, x.shape))
    return scatter(x, inside, [before + n + after for (before, after), n in zip(pairs, x.shape)])

def concatenate(xs, axis=0):
    """y = the xs, one after the other along an axis        x̄_i = ȳ's part at x_i"""
    xs = [Tensor(x) for x in items("xs", xs)]
    if not xs:
        raise ValueError("concatenate needs at least one Tensor")
    axis = axis_of(axis, xs[0])
    if len({(x.dtype, x.shape[:axis], x.shape[axis + 1 :]) for x in xs}) > 1:
        raise ValueError(f"concatenate along axis {axis} of {', '.join(map(describe, xs))}: type or other sizes differ")
    ends = np.cumsum([x.shape[axis] for x in xs]).tolist()
    parts = [(slice(None),) * axis + (slice(end - x.shape[axis], end),) for x, end in zip(xs, ends)]
    pullbacks = tuple(lambda y, y_bar, part=part: gather(y_bar, part) for part in parts)
    return apply(partial(_concatenate, axis=axis), *xs, pullbacks=pullbacks)

def _concatenate(*xs, axis, out=None):
    return np.concatenate(xs, axis, out=out)

def stack(xs, axis=0):
    """y = the xs along a new axis"""
    xs = [Tensor(x) for x in items("xs", xs)]
    if len({x.shape for x in xs}) != 1:
        raise ValueError(f"stack needs Tensors of one shape, got {[x.shape for x in xs]}")
    axis = axis_of(axis, xs[0][None])
    new = (slice(None),) * axis + (None,)
    return concatenate([x[new] for x in xs], axis)

# ---- choice ----------------------------------------------------------------------------------------------------------

def where(mask, x, y):
    """z = x where mask, else y        x̄ = z̄ where mask, else 0,   ȳ = 0 where mask, else z̄

    Both sides are computed everywhere, and 0·∞ is NaN: guard the inside too, where(x > 0, sqrt(where(x > 0, x, 1)), 0).
    """
    mask = mask_of(mask)
    x, y = operands("where", x, y, beside=mask.shape)
    mask = broadcast_to(mask, x.shape or y.shape or mask.shape)  # numbers have shape ()
    pullbacks = None, lambda z, z_bar: where(mask, z_bar, 0), lambda z, z_bar: where(mask, 0, z_bar)
    return apply(kernels.where, mask, x, y, pullbacks=pullbacks)

def max(x, axis=None, keepdims=False):
    """y = max x        x̄ = ȳ ⊙ [x = y] / Σ [x = y]: the winners share"""
    return extremum(_max, x, axis, keepdims)

def min(x, axis=None, keepdims=False):
    """y = min x        x̄ likewise"""
    return extremum(_min, x, axis, keepdims)

def extremum(kernel, x, axis, keepdims):
    x = Tensor(x)
    axes = axes_of(axis, x)

    def pullback(y, y_bar):
        winners = astype(equal(x, y), x.dtype)
        return winners * (y_bar / sum(winners, axes, keepdims=True))

    y = apply(partial(kernel, axis=axes), x, pullbacks=(pullback,))  # the axes stay, so that x = y broadcasts
    return y if keepdims else squeeze(y, axes)

def _max(x, axis, out=None):
    return np.maximum.reduce(x, axis=axis, keepdims=True, out=out)

def _min(x, axis, out=None):
    return np.minimum.reduce(x, axis=axis, keepdims=True, out=out)

# ---- contraction -----------------------------------------------------------------------------------------------------

def matmul(x, y):
    """z = x y          x̄ = z̄ yᵀ,   ȳ = xᵀ z̄: matrices on the last two axes, all axes before them broadcast

    (..., n, k) (..., k, m) -> (..., n, m); a 1-d x is a row, a 1-d y a column, as in NumPy.
    """
    x, y = alike("matmul", x, y)
    if not x.ndim or not y.ndim:
        raise ValueError(f"matmul of shapes {x.shape} and {y.shape}: a 0-d Tensor is no matrix; use *")
    k, k_y = x.shape[-1], y.shape[-2:][0]  # of a column its only size
    if k != k_y:
        raise ValueError(
            f"matmul of shapes {x.shape} and {y.shape}: the inner sizes {k} and {k_y} differ; transpose one"
            " with .swapaxes(-1, -2)?"
        )
    if x.ndim == 1:
        return squeeze(matmul(x[None, :], y), -2 if y.ndim > 1 else -1)
    if y.ndim == 1:
        return squeeze(matmul(x, y[:, None]), -1)
    if x.shape[:-2] != y.shape[:-2]:
        batch = broadcast_shape("matmul's stacks", x.shape[:-2], y.shape[:-2])
        x, y = broadcast_to(x, batch + x.shape[-2:]), broadcast_to(y, batch + y.shape[-2:])
    return apply(kernels.matmul, x, y, pullbacks=(
        lambda z, z_bar: matmul(z_bar, swapaxes(y, -1, -2)), lambda z, z_bar: matmul(swapaxes(x, -1, -2), z_bar)))

# ---- softmax ---------------------------------------------------------------------------------------------------------

def logsumexp(x, axis=None, keepdims=False):
    """y = log Σ eˣ = m + log Σ exp(x − m), whatever m is: it is stopped. With the largest x as m nothing overflows"""
    x = as_float(x)
    m = max(x, axis, keepdims=True)
    m = apply(stopped, where(less(abs(m), np.inf), m, 0))  # −∞ − (−∞) would be NaN
    y = m + log(sum(exp(x - m), axis, keepdims=True))
    return y if keepdims else squeeze(y, axes_of(axis, x))

def log_softmax(x, axis=-1):
    """y = x − log Σ eˣ"""
    x = as_float(x)
    return x - logsumexp(x, axis, keepdims=True)

def softmax(x, axis=-1):
    """y = eˣ / Σ eˣ"""
    return exp(log_softmax(x, axis))

# ---- shapes ----------------------------------------------------------------------------------------------------------

def broadcasts(shape, to):
    if len(shape) > len(to):
        return False
    for m, n in zip(shape[::-1], to[::-1]):
        if m != n and m != 1:
            return False
    return True

def broadcast_shape(op, *shapes):
    """The shape that all of these broadcast to: nearly always one of them."""
    for shape in shapes:
        if all(broadcasts(other, shape) for other in shapes):
            return shape
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(
            f"{op} of shapes {' and '.join(map(str, filter(None, shapes)))}: counted from the last axis,"
            " sizes must be equal or 1; insert an axis with x[:, None] or reshape"
        ) from None

# ---- operators and methods of Tensor ---------------------------------------------------------------------------------

for _name, _op in {"add": add, "sub": subtract, "mul": multiply, "truediv": divide, "pow": power, "matmul": matmul,
                   "and": logical_and, "or": logical_or}.items():
    setattr(Tensor, f"__{_name}__", _op)
    setattr(Tensor, f"__r{_name}__", lambda y, x, op=_op: op(x, y))
for _op in (sum, mean, max, min, reshape, transpose, squeeze, swapaxes, astype):
    setattr(Tensor, _op.__name__, _op)
Tensor.__neg__, Tensor.__abs__, Tensor.__invert__, Tensor.__getitem__ = negative, abs, logical_not, gather
Tensor.__eq__, Tensor.__ne__, Tensor.__hash__ = equal, not_equal, object.__hash__
Tensor.__gt__, Tensor.__ge__, Tensor.__lt__, Tensor.__le__ = greater, greater_equal, less, less_equal
Tensor.T = property(transpose)
