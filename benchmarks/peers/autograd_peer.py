"""HIPS autograd: NumPy with a tape, the task axis by hand. Its own convolution has no stride: only patches."""

import autograd.numpy as np
from autograd import grad, make_vjp, value_and_grad

from . import tinymeta_peer

threads = tinymeta_peer.threads  # of the same BLAS


def contestants(w):
    return {"autograd-hand" if w.network == "mlp" else "autograd-hand-patches": (1, 2)}


def mlp(phi, x):
    *hidden, (w, b) = zip(phi[::2], phi[1::2])
    for w_i, b_i in hidden:
        x = np.maximum(x @ w_i + b_i, 0)
    return x @ w + b


def same(size):
    total = (-(-size // 2) - 1) * 2 + 3 - size
    return total // 2, total - total // 2


def convnet(phi, x):
    """x (tasks, n, H, W, C), kernels (tasks, 3, 3, C, F)."""
    *blocks, w, b = phi
    for kernels, gain, bias in zip(blocks[::3], blocks[1::3], blocks[2::3]):
        tasks, n, *size, _ = x.shape
        h, wide = (-(-s // 2) for s in size)
        x = np.pad(x, ((0, 0), (0, 0), *map(same, size), (0, 0)), "constant")
        windows = [x[:, :, u : u + 2 * h - 1 : 2, v : v + 2 * wide - 1 : 2] for u in range(3) for v in range(3)]
        rows = np.reshape(np.concatenate(windows, -1), (tasks, n * h * wide, -1))
        y = rows @ np.reshape(kernels, (tasks, rows.shape[-1], -1))
        centred = y - np.mean(y, 1, keepdims=True)
        scale = (np.mean(centred * centred, 1, keepdims=True) + np.float32(1e-3)) ** -0.5
        x = np.reshape(np.maximum(centred * (scale * gain) + bias, 0), (tasks, n, h, wide, -1))
    return np.mean(x, (2, 3)) @ w + b


def mse(phi, data):
    x, y = data
    return np.mean((mlp(phi, x) - y) ** 2, (1, 2))


def cross_entropy(phi, data):
    x, labels = data
    logits = convnet(phi, x)
    logits = logits - np.max(logits, -1, keepdims=True)
    log_softmax = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    return -np.mean(np.sum(np.where(labels[..., None] == np.arange(logits.shape[-1]), log_softmax, 0), -1), 1)


def meta_step(w, loss, theta, support, query):
    total = lambda phi, data: np.sum(loss(phi, data))

    def adapt(theta):
        start = phi = [np.broadcast_to(t[None], (w.tasks, *t.shape)) for t in theta]
        for _ in range(w.steps):
            g = grad(total)(phi, support)
            if w.algorithm == "imaml":  # the gradient of λ/2 ‖φ − θ‖² beside that of the loss
                g = [g_i + w.lam * (p - t) for g_i, p, t in zip(g, phi, start)]
            phi = [p - w.alpha * g_i for p, g_i in zip(phi, g)]
        return phi

    if w.algorithm == "maml":
        return value_and_grad(lambda theta: np.mean(loss(adapt(theta), query)))(theta)
    phi = adapt(theta)
    query_loss, b = value_and_grad(total)(phi, query)
    if w.algorithm == "imaml":
        hvp, _ = make_vjp(lambda phi: grad(total)(phi, support))(phi)
        b = conjugate_gradients(w, hvp, b)
    return query_loss / w.tasks, [np.mean(b_i, 0) for b_i in b]


def conjugate_gradients(w, hvp, b):
    """x of (I + H / (λ + δ)) x = b from x = b, for every task."""

    def matvec(v):
        return [v_i + hv_i / (w.lam + w.damping) for v_i, hv_i in zip(v, hvp(v))]

    def dot(xs, ys):
        return sum((x * y).reshape(w.tasks, -1).sum(-1) for x, y in zip(xs, ys))

    def plus(xs, a, ys):
        return [x + a.reshape(-1, *[1] * (x.ndim - 1)) * y for x, y in zip(xs, ys)]

    x = b
    r = p = [b_i - a_i for b_i, a_i in zip(b, matvec(x))]
    rr = dot(r, r)
    for _ in range(w.cg_steps):
        ap = matvec(p)
        a = rr / dot(p, ap)
        x, r = plus(x, a, p), plus(r, -a, ap)
        rr, before = dot(r, r), rr
        p = plus(r, rr / before, p)
    return x


def build(name, w):
    loss = mse if w.network == "mlp" else cross_entropy
    return lambda *arrays: lambda: meta_step(w, loss, *arrays)


def to_numpy(name, w, result):
    return result
