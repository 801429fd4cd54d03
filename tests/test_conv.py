"""Convolution and pooling against plain loops, and to third order; batch norm; the convolutional network."""

import numpy as np
import pytest

import tinymeta as tm
from programs import replay
from tinymeta.conv import padding_of

RNG = np.random.default_rng(0)


def real(*shape):
    return RNG.uniform(-1.5, 1.5, shape)


def conv_by_loops(x, w, stride, before, after):
    """The definition, one output element at a time: x (n, H, W, C), w (k, k, C, F)."""
    n, height, width, _ = x.shape
    k, f = w.shape[0], w.shape[3]
    h, v = ((size + sum(around) - k) // stride + 1 for size, around in zip((height, width), zip(before, after)))
    y = np.zeros((n, h, v, f))
    for image, i, j, a, b in np.ndindex(n, h, v, k, k):
        row, column = i * stride + a - before[0], j * stride + b - before[1]
        if 0 <= row < height and 0 <= column < width:
            y[image, i, j] += x[image, row, column] @ w[a, b]
    return y


CASES = [  # height, width, channels, filters, kernel, stride, padding
    (5, 4, 2, 3, 3, 1, "same"),
    (5, 4, 2, 3, 3, 2, "same"),
    (4, 5, 1, 2, 3, 2, "valid"),
    (6, 6, 2, 1, 2, 2, "same"),
    (4, 4, 1, 2, 2, 3, "same"),
    (4, 3, 2, 2, 3, 2, 2),
    (3, 3, 1, 1, 1, 2, "same"),
]


@pytest.mark.parametrize("height, width, channels, filters, k, stride, padding", CASES)
def test_conv2d_is_its_definition(height, width, channels, filters, k, stride, padding):
    tasks, n = 2, 3
    x, w = real(tasks, n, height, width, channels), real(tasks, k, k, channels, filters)
    around = padding_of(padding, x.shape, k, stride)
    before, after = zip(*around)
    expected = np.stack([conv_by_loops(x[t], w[t], stride, before, after) for t in range(tasks)])
    np.testing.assert_allclose(tm.conv2d(x, w, stride, padding).data, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(tm.conv2d(x[0], w[0], stride, padding).data, expected[0], rtol=1e-12, atol=1e-12)
    if (stride, padding) == (1, "same"):
        np.testing.assert_array_equal(tm.conv2d(x, w).data, tm.conv2d(x, w, stride, padding).data)  # the defaults
    if padding == "same":
        assert expected.shape[2:4] == (-(-height // stride), -(-width // stride))


def test_same_padding_puts_the_odd_pixel_at_the_end():
    assert padding_of("same", (28, 7, 1), 3, 2) == ((0, 1), (1, 1))
    assert padding_of("same", (14, 14, 1), 3, 1) == ((1, 1), (1, 1))
    assert padding_of("same", (4, 4, 1), 1, 2) == ((0, 0), (0, 0))


@pytest.mark.parametrize("height, width, channels, filters, k, stride, padding", CASES[:6])
def test_conv2d_to_third_order(height, width, channels, filters, k, stride, padding):
    x, w = real(1, height, width, channels), real(k, k, channels, filters)
    tm.check_grads(lambda x, w: tm.conv2d(x, w, stride, padding), [x, w], order=2)
    tm.check_grads(lambda x, w: tm.sin(tm.sum(tm.conv2d(x, w, stride, padding), axis=(0, 1, 2))), [x, w], order=3)


def test_conv2d_with_a_kernel_per_task():
    x, w = real(2, 1, 3, 3, 2), real(2, 2, 2, 2, 1)
    tm.check_grads(lambda x, w: tm.tanh(tm.conv2d(x, w, 1)), [x, w], order=2)
    shared = tm.conv2d(x, w[0])
    np.testing.assert_allclose(shared.data[1], tm.conv2d(x[1], w[0]).data, rtol=1e-13)


@pytest.mark.parametrize("size, stride", [(2, 1), (2, 2), (3, 2), (2, 3), (1, 1)])
def test_patches_and_unpatch(size, stride):
    """y[i, j, u, v] = x[s i + u, s j + v]; ⟨patches(x), y⟩ = ⟨x, unpatch(y)⟩; both to third order."""
    x = real(2, 5, 4, 2)
    p = tm.patches(x, size, stride).data
    for i, j, u, v in np.ndindex(*p.shape[1:5]):
        np.testing.assert_array_equal(p[:, i, j, u, v], x[:, i * stride + u, j * stride + v])
    if stride == 1:
        np.testing.assert_array_equal(tm.patches(x, size).data, p)
        np.testing.assert_array_equal(tm.unpatch(p, x.shape).data, tm.unpatch(p, x.shape, 1).data)
    y = real(*p.shape)
    assert (p * y).sum() == pytest.approx((x * tm.unpatch(y, x.shape, stride).data).sum())
    tm.check_grads(lambda x: tm.sin(tm.patches(x, size, stride)), [x[:1, :3, :3]], order=3)
    y = real(*tm.patches(x[:1, :3, :3, :1], size, stride).shape)
    tm.check_grads(lambda y: tm.sin(tm.unpatch(y, (1, 3, 3, 1), stride)), [y], order=3)


@pytest.mark.parametrize("size, stride", [(2, None), (2, 1), (3, 2), (3, None)])
def test_pooling(size, stride):
    x = RNG.permutation(np.linspace(-1, 1, 2 * 5 * 4 * 2)).reshape(2, 5, 4, 2)  # no ties
    s = stride or size
    windows = [[x[:, i : i + size, j : j + size] for j in range(0, 4 - size + 1, s)] for i in range(0, 5 - size + 1, s)]
    for pool, reduce in [(tm.max_pool, np.max), (tm.average_pool, np.mean)]:
        expected = np.stack([np.stack([reduce(w, axis=(1, 2)) for w in row], 1) for row in windows], 1)
        np.testing.assert_allclose(pool(x, size, stride).data, expected, rtol=1e-13)
        tm.check_grads(lambda x, pool=pool: tm.sin(pool(x, size, stride)), [x[:1, :3, :3]], order=3)
        np.testing.assert_array_equal(pool(x).data, pool(x, 2, 2).data)
    np.testing.assert_allclose(tm.global_average(x).data, x.mean((1, 2)), rtol=1e-13)
    tm.check_grads(lambda x: tm.sin(tm.global_average(x)), [x], order=2)


def test_overlapping_windows_add_up():
    """A pixel in four windows gets four shares: assigning instead of adding would lose three."""
    x = tm.Tensor(np.ones((3, 3, 1)))
    (g,) = tm.vjp(tm.average_pool(x, 2, 1), [x], np.ones((2, 2, 1)))
    np.testing.assert_array_equal(g.data[..., 0], np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4)


@pytest.mark.parametrize("pool", [tm.max_pool, tm.average_pool])
def test_a_recorded_convolution_runs_again_on_other_images(pool):
    """To second order and into other arrays, which is what tm.compile does."""

    def all_orders(x, w):
        y = tm.sin(pool(tm.conv2d(x, w), 2, 1))
        g = tm.vjp([y], [x, w], [np.ones(y.shape)], create_graph=True)
        return [y, *g, *tm.vjp(g, [x, w], [np.ones(a.shape) for a in g], create_graph=True)]

    x, w = real(2, 4, 3, 2), real(3, 3, 2, 2)
    here = [tm.Tensor(x), tm.Tensor(w)]
    for a, b in zip(replay(all_orders(*here), here, [x + 1, w - 1]), all_orders(tm.Tensor(x + 1), tm.Tensor(w - 1))):
        np.testing.assert_allclose(a, b.data, rtol=1e-10, atol=1e-10)


def test_bad_input():
    x, w = np.ones((1, 4, 4, 2)), np.ones((3, 3, 2, 1))
    for images, filters in [(x[0], w), (x, w[0]), (x, w[:2]), (x, w[:, :, :1])]:
        with pytest.raises(ValueError, match="images are .* filters"):
            tm.conv2d(images, filters)
    for padding in (-1, True, 1.0, "full", None):
        with pytest.raises(ValueError, match="padding is 'same', 'valid' or a number"):
            tm.conv2d(x, w, padding=padding)
    np.testing.assert_array_equal(tm.conv2d(x, w, padding=0).data, tm.conv2d(x, w, padding="valid").data)
    np.testing.assert_array_equal(tm.conv2d(x.tolist(), w.tolist()).data, tm.conv2d(x, w).data)
    assert tm.patches(x[:0], 2).shape == (0, 3, 3, 2, 2, 2)
    for narrow in (x[:, :, :1], x[:, :1]):
        with pytest.raises(ValueError, match="smaller than a patch"):
            tm.patches(narrow, 2)
    for options in [(5, 1), (0, 1), (2, 0)]:
        with pytest.raises(ValueError, match="patches of size|must be 1 or more"):
            tm.patches(x, *options)
    with pytest.raises(ValueError, match="unpatch"):
        tm.unpatch(np.ones((1, 2, 2, 3, 3, 1)), (1, 3, 3, 1))
    with pytest.raises(ValueError, match="unpatch of shape"):
        tm.unpatch(np.ones((2, 2, 3, 3, 1)), (3, 3))


# ---- batch norm ------------------------------------------------------------------------------------------------------


def test_batch_norm():
    x, gain, bias = real(2, 6, 3), real(1, 3), real(1, 3)
    y = tm.nn.batch_norm(x, eps=0.0).data
    np.testing.assert_allclose(y.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(y.var(1), 1, rtol=1e-12)
    expected = gain * (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-3) + bias
    np.testing.assert_allclose(tm.nn.batch_norm(x, gain, bias).data, expected, rtol=1e-12)
    tm.check_grads(lambda x: tm.nn.batch_norm(x), [real(4, 2)], order=3)
    tm.check_grads(
        lambda x, g, b: tm.tanh(tm.nn.batch_norm(x, g, b)), [real(2, 3, 2), real(2, 1, 2), real(1, 2)], order=2
    )


def test_batch_norm_is_finite_on_equal_rows_and_dead_units():
    x = tm.Tensor(np.zeros((4, 2)) + np.array([0.0, 1e4]))
    y = tm.sum(tm.nn.batch_norm(x) ** 2)
    (g,) = tm.grad(y, [x], create_graph=True)
    (gg,) = tm.grad(tm.sum(g * g), [x])
    assert all(np.isfinite(t.data).all() for t in (y, g, gg))


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool, flatten, size", [(False, False, 9), (True, False, 8), (False, True, 9)])
def test_convnet_shapes_and_stacking(pool, flatten, size):
    """A stack of networks on a stack of tasks is each network on its task."""
    blocks, filters, ways, n = 2, 3, 4, 5
    features = 3 * 3 * filters if flatten else None
    nets = [
        tm.nn.init_convnet(np.random.default_rng(i), ways, filters, blocks, head_features=features, dtype=np.float64)
        for i in range(2)
    ]
    x = real(2, n, size, size, 1)
    stacked = [tm.stack(ps) for ps in zip(*nets)]
    together = tm.nn.convnet(stacked, x, pool, flatten)
    assert together.shape == (2, n, ways)
    for i in range(2):
        np.testing.assert_allclose(together.data[i], tm.nn.convnet(nets[i], x[i], pool, flatten).data, rtol=1e-10)


def normed(x, gain, bias):
    """Batch norm and relu of rows, in this order."""
    return np.maximum(gain * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) + bias, 0)


def randomised(params):
    """With gains and biases that make a difference, which the initial ones and zeros do not."""
    return [p.data if p.ndim > 2 or len(p.data) > 1 else real(*p.shape) for p in params]


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_convnet_is_its_definition(pool, flatten):
    """Blocks of convolution, batch norm, relu and pooling, then the head, in plain NumPy."""
    rng, ways, filters = np.random.default_rng(0), 4, 3
    features = (2 * 2 if pool else 3 * 3) * filters if flatten else None
    params = randomised(tm.nn.init_convnet(rng, ways, filters, 2, 2, features, scale=1.0, dtype=np.float64))
    *blocks, w, b = params
    x = images = real(5, 9, 9, 2)
    for kernels, gain, bias in zip(blocks[::3], blocks[1::3], blocks[2::3]):
        around = padding_of("same", x.shape, 3, 1 if pool else 2)
        y = conv_by_loops(x, kernels, 1 if pool else 2, *zip(*around))
        x = normed(y.reshape(-1, filters), gain, bias).reshape(y.shape)
        if pool:
            half = x.shape[1] // 2
            x = x[:, : 2 * half, : 2 * half].reshape(5, half, 2, half, 2, filters).max(axis=(2, 4))
    expected = (x.reshape(5, -1) if flatten else x.mean(axis=(1, 2))) @ w + b
    result = tm.nn.convnet([tm.Tensor(p) for p in params], images, pool, flatten)
    np.testing.assert_allclose(result.data, expected, rtol=1e-10, atol=1e-10)


def test_dense_is_its_definition():
    params = randomised(tm.nn.init_dense(np.random.default_rng(0), 4, (5, 3), 7, scale=1.0, dtype=np.float64))
    w1, gain1, bias1, w2, gain2, bias2, w, b = params
    x = real(6, 7)
    expected = normed(normed(x @ w1, gain1, bias1) @ w2, gain2, bias2) @ w + b
    np.testing.assert_allclose(tm.nn.dense([tm.Tensor(p) for p in params], x).data, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [None, 1.5])
@pytest.mark.parametrize("features", [None, 256])
def test_initial_parameters(scale, features):
    """Weights ~ N(0, scale² / inputs), 1/3 by default, the head's too; gains 1, biases 0."""
    rng, options = np.random.default_rng(0), {} if scale is None else {"scale": scale}
    for *blocks, w, b in (
        tm.nn.init_convnet(rng, 40, head_features=features, **options),
        tm.nn.init_dense(rng, 40, (256, features or 64), **options),
    ):
        for weights in (*blocks[::3], w):
            size = weights.data.std() * np.sqrt(np.prod(weights.shape[:-1])) / (scale or 1 / 3)
            assert abs(size - 1) < 5 / np.sqrt(2 * weights.size)
            assert abs(weights.data.mean()) < 5 * weights.data.std() / np.sqrt(weights.size)
        assert all((gain.data == 1).all() for gain in blocks[1::3])
        assert all((bias.data == 0).all() for bias in (*blocks[2::3], b))


def test_the_papers_network_has_its_number_of_parameters():
    """Four blocks of 64 filters on 28 × 28: 111,168 kernel weights, 512 of batch norm, 325 in the head."""
    params = tm.nn.init_convnet(np.random.default_rng(0), 5)
    assert sum(p.size for p in params[:-2:3]) == 576 + 3 * 36_864
    assert sum(p.size for p in params) == 576 + 3 * 36_864 + 512 + 325
    assert tm.nn.convnet(params, np.zeros((5, 28, 28, 1), np.float32)).shape == (5, 5)
    flat = tm.nn.init_convnet(np.random.default_rng(0), 5, head_features=256)
    assert tm.nn.convnet(flat, np.zeros((5, 28, 28, 1), np.float32), flatten=True).dtype == np.float32


def test_the_dense_network():
    """Its sizes, its equation, and a stack of networks on a stack of tasks is each network on its task."""
    params = tm.nn.init_dense(np.random.default_rng(0), 5)
    assert [p.shape for p in params[::3]] == [(784, 256), (256, 128), (128, 64), (64, 64), (64, 5)]
    assert [p.shape for p in params[-2:]] == [(64, 5), (1, 5)] and len(params) == 4 * 3 + 2
    assert params[0].data.std() == pytest.approx(np.sqrt(1 / (9 * 784)), rel=0.01) and (params[1].data == 1).all()
    nets = [tm.nn.init_dense(np.random.default_rng(i), 4, (5, 3), 7, dtype=np.float64) for i in range(2)]
    x = real(2, 6, 7)
    together = tm.nn.dense([tm.stack(ps) for ps in zip(*nets)], x)
    assert together.shape == (2, 6, 4)
    for i, (w1, gain1, bias1, w2, gain2, bias2, w, b) in enumerate(nets):
        h = tm.relu(tm.nn.batch_norm(tm.relu(tm.nn.batch_norm(x[i] @ w1, gain1, bias1)) @ w2, gain2, bias2))
        np.testing.assert_allclose(together.data[i], (h @ w + b).data, rtol=1e-10)


NETWORKS = {
    "conv": (lambda rng: tm.nn.init_convnet(rng, 2, filters=2, blocks=2, dtype=np.float64), tm.nn.convnet),
    "dense": (
        lambda rng: tm.nn.init_dense(rng, 2, (4, 3), 25, dtype=np.float64),
        lambda params, x: tm.nn.dense(params, tm.reshape(x, (*x.shape[:-3], 25))),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_maml_through_a_network_with_batch_norm_is_the_finite_difference(name):
    from regression import assert_close, finite_difference

    init, network = NETWORKS[name]
    theta = init(np.random.default_rng(0))
    images, labels = real(2, 8, 5, 5, 1), np.array([[0, 1, 1, 0, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0, 0, 1]])
    support, query = (images[:, :4], labels[:, :4]), (images[:, 4:], labels[:, 4:])

    def loss(phi, data):
        return tm.nn.cross_entropy(network(phi, data[0]), data[1])

    def adapted_loss(theta):
        return tm.mean(loss(tm.meta.adapt(loss, theta, support, alpha=0.4, steps=2), query)).item()

    _, meta_grad = tm.meta.maml(loss, theta, support, query, alpha=0.4, steps=2)
    assert_close(meta_grad, finite_difference(adapted_loss, theta), rtol=1e-5)


@pytest.mark.parametrize("number", [0, -1, 2.0, True, "2", None])
def test_sizes_and_strides_are_whole_numbers(number):
    x = np.ones((1, 4, 4, 1))
    for call in (
        lambda: tm.patches(x, number),
        lambda: tm.patches(x, 2, number),
        lambda: tm.unpatch(np.ones((1, 2, 2, 2, 2, 1)), (1, 4, 4, 1), number),
        lambda: tm.conv2d(x, np.ones((2, 2, 1, 1)), number),
    ):
        with pytest.raises((TypeError, ValueError), match="(size|stride) must be 1 or more"):
            call()
    with pytest.raises(ValueError, match="unpatch of shape"):
        tm.unpatch(np.ones(3), (4, 4, 1))
    for padding in (True, np.array([1, 2]), -1, 1.0):
        with pytest.raises(ValueError, match="padding is 'same'"):
            tm.conv2d(x, np.ones((2, 2, 1, 1)), padding=padding)
