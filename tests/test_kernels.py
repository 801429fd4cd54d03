"""Every kernel against the obvious call that it stands for, in fresh arrays, in given buffers and over its inputs."""

import itertools
from functools import partial

import numpy as np
import pytest

from tinymeta import kernels

RNG = np.random.default_rng(0)


def real(*shape, dtype=np.float64):
    return RNG.standard_normal(shape).astype(dtype)


def run(kernel, *arrays, **static):
    """The result, the same in a fresh array, in a buffer full of NaN, and by the prepared calls, run twice."""
    fresh = kernel(*arrays, **static)
    poison = np.full_like(fresh, 77)
    assert kernel(*arrays, **static, out=poison) is poison
    again = np.full_like(fresh, 88)
    calls = list(kernel.calls(*arrays, out=again, **static))
    for _ in range(2):
        for call in calls:
            call()
        np.testing.assert_array_equal(again, fresh)
    np.testing.assert_array_equal(poison, fresh)
    return fresh


SHAPES = [(3, 4, 5), (2, 7), (1, 6, 1, 4), (5,), (3, 0, 2), (0, 3), (2, 3, 4, 5), (2, 3, 2, 3, 2)]
AXES = [axis for n in range(6) for axis in itertools.combinations(range(5), n)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, bool])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_is_add_reduce(shape, keepdims, dtype):
    contiguous = (3 * real(*shape)).astype(dtype)
    laid_out = [contiguous, contiguous.T.copy().T, np.repeat(contiguous, 2, axis=-1)[..., ::2]]
    for x, axis in itertools.product(laid_out, AXES):
        if any(a >= x.ndim for a in axis):
            continue
        y = run(kernels.sum, x, axis=axis, keepdims=keepdims)
        expected = np.asarray(np.add.reduce(x, axis=axis, keepdims=keepdims))
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(y, expected, rtol=1e-5 if dtype is np.float32 else 1e-12, atol=1e-5)


def test_sum_into_a_buffer_that_is_a_view():
    for x in (real(4, 5, 6), real(4, 5, 6, 3)):
        buffer = np.zeros(x.sum(1).T.shape)
        kernels.sum(x, axis=(1,), keepdims=False, out=buffer.T)
        np.testing.assert_allclose(buffer.T, x.sum(1), rtol=1e-12)


def test_sum_keeps_infinities_and_nan():
    x = real(2, 3, 4)
    x[0, 1, 2], x[1, 0, 3] = np.inf, np.nan
    np.testing.assert_array_equal(
        np.isnan(run(kernels.sum, x, axis=(1,), keepdims=True)), np.isnan(x.sum(1, keepdims=True))
    )
    assert run(kernels.sum, x, axis=(1,), keepdims=False)[0, 2] == np.inf


def stacks():
    """Pairs of stacks of matrices: of all layouts and of the sizes at which another way is taken."""
    for batch, (n, k, m) in itertools.product(
        [(), (3,), (2, 3), (0,)], [(4, 5, 6), (4, 1, 6), (1, 5, 1), (1, 1, 1), (4, 5, 0), (0, 5, 4), (4, 0, 3)]
    ):
        x, y = real(*batch, n, k), real(*batch, k, m)
        yield x, y
        yield real(*batch, k, n).swapaxes(-1, -2), real(*batch, m, k).swapaxes(-1, -2)
        yield x, np.broadcast_to(real(k, m), y.shape)
        yield x, np.broadcast_to(real(m, k), y.swapaxes(-1, -2).shape).swapaxes(-1, -2)
        yield np.broadcast_to(real(n, k), x.shape), y
        yield np.broadcast_to(real(n, k), x.shape), np.broadcast_to(real(k, m), y.shape)
        if len(batch) == 2:
            yield x, np.broadcast_to(real(2, 1, k, m), y.shape)
            yield x, np.broadcast_to(real(1, 3, k, m), y.shape)


def test_matmul_is_matmul():
    for x, y in stacks():
        np.testing.assert_allclose(run(kernels.matmul, x, y), np.matmul(x, y), rtol=1e-12, atol=1e-12)
    x, y = np.arange(12).reshape(2, 2, 3), np.arange(12).reshape(2, 3, 2)
    np.testing.assert_array_equal(run(kernels.matmul, x, y), x @ y)


def test_matmul_takes_one_product_for_all_tasks_and_none_for_a_column():
    def ways(x, y):
        return [
            (c.func, c.args[0].ndim) for c in kernels.matmul.calls(x, y, out=np.empty((*x.shape[:-1], y.shape[-1])))
        ]

    theta = np.broadcast_to(real(4, 5), (3, 4, 5))
    assert ways(real(3, 2, 4), theta) == [(np.matmul, 2)]
    assert ways(real(3, 2, 5), theta.swapaxes(1, 2)) == [(np.matmul, 2)]
    assert ways(real(3, 2, 4), theta.copy()) == [(np.matmul, 3)]
    assert ways(real(3, 4, 2).swapaxes(1, 2), theta) == [(np.matmul, 3)]
    assert ways(real(3, 2, 1), real(3, 1, 4)) == [(np.multiply, 3)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int32, np.uint8, bool])
