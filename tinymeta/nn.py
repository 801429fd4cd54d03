"""Layers and losses. Parameters are a flat list of Tensors; a network is a function of them: network(params, x).

Layers act on the trailing axes and biases are rows (1, features), so the same line serves one task, x (n, in), and a
stack of tasks with weights of their own, x (tasks, n, in) and W (tasks, in, out). A bias of shape (features,) would
broadcast without complaint, and wrongly, when there are as many tasks as examples.
"""

import numpy as np

from .arguments import FLOATS, NUMBERS, describe, finite, function, generator, items, shape_of, type_of, whole
from .conv import conv2d, global_average, max_pool
from .ops import astype, equal, log_softmax, matmul, mean, power, relu, reshape, sum, where
from .tensor import Tensor


def init_mlp(rng, sizes, dtype=np.float32, scale=2**0.5):
    """Parameters [W_1, b_1, W_2, b_2, ...] of an MLP: W (in, out) ~ N(0, scale² / in), b (1, out) = 0.

    rng: a np.random.Generator. sizes: features of every layer, e.g. (1, 40, 40, 1). scale √2 keeps the variance through
    relu (He et al. 2015).
    """
    sizes, dtype = shape_of(sizes), type_of(dtype, FLOATS)
    generator(rng)
    finite(scale=scale)
    for size in sizes:
        whole(1, sizes=size)
    if len(sizes) < 2:
        raise ValueError(f"sizes are the features of input and output and of all layers between, got {sizes}")
    params = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        params.append(Tensor((scale / np.sqrt(n_in) * rng.standard_normal((n_in, n_out))).astype(dtype)))
        params.append(Tensor(np.zeros((1, n_out), dtype)))
    return params


def mlp(params, x, activation=relu):
    """h ← activation(h W + b) for every layer but the last, which stays linear: (..., n, in) -> (..., n, out)."""
    params = items("params", params)
    function(activation=activation)
    if len(params) < 2 or len(params) % 2:
        raise ValueError(f"mlp takes [W_1, b_1, W_2, b_2, ...], got {len(params)} parameters")
    *hidden, (w, b) = zip(params[::2], params[1::2])
    h = x
    for w_i, b_i in hidden:
        h = activation(matmul(h, w_i) + row(b_i))
    return matmul(h, w) + row(b)


def row(b):
    """A bias or gain (..., 1, features); without tasks also (features,)."""
    b = b if isinstance(b, NUMBERS) else Tensor(b)
    if not isinstance(b, NUMBERS) and b.ndim > 1 and b.shape[-2] != 1:
        raise ValueError(f"biases and gains are rows (..., 1, features), got shape {b.shape}: it would spread over n")
    return b


# ---- networks with batch norm ---------------------------------------------------------------------------------------


def batch_norm(x, gain=None, bias=None, eps=1e-3):
    """(x − μ) / √(σ² + ε), then times gain plus bias, if given: (..., n, features), the statistics over the n rows.

    They are always those of the batch at hand, in training and at test: there are no running averages (Ioffe and
    Szegedy 2015 have them). What is predicted for one row therefore depends on the others.
    """
    finite(0, eps=eps)
    centred = x + -mean(x, axis=-2, keepdims=True)  # a difference would negate all rows in the derivative, not one
    scale = power(mean(centred * centred, axis=-2, keepdims=True) + eps, -0.5)
    if gain is not None:
        scale = scale * row(gain)  # a row times a row, not times n rows
    y = centred * scale
    return y if bias is None else y + row(bias)


def init_convnet(rng, ways, filters=64, blocks=4, channels=1, head_features=None, scale=1 / 3, dtype=np.float32):
    """Parameters of `convnet`: per block weights (3, 3, in, filters), gain and bias (1, filters); then a linear head.

    head_features: what reaches the head, `filters` by default (the spatial mean), or all pixels of the last block.

    Weights ~ N(0, scale² / inputs), gains 1, biases 0. Batch norm undoes the size of the weights before it, but not in
    the gradient, which is as 1 / ‖w‖, nor in the Hessian, as 1 / ‖w‖²: a step turns small weights farther. MAML learns
    faster from 1/3 than from the √2 that relu alone would want; iMAML, which needs a small H/λ, wants larger ones.
    """
    head_features = filters if head_features is None else head_features
    whole(1, ways=ways, filters=filters, blocks=blocks, channels=channels, head_features=head_features)
    shapes = [(3, 3, c, filters) for c in [channels] + (blocks - 1) * [filters]]
    return init_blocks(rng, [*shapes, (head_features, ways)], scale, dtype)


