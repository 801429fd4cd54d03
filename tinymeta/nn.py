"""Layers and losses. Parameters are a flat list of Tensors; a network is a function of them: network(params, x).

Layers act on the trailing axes and biases are rows (1, features), so the same line serves one task, x (n, in), and a
stack of tasks with weights of their own, x (tasks, n, in) and W (tasks, in, out). A bias of shape (features,) would
broadcast without complaint, and wrongly, when there are as many tasks as features.
"""

import numpy as np

from .ops import equal, log_softmax, matmul, mean, relu, sum, where
from .tensor import FLOATS, Tensor, describe


def init_mlp(rng, sizes, dtype=np.float32, gain=2**0.5):
    """Parameters [W_1, b_1, W_2, b_2, ...] of an MLP: W (in, out) ~ N(0, gain² / in), b (1, out) = 0.

    rng: a np.random.Generator. sizes: features of every layer, e.g. (1, 40, 40, 1). gain √2 keeps the variance through
    relu (He et al. 2015).
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes are the features of input and output and of all layers between, got {tuple(sizes)}")
    params = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        params.append(Tensor((gain / np.sqrt(n_in) * rng.standard_normal((n_in, n_out))).astype(dtype)))
        params.append(Tensor(np.zeros((1, n_out), dtype)))
    return params


def mlp(params, x, activation=relu):
    """h ← activation(h W + b) for every layer but the last, which stays linear: (..., n, in) -> (..., n, out)."""
    if len(params) < 2 or len(params) % 2:
        raise ValueError(f"mlp takes [W_1, b_1, W_2, b_2, ...], got {len(params)} parameters")
    *hidden, (w, b) = zip(params[::2], params[1::2])
    h = x
    for w_i, b_i in hidden:
        h = activation(matmul(h, w_i) + b_i)
    return matmul(h, w) + b


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
    hit = equal(labels[..., None], np.arange(ways))
    return -mean(sum(where(hit, log_softmax(logits), 0), axis=-1), axis=-1)