def test_where_is_where_to_the_bit(dtype):
    x, y = (3 * real(4, 5)).astype(dtype), (3 * real(4, 5)).astype(dtype)
    mask = RNG.random((4, 5)) < 0.5
    zero = np.zeros((), dtype)
    one = np.ones((), dtype)
    masks = [mask, np.broadcast_to(mask[:1], mask.shape), mask.T.copy().T]
    for mask, (a, b) in itertools.product(
        masks, [(x, y), (zero, y), (x, zero), (one, y), (x, one), (zero, one), (x.T.copy().T, y)]
    ):
        expected = np.where(mask, a, b)
        z = run(kernels.where, mask, a, b)
        assert z.dtype == dtype and z.tobytes() == expected.tobytes()
        for over in (a, b):
            if over.shape == mask.shape:
                over = over.copy()
                kernels.where(
                    mask,
                    over if over.tobytes() == a.tobytes() else a,
                    over if over.tobytes() == b.tobytes() else b,
                    out=over,
                )
                np.testing.assert_array_equal(over, expected)


def test_where_keeps_nan_and_minus_zero_of_the_side_it_takes_only():
    x, y = np.array([np.nan, -0.0, np.inf]), np.array([1.0, np.nan, -0.0])
    mask = np.array([False, True, False])
    assert run(kernels.where, mask, x, y).tobytes() == np.array([1.0, -0.0, -0.0]).tobytes()


def test_bits_serve_every_choice_and_stay():
    mask, x, y = RNG.random((3, 4)) < 0.5, real(3, 4), real(3, 4)
    bits = run(kernels.bits, mask, integer="i8")
    before = bits.copy()
    np.testing.assert_array_equal(run(kernels.choose, bits, x, y), np.where(mask, x, y))
    np.testing.assert_array_equal(run(kernels.choose, bits, np.zeros(()), y), np.where(mask, 0, y))
    np.testing.assert_array_equal(bits, before)


def test_a_0_d_side_of_choose_is_read_when_it_runs():
    """A replay may find zero where there was none when the calls were prepared, and the other way round."""
    bits, x, y = kernels.bits(RNG.random((3, 4)) < 0.5, integer="i8"), np.array(0.0), real(3, 4)
    out = np.empty((3, 4))
    (call,) = kernels.choose.calls(bits, x, y, out=out)
    for value in (0.0, 2.0, 0.0):
        x[...] = value
        call()
        np.testing.assert_array_equal(out, np.where(bits == 0, value, y))


WINDOWS = [
    (size, stride, around, height, width)
    for size, stride, around, height, width in itertools.product(
        (1, 2, 3, 5), (1, 2, 3), [((0, 0), (0, 0)), ((0, 1), (1, 2)), ((2, 0), (3, 3))], (3, 5), (4, 7)
    )
    if height + sum(around[0]) >= size and width + sum(around[1]) >= size
]


def window_by_window(x, size, stride, around):
    padded = np.pad(x, ((0, 0),) * (x.ndim - 3) + around + ((0, 0),))
    _, h, w = (None, *((n - size) // stride + 1 for n in padded.shape[-3:-1]))
    rows = [
        np.stack([padded[..., stride * i : stride * i + size, stride * j : stride * j + size, :] for j in range(w)], -4)
        for i in range(h)
    ]
    return np.stack(rows, -5)


@pytest.mark.parametrize("size, stride, around, height, width", WINDOWS)
def test_patches_and_unpatch_window_by_window(size, stride, around, height, width):
    static = dict(size=size, stride=stride, around=around)
    x = real(2, 3, height, width, 2)
    y = run(kernels.patches, x, **static)
    np.testing.assert_array_equal(y, window_by_window(x, **static))
    z = real(*y.shape)
    back = run(kernels.unpatch, z, shape=x.shape, **static)
    np.testing.assert_allclose(np.vdot(back, x), np.vdot(z, y), rtol=1e-10)  # the adjoint
    pixel = partial(window_by_window, **static)
    i = tuple(RNG.integers(x.shape))  # and pixel by pixel
    e = np.zeros_like(x)
    e[i] = 1
    np.testing.assert_allclose(back[i], np.vdot(pixel(e), z), rtol=1e-10, atol=1e-12)


def test_the_padding_of_patches_stays_zero_when_run_again():
    x, around = real(4, 4, 1), ((1, 1), (1, 1))
    out = np.empty(kernels.windows(x.shape, 3, 1, around))
    calls = list(kernels.patches.calls(x, size=3, stride=1, around=around, out=out))
    for _ in range(3):
        x[...] = real(4, 4, 1)
        for call in calls:
            call()
        np.testing.assert_array_equal(out, window_by_window(x, 3, 1, around))
