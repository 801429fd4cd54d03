"""PyTorch: eager, with the task axis by hand or by torch.func.vmap; and torch.compile of the vmap.

A convolution with kernels of its own for every task is either a grouped convolution, which vmap makes of it too, or a
batched matrix product over patches. Images are channels first for the one, last for the other. Tried and left out, on
5-way 1-shot with 8 tasks: vmap over patches (80 ms, where vmap over the convolution takes 60), and torch.compile of the
convolution (150 ms after 4 minutes of compilation; its grouped form does not compile). The meta-gradient
through F.batch_norm under vmap is off by 3%, so that form has a batch norm of its own.
"""

import contextlib
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import grad, grad_and_value, vjp, vmap


def contestants(w):
    forms = ["torch-hand", "torch-vmap", "torch-compile"]
    if w.network == "convnet":
        forms = ["torch-hand-conv", "torch-hand-patches", "torch-vmap-conv", "torch-compile-patches"]
    return dict.fromkeys(forms, (1, 2))


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- networks: of one task, or, with a task axis before all others, of a stack ---------------------------------------


def mlp(phi, x):
    *hidden, (w, b) = zip(phi[::2], phi[1::2])
    for w_i, b_i in hidden:
        x = torch.relu(x @ w_i + b_i)
    return x @ w + b


