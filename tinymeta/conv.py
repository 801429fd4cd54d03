"""Convolution and pooling: a convolution is one batched matrix product over patches.

    x (..., n, H, W, C)    images, channels last
    w (..., k, k, C, F)    F filters of k × k; axes before, such as tasks, broadcast
    y (..., n, H′, W′, F)  y[i, j, f] = Σ_{u,v,c} x[s i + u − p, s j + v − p, c] w[u, v, c, f],   stride s, padding p

`patches` cuts images into the windows under the filters; `unpatch`, its adjoint, adds windows back into images where
they overlap. Each is the other's pullback. Convolution and pooling are made of them and of ops that can be
differentiated any number of times, so they can be too, and have no derivative of their own.
"""

from functools import partial

import numpy as np

from . import kernels, ops
from .arguments import shape_of, whole
from .ops import matmul, mean, reshape
from .tensor import Tensor, apply


def patches(x, size, stride=1, padding="valid"):
    """y[i, j, u, v] = x[s i + u − p, s j + v − p], 0 outside of x        x̄ = unpatch(ȳ)

    (..., H, W, C) -> (..., H′, W′, size, size, C). padding: see `conv2d`.
    """
    x = Tensor(x)
    whole(1, size=size, stride=stride)
    if x.ndim < 3:
        raise ValueError(f"patches of shape {x.shape}: x is (..., H, W, C)")
    static = dict(size=size, stride=stride, around=padding_of(padding, x.shape, size, stride))
    if min(kernels.windows(x.shape, **static)[-5:-3]) < 1:
        raise ValueError(f"patches of size {size}, padding {padding!r}, of shape {x.shape}: x is smaller than a patch")
    pullbacks = (lambda y, y_bar: unpatch(y_bar, x.shape, stride, padding),)
    return apply(partial(kernels.patches, **static), x, pullbacks=pullbacks)


def unpatch(y, shape, stride=1, padding="valid"):
    """x = Σ of the windows y, each at its place        ȳ = patches(x̄):  (..., H′, W′, size, size, C) -> shape"""
    y, shape = Tensor(y), shape_of(shape)
    whole(1, stride=stride)
    if y.ndim < 5 or len(shape) < 3:
        raise ValueError(f"unpatch of shape {y.shape} to {shape}: windows (..., h, w, size, size, C) to (..., H, W, C)")
    size = y.shape[-2]
    static = dict(size=size, stride=stride, around=padding_of(padding, shape, size, stride))
    if y.shape != kernels.windows(shape, **static):
        raise ValueError(f"unpatch of shape {y.shape}, stride {stride}: these windows don't lie within shape {shape}")
    pullbacks = (lambda x, x_bar: patches(x_bar, size, stride, padding),)
    return apply(partial(kernels.unpatch, shape=shape, **static), y, pullbacks=pullbacks)


def conv2d(x, w, stride=1, padding="same"):
    """y as above: x (..., n, H, W, C), w (..., k, k, C, F) -> (..., n, H′, W′, F).

    padding: "valid", none; an integer, on every side; or "same", so that H′ = ⌈H / s⌉ with the odd pixel at the end.
    """
    x, w = Tensor(x), Tensor(w)
    if x.ndim < 4 or w.ndim < 4 or w.shape[-4] != w.shape[-3] or x.shape[-1] != w.shape[-2]:
        raise ValueError(
            f"conv2d of images {x.shape} with filters {w.shape}: images are (..., n, H, W, C), filters (..., k, k, C,"
            " F) with the same C"
        )
    k, _, c, f = w.shape[-4:]
    p = patches(x, k, stride, padding)  # (..., n, H′, W′, k, k, C)
    n, h, w_out = p.shape[-6:-3]
    rows = reshape(p, (*p.shape[:-6], n * h * w_out, k * k * c))
    y = matmul(rows, reshape(w, (*w.shape[:-4], k * k * c, f)))
    return reshape(y, (*y.shape[:-2], n, h, w_out, f))


def padding_of(padding, shape, size, stride):
    """Zeros ((top, bottom), (left, right)) around images (..., H, W, C)."""
    if isinstance(padding, str) and padding == "valid":
        return (0, 0), (0, 0)
    if isinstance(padding, str) and padding == "same":
        totals = [(-(-n // stride) - 1) * stride + size - n for n in shape[-3:-1]]
        return tuple((total // 2, total - total // 2) if total > 0 else (0, 0) for total in totals)
    if isinstance(padding, (int, np.integer)) and not isinstance(padding, bool) and padding >= 0:
        return ((int(padding), int(padding)),) * 2
    raise ValueError(f"padding is 'same', 'valid' or a number of pixels, got {padding!r}")


def max_pool(x, size=2, stride=None):
    """The largest of a window: (..., H, W, C) -> (..., H′, W′, C). stride: `size` by default; windows may overlap."""
    return ops.max(patches(x, size, size if stride is None else stride), axis=(-3, -2))


def average_pool(x, size=2, stride=None):
    """The mean of a window, as `max_pool`."""
    return mean(patches(x, size, size if stride is None else stride), axis=(-3, -2))


def global_average(x):
    """The mean over all pixels: (..., H, W, C) -> (..., C)."""
    return mean(x, axis=(-3, -2))
