"""Kernels that take more than one NumPy call, or one that is not the obvious one.

Each computes what its docstring's plain formula does, to rounding; the tests compare the two. A kernel here is written
as the calls that it consists of, on arrays that are given in advance: `prepared` makes a function of it that runs them,
and `compile` asks for them once and keeps the list. Times are of one core, for float32.
"""

import itertools
import math
from functools import partial

import numpy as np


def prepared(empty):
    """A decorator: calls(*arrays, out, **static) becomes kernel(*arrays, out=None, **static), with `kernel.calls`.

    empty(*arrays, **static) is an array for the result.
    """

    def decorate(calls):
        def kernel(*arrays, out=None, **static):
            out = empty(*arrays, **static) if out is None else out
            for call in calls(*arrays, out=out, **static):
                call()
            return out

        kernel.__name__, kernel.__doc__, kernel.calls = calls.__name__, calls.__doc__, calls
        return kernel

    return decorate


# ---- sums and products -----------------------------------------------------------------------------------------------


def contiguous(*arrays):
    return all(a.flags.c_contiguous for a in arrays)


def summed(x, axis, keepdims):
    kept = [1 if i in axis else n for i, n in enumerate(x.shape) if keepdims or i not in axis]
    dtype = x.dtype if x.dtype.kind == "f" else np.add.reduce(np.empty(0, x.dtype)).dtype  # booleans are counted
    return np.empty(kept, dtype)


@prepared(summed)
def sum(x, axis, keepdims, out):
    """np.add.reduce(x, axis): of adjacent axes that are not the last, as a row of ones times a matrix.

    Over 980 rows of 64 numbers, for each of 4 tasks, np.add.reduce takes 84 µs, BLAS 13.
    """
    adjacent = bool(axis) and axis[-1] - axis[0] < len(axis) and axis[-1] < x.ndim - 1
    if adjacent and x.size and x.dtype.kind == "f" and contiguous(x, out):
        n = math.prod(x.shape[axis[0] : axis[-1] + 1])
        rows = x.reshape(*x.shape[: axis[0]], n, -1)
        yield partial(np.matmul, np.ones((1, n), x.dtype), rows, out.reshape(*rows.shape[:-2], 1, -1))
    else:
        yield partial(np.add.reduce, x, axis, None, out, keepdims)


@prepared(lambda x, y: np.empty(x.shape[:-1] + y.shape[-1:], x.dtype))
def matmul(x, y, out):
    """np.matmul(x, y) of two stacks of one shape.

    A column times a row is an outer product: for 25 tasks, 10 × 1 × 40, np.multiply takes 4 µs, BLAS 12. All tasks
    times one matrix, a θ that is viewed as a stack with stride 0, is one large product: 4 instead of 14 µs.
    """
    if x.shape[-1] == 1:
        yield partial(np.multiply, x, y, out)
    elif x.ndim > 2 and x.size and out.size and not any(y.strides[:-2]) and contiguous(x, out):
        one = y[(0,) * (y.ndim - 2)]
        yield partial(np.matmul, x.reshape(-1, x.shape[-1]), one, out.reshape(-1, out.shape[-1]))
    else:
        yield partial(np.matmul, x, y, out)


# ---- choice ----------------------------------------------------------------------------------------------------------


@prepared(lambda mask, integer: np.empty(mask.shape, integer))
def bits(mask, integer, out):
    """np.where(mask, 0, -1): no bits where True, all where False; the mask that `choose` takes."""
    yield partial(np.copyto, out, mask)
    yield partial(np.subtract, out, out.dtype.type(1), out)