def convnet(params, x, pool=False, flatten=False):
    """Logits of images: (..., n, H, W, C) -> (..., n, ways), by blocks of convolution, batch norm and relu, and a head.

    Each block halves the image: with stride 2 (Finn et al. 2017), or with max pooling if `pool` (Vinyals et al. 2016).
    The head sees the mean over the last block's pixels, or all of them if `flatten`.
    """
    *blocks, w, b = blocks_of("convnet", params)
    for w_i, gain, bias in zip(blocks[::3], blocks[1::3], blocks[2::3]):
        y = conv2d(x, w_i, stride=1 if pool else 2)
        rows = reshape(y, (*y.shape[:-4], -1, y.shape[-1]))
        x = reshape(relu(batch_norm(rows, gain, bias)), y.shape)
        x = max_pool(x) if pool else x
    x = reshape(x, (*x.shape[:-3], -1)) if flatten else global_average(x)
    return matmul(x, w) + row(b)


def init_dense(rng, ways, features=(256, 128, 64, 64), inputs=784, scale=1 / 3, dtype=np.float32):
    """Parameters of `dense`: per layer weights (in, out), gain and bias (1, out); then a head; see init_convnet."""
    sizes = [inputs, *shape_of(features), ways]
    for size in sizes:
        whole(1, **{"inputs, features and ways": size})
    return init_blocks(rng, list(zip(sizes, sizes[1:])), scale, dtype)


def dense(params, x):
    """Logits of rows: (..., n, inputs) -> (..., n, ways), by layers of weights, batch norm and relu, and a head."""
    *layers, w, b = blocks_of("dense", params)
    for w_i, gain, bias in zip(layers[::3], layers[1::3], layers[2::3]):
        x = relu(batch_norm(matmul(x, w_i), gain, bias))
    return matmul(x, w) + row(b)


def init_blocks(rng, shapes, scale, dtype):
    """Weights, gain and bias for each shape but the last, the head's: weights and bias."""
    generator(rng)
    finite(scale=scale)
    params, dtype = [], type_of(dtype, FLOATS)
    for shape in shapes:
        w = scale / np.sqrt(np.prod(shape[:-1])) * rng.standard_normal(shape)
        params += [w, np.ones((1, shape[-1])), np.zeros((1, shape[-1]))]
    del params[-2]  # the head has no gain
    return [Tensor(p.astype(dtype)) for p in params]


def blocks_of(network, params):
    params = items("params", params)
    if len(params) < 2 or len(params) % 3 != 2:
        raise ValueError(f"{network} takes three parameters for each block and two for the head, got {len(params)}")
    return params


# ---- losses ----------------------------------------------------------------------------------------------------------


def mse(prediction, target):
    """Mean of (prediction − target)² over the last two axes: (n, out) -> (), (tasks, n, out) -> (tasks,)."""
    prediction, target = Tensor(prediction), Tensor(target)
    if prediction.shape != target.shape or prediction.ndim < 2:
        raise ValueError(
            f"mse needs two of one shape (..., n, features), got {prediction.shape} and {target.shape}: broadcasting"
            " them would average pairs that don't belong together"
        )
    error = prediction - target
    return mean(error * error, axis=(-2, -1))


def cross_entropy(logits, labels):
    """−log softmax(logits)[label], its mean over the labels' last axis: (..., n, ways), (..., n) -> (...).

    labels: integers in 0 ... ways − 1. Finite for any finite logits: it never takes the log of a softmax.
    """
    logits, labels = Tensor(logits), Tensor(labels)
    if labels.dtype in FLOATS or labels.dtype == bool or labels.shape != logits.shape[:-1] or not labels.ndim:
        raise ValueError(
            f"cross_entropy needs logits (..., n, ways) and integer labels (..., n), got {describe(logits)} and"
            f" {describe(labels)}"
        )
    ways = logits.shape[-1]
    if labels.size and not 0 <= labels.data.min() <= labels.data.max() < ways:
        raise ValueError(f"labels from {labels.data.min()} to {labels.data.max()} for logits of {ways} classes")
    hit = equal(astype(labels, np.int64)[..., None], np.arange(ways))
    return -mean(sum(where(hit, log_softmax(logits), 0), axis=-1), axis=-1)