def same(size):
    """Zeros (before, after) of a 3 × 3 kernel with stride 2: the odd one at the end."""
    total = (-(-size // 2) - 1) * 2 + 3 - size
    return total // 2, total - total // 2


def patches_net(phi, x):
    """x (..., n, H, W, C), kernels (..., 9 C, F), gain and bias (..., 1, F)."""
    *blocks, w, b = phi
    for kernels, gain, bias in zip(blocks[::3], blocks[1::3], blocks[2::3]):
        height, width = -(-x.shape[-3] // 2), -(-x.shape[-2] // 2)
        x = F.pad(x, (0, 0, *same(x.shape[-2]), *same(x.shape[-3])))
        windows = [x[..., u : u + 2 * height - 1 : 2, v : v + 2 * width - 1 : 2, :] for u in range(3) for v in range(3)]
        y = torch.cat(windows, -1).flatten(-4, -2) @ kernels
        var, mean = torch.var_mean(y, dim=-2, correction=0, keepdim=True)
        y = torch.relu((y - mean) * (torch.rsqrt(var + 1e-3) * gain) + bias)
        x = y.unflatten(-2, (-1, height, width))
    return x.mean((-3, -2)) @ w + b


def conv_net(phi, x):
    """x (n, C, H, W), kernels (F, C, 3, 3), gain and bias (F): one task."""
    *blocks, w, b = phi
    for kernels, gain, bias in zip(blocks[::3], blocks[1::3], blocks[2::3]):
        y = F.conv2d(F.pad(x, (*same(x.shape[-1]), *same(x.shape[-2]))), kernels, stride=2)
        var, mean = torch.var_mean(y, (0, 2, 3), correction=0, keepdim=True)
        scale = torch.rsqrt(var + 1e-3) * gain.view(-1, 1, 1)
        x = torch.relu((y - mean) * scale + bias.view(-1, 1, 1))
    return x.mean((-2, -1)) @ w + b


def grouped_net(phi, x):
    """As conv_net, with tasks before all axes: they become groups of channels, (n, tasks · C, H, W)."""
    *blocks, w, b = phi
    tasks = len(x)
    x = x.transpose(0, 1).flatten(1, 2)
    for kernels, gain, bias in zip(blocks[::3], blocks[1::3], blocks[2::3]):
        x = F.pad(x, (*same(x.shape[-1]), *same(x.shape[-2])))
        y = F.conv2d(x, kernels.flatten(0, 1), stride=2, groups=tasks)
        x = torch.relu(F.batch_norm(y, None, None, gain.flatten(), bias.flatten(), training=True, eps=1e-3))
    return x.mean((-2, -1)).unflatten(-1, (tasks, -1)).transpose(0, 1) @ w + b


def loss_of(network):
    """Of one task a number, of a stack (tasks,)."""

    def loss(phi, data):
        y, target = network(phi, data[0]), data[1]
        if network is mlp:
            return ((y - target) ** 2).mean((-2, -1))
        return F.cross_entropy(y.flatten(0, -2), target.flatten(), reduction="none").view(target.shape).mean(-1)

    return loss


# ---- algorithms ------------------------------------------------------------------------------------------------------


def by_hand(w, loss, theta, support, query):
    """All tasks at once on torch.autograd."""
    second_order = w.algorithm == "maml"
    leaf = (lambda p: p) if second_order else (lambda p: p.detach().requires_grad_())
    phi = [leaf(t.expand(w.tasks, *t.shape)) for t in theta]
    for _ in range(w.steps):
        g = torch.autograd.grad(loss(phi, support).sum(), phi, create_graph=second_order)
        phi = [leaf(p) for p in descended(w, phi, g, theta)]
    losses = loss(phi, query)
    query_loss = losses.mean()
    if second_order:
        return query_loss.detach(), torch.autograd.grad(query_loss, theta)
    b = torch.autograd.grad(losses.sum(), phi)
    if w.algorithm == "imaml":
        g = torch.autograd.grad(loss(phi, support).sum(), phi, create_graph=True)
        b = conjugate_gradients(w, lambda v: torch.autograd.grad(g, phi, v, retain_graph=True), b, first=1)
    return query_loss.detach(), [b_i.mean(0) for b_i in b]


def by_vmap(w, loss):
    """One task on torch.func, then vmap."""

    def adapt(theta, support):
        phi = theta
        for _ in range(w.steps):
            phi = descended(w, phi, grad(loss)(phi, support), theta)
        return phi

    def one_task(theta, support, query):
        phi = adapt(theta, support)
        b, query_loss = grad_and_value(loss)(phi, query)
        if w.algorithm == "imaml":
            _, pullback = vjp(lambda phi: grad(loss)(phi, support), phi)
            b = conjugate_gradients(w, lambda v: pullback(v)[0], b, first=0)
        return query_loss, b

    def step(theta, support, query):
        tasks = None, 0, 0
        if w.algorithm == "maml":
            path = vmap(lambda theta, support, query: loss(adapt(theta, support), query), tasks)
            return grad_and_value(lambda theta: path(theta, support, query).mean())(theta)[::-1]
        query_loss, b = vmap(one_task, tasks)(theta, support, query)
        return query_loss.mean(), [b_i.mean(0) for b_i in b]

    return step


def descended(w, phi, g, theta):
    if w.algorithm == "imaml":  # the gradient of λ/2 ‖φ − θ‖² beside that of the loss
        g = [g_i + w.lam * (p - t) for g_i, p, t in zip(g, phi, theta)]
    return [p - w.alpha * g_i for p, g_i in zip(phi, g)]


def conjugate_gradients(w, hvp, b, first):
    """x of (I + H / (λ + δ)) x = b from x = b; `first`: how many axes are tasks."""

    def matvec(v):
        return [v_i + hv_i / (w.lam + w.damping) for v_i, hv_i in zip(v, hvp(v))]

    def dot(xs, ys):
        return sum((x * y).flatten(first).sum(-1) for x, y in zip(xs, ys))

    def plus(xs, a, ys):
        return [x + a.view(a.shape + (1,) * (x.ndim - first)) * y for x, y in zip(xs, ys)]

    x = list(b)
    r = p = [b_i - a_i for b_i, a_i in zip(b, matvec(x))]
    rr = dot(r, r)
    for _ in range(w.cg_steps):
        ap = matvec(p)
        a = rr / dot(p, ap)
        x, r = plus(x, a, p), plus(r, -a, ap)
        rr, before = dot(r, r), rr
        p = plus(r, rr / before, p)
    return x


# ---- contestants -----------------------------------------------------------------------------------------------------


def build(name, w):
    by, last = name.split("-")[1], name.split("-")[-1]
    network = {"conv": grouped_net if by == "hand" else conv_net, "patches": patches_net}.get(last, mlp)
    loss = loss_of(network)
    step = functools.partial(by_hand, w, loss) if by == "hand" else by_vmap(w, loss)
    if by == "compile":
        torch._dynamo.reset()  # it keeps what it compiled for other workloads, and stops at the eighth
        step = torch.compile(step, fullgraph=True, dynamic=False)

    def bind(theta, support, query):
        if last == "patches":
            theta = [t.reshape(-1, t.shape[-1]) for t in theta]
        elif last == "conv":
            theta = [t.transpose(3, 2, 0, 1) if t.ndim == 4 else t[0] for t in theta[:-2]] + theta[-2:]
            support, query = ((x.transpose(0, 1, 4, 2, 3), y) for x, y in (support, query))
        theta = [native(t).requires_grad_(by == "hand") for t in theta]
        support, query = ([native(x) for x in data] for data in (support, query))
        return lambda: step(theta, support, query)

    return bind


def native(x):
    return torch.tensor(np.ascontiguousarray(x))


def to_numpy(name, w, result):
    query_loss, meta_grad = result
    g = [x.numpy() for x in meta_grad]
    if name.endswith("-conv"):
        g = [x.transpose(2, 3, 1, 0) if x.ndim == 4 else x[None] for x in g[:-2]] + g[-2:]
    elif name.endswith("-patches"):
        g = [x if i % 3 else x.reshape(3, 3, -1, x.shape[-1]) for i, x in enumerate(g[:-2])] + g[-2:]
    return query_loss.numpy(), g