@prepared(lambda bits, x, y: np.empty(bits.shape, x.dtype))
def choose(bits, x, y, out):
    """np.where(bits == 0, x, y), as ((x ⊕ y) ∧ bits) ⊕ x."""
    x_bits, y_bits, z_bits = (a.view(bits.dtype) for a in (x, y, out))

    def call():
        if x.ndim == 0 and not x_bits:  # 0 where True, as in relu and its gradient
            np.bitwise_and(bits, y_bits, z_bits)
        else:
            differ = x_bits ^ y_bits  # new at each call, since out may be x
            differ &= bits
            np.bitwise_xor(differ, x_bits, z_bits)

    yield call


@prepared(lambda mask, x, y: np.empty(mask.shape, x.dtype))
def where(mask, x, y, out):
    """np.where(mask, x, y), which branches at every element and takes ten times as long if the mask is irregular."""
    integer = f"i{x.dtype.itemsize}"
    b = np.empty(mask.shape, integer)
    yield from bits.calls(mask, integer=integer, out=b)
    yield from choose.calls(b, x, y, out=out)


# ---- windows: around is ((top, bottom), (left, right)), the zeros around an image ------------------------------------


def windows(shape, size, stride, around):
    """The shape of the patches of images of this shape: (..., H, W, C) -> (..., h, w, size, size, C)."""
    counts = [(n + before + after - size) // stride + 1 for n, (before, after) in zip(shape[-3:-1], around)]
    return (*shape[:-3], *counts, size, size, shape[-1])


@prepared(lambda x, **static: np.empty(windows(x.shape, **static), x.dtype))
def patches(x, size, stride, around, out):
    """out[i, j, u, v] = x[s i + u − top, s j + v − left], 0 outside of x: a copy for all windows that lie inside, and
    one for those at each edge and corner."""
    *_, height, width, _ = x.shape
    *_, h, w, _, _, _ = out.shape
    for i, u, rows in bands(height, h, size, stride, around[0][0]):
        for j, v, columns in bands(width, w, size, stride, around[1][0]):
            part, (n_u, n_v) = out[..., i, j, :, :, :], (u.stop - u.start, v.stop - v.start)
            if n_u < size or n_v < size:
                yield partial(part.fill, 0)
            if n_u > 0 and n_v > 0:
                pixels = x[..., rows, columns, :]
                y = np.lib.stride_tricks.sliding_window_view(pixels, (n_u, n_v), axis=(-3, -2))  # (..., C, n_u, n_v)
                y = np.moveaxis(y[..., ::stride, ::stride, :, :, :], -3, -1)
                yield partial(np.copyto, part[..., u, v, :], y)


def bands(height, h, size, stride, top):
    """The h windows, grouped by which of their rows u lie in the image: slices of the windows, of u, of the image."""
    edges = [(max(top - stride * i, 0), min(size, height + top - stride * i)) for i in range(h)]
    for (u, end), group in itertools.groupby(range(h), edges.__getitem__):
        group = [*group]
        first, last = group[0], group[-1]
        yield slice(first, last + 1), slice(u, end), slice(stride * first + u - top, stride * last + end - top)


@prepared(lambda y, shape, **static: np.empty(shape, y.dtype))
def unpatch(y, shape, size, stride, around, out):
    """out[s i + u − top, s j + v − left] += y[i, j, u, v], for all (u, v) one after the other."""
    yield partial(out.fill, 0)
    for u in range(size):
        i, rows = inside(u, y.shape[-5], shape[-3], stride, around[0][0])
        for v in range(size):
            j, columns = inside(v, y.shape[-4], shape[-2], stride, around[1][0])
            x = out[..., rows, columns, :]
            yield partial(np.add, x, y[..., i, j, u, v, :], x)


def inside(u, h, height, stride, top):
    """Of h windows, those whose u-th row lies in the image, and the rows of the image where it lies: two slices."""
    first = -(min(u - top, 0) // stride)  # ⌈(top − u) / stride⌉, or 0
    last = max(min(h - 1, (height - 1 - u + top) // stride), first - 1)  # first − 1: an empty slice
    return slice(first, last + 1), slice(first * stride + u - top, max(last * stride + u - top + 1, 0), stride)
