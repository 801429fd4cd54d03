"""What tinymeta computes, by torch in double precision and in torch's own idiom: an oracle for test_differential.

Nothing here comes from tinymeta. Tasks are a Python loop, networks are torch.nn.functional's, the inner loop is
autograd.grad with create_graph=True, the dense Hessian torch's. Arrays come in and go out as NumPy's.
"""

import contextlib
import functools
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional


@contextlib.contextmanager
def running():
    """Everything here is too small for threads: waiting for each other they took most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tensor(a):
    return torch.tensor(np.array(a))


def leaves(arrays):
    return [tensor(a).requires_grad_() for a in arrays]


def numpy(xs):
    """Nested lists of tensors as nested lists of arrays."""
    return [numpy(x) for x in xs] if isinstance(xs, (list, tuple)) else xs.detach().numpy(force=True)


def gradient(y, xs, y_bar=None, **options):
    return list(torch.autograd.grad(y, xs, y_bar, allow_unused=True, materialize_grads=True, **options))


# ---- programs: torch in the place of tm ------------------------------------------------------------------------------


def reduction(f):
    def op(x, axis=None, keepdims=False):
        return f(x, tuple(range(x.ndim)) if axis is None else axis, keepdims)

    return op


def gather(x, index):
    at = np.arange(x.numel()).reshape(x.shape)[index]
    return x.reshape(-1)[tensor(at)]


def scatter(x, index, shape):
    n = int(np.prod(shape))
    at = np.arange(n).reshape(shape)[index]
    zeros = torch.zeros(n, dtype=x.dtype)
    return zeros.index_add(0, tensor(at.ravel()), x.reshape(-1)).reshape(shape)


def sum_to(x, shape):
    while x.ndim > len(shape):
        x = x.sum(0)
    for i, n in enumerate(shape):
        x = x.sum(i, keepdim=True) if n == 1 else x
    return x


def transpose(x, axes=None):
    return x.permute(tuple(range(x.ndim)[::-1] if axes is None else axes))


tm = SimpleNamespace(
    abs=torch.abs, cos=torch.cos, exp=torch.exp, log=torch.log, log1p=torch.log1p, matmul=torch.matmul, relu=torch.relu,
    sigmoid=torch.sigmoid, sign=torch.sign, sin=torch.sin, sqrt=torch.sqrt, squeeze=torch.squeeze,
    swapaxes=torch.swapaxes, tanh=torch.tanh, where=torch.where, broadcast_to=torch.broadcast_to,
    concatenate=lambda xs, axis: torch.cat(xs, axis),
    stack=lambda xs, axis=0: torch.stack(xs, axis),
    softplus=lambda x: torch.logaddexp(x, torch.zeros_like(x)),  # F.softplus is x from 20 on
    softmax=lambda x, axis: torch.softmax(x, axis),
    log_softmax=lambda x, axis: torch.log_softmax(x, axis),
    pad=lambda x, width: F.pad(x, x.ndim * ([width] * 2 if isinstance(width, int) else list(width))),
    reshape=lambda x, shape: torch.reshape(x, (shape,) if isinstance(shape, int) else shape),
    sum=reduction(torch.sum), mean=reduction(torch.mean), max=reduction(torch.amax), min=reduction(torch.amin),
    logsumexp=reduction(torch.logsumexp), gather=gather, scatter=scatter, sum_to=sum_to, transpose=transpose,
)  # fmt: skip


def derivatives(program, xs, u, w):
    """(values, (∂y/∂x)ᵀ u, the vjp of that with w with respect to x and u)."""
    xs, u = leaves(xs), leaves(u)
    ys = program(*xs, tm=tm)
    first = gradient(ys, xs, u, create_graph=True)
    curved = [(g, tensor(w_i)) for g, w_i in zip(first, w) if g.requires_grad]
    second = gradient(*(list(pair) for pair in [[g for g, _ in curved], xs + u, [w_i for _, w_i in curved]]))
    return numpy([ys, first, second])


# ---- networks and losses of one task ---------------------------------------------------------------------------------

ACTIVATION = {"relu": F.relu, "tanh": torch.tanh, "softplus": tm.softplus}


def around(n, size, stride, padding):
    """Zeros before and after an axis of n pixels; "same" makes ⌈n / stride⌉ windows, the odd zero at the end."""
    if padding != "same":
        return (0, 0) if padding == "valid" else (padding, padding)
    total = max((int(np.ceil(n / stride)) - 1) * stride + size - n, 0)
    return total // 2, total - total // 2


def convnet(spec, params, x):
    """Logits (n, ways) of images (n, H, W, C)."""
    x = x.permute(0, 3, 1, 2)
    for i, block in enumerate(spec.blocks):
        w, gain, bias = params[3 * i : 3 * i + 3]
        zeros = [around(n, block.size, block.stride, block.padding) for n in x.shape[2:]]
        x = F.conv2d(F.pad(x, (*zeros[1], *zeros[0])), w.permute(3, 2, 0, 1).contiguous(), stride=block.stride)
        if block.norm:
            x = F.batch_norm(x, None, None, gain[0], bias[0], training=True, eps=1e-3)
        else:
            x = x * gain.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
        x = ACTIVATION[block.activation](x)
        if block.pool:
            pool = {"max": F.max_pool2d, "average": F.avg_pool2d}[block.pool]
            x = pool(x, block.pool_size, block.pool_stride)
    x = x.permute(0, 2, 3, 1).flatten(1) if spec.flatten else x.mean((2, 3))
    return x @ params[-2] + params[-1]


def mlp(spec, params, x):
    for w, b in zip(params[:-2:2], params[1:-2:2]):
        x = ACTIVATION[spec.activation](F.linear(x, w.T, b[0]))
    return F.linear(x, params[-2].T, params[-1][0])


def task_loss(spec):
    """loss(params, (x, target)) of one task."""
    network = convnet if hasattr(spec, "blocks") else mlp
    measure = F.cross_entropy if hasattr(spec, "blocks") else F.mse_loss
    return lambda params, data: measure(network(spec, params, data[0]), data[1])


def of_tasks(data):
    """Arrays (tasks, ...) as a list of tasks."""
    return list(zip(*[tensor(a) for a in data]))


def network_derivatives(spec, params, data, v):
    """(logits, losses, gradient, Hessian-vector product) with respect to every task's own parameters and images."""
    found = []
    for task, (x, labels) in enumerate(of_tasks(data)):
        p, v_task = leaves([p[task] for p in params] + [x.numpy()]), [tensor(v_i[task]) for v_i in v]
        logits = convnet(spec, p[:-1], p[-1])
        loss = F.cross_entropy(logits, labels)
        g = gradient(loss, p, create_graph=True)
        found.append(numpy([[logits, loss], g, gradient(g, p, v_task)]))
    return [[np.stack(each) for each in zip(*group)] for group in zip(*found)]


# ---- update rules: (params, gradients, state, lr) -> (params, state), lr a list --------------------------------------


def sgd(p, g, state, lr):
    return [p_i - lr_i * g_i for p_i, g_i, lr_i in zip(p, g, lr)], None


def heavy_ball(p, g, v, lr, mu, nesterov=False):
    v = [mu * v_i + g_i for v_i, g_i in zip(v or [0] * len(g), g)]
    move = [g_i + mu * v_i for g_i, v_i in zip(g, v)] if nesterov else v
    return [p_i - lr_i * d for p_i, lr_i, d in zip(p, lr, move)], v


def adam(p, g, state, lr, beta1, beta2, eps):
    """ε in the root: √(v̂ + ε²)."""
    t, m, v = state or (0, [0] * len(g), [0] * len(g))
    t, m = t + 1, [beta1 * m_i + (1 - beta1) * g_i for m_i, g_i in zip(m, g)]
    v = [beta2 * v_i + (1 - beta2) * g_i**2 for v_i, g_i in zip(v, g)]
    moved = []
    for p_i, lr_i, m_i, v_i in zip(p, lr, m, v):
        moved.append(p_i - lr_i * m_i / (1 - beta1**t) / torch.sqrt(v_i / (1 - beta2**t) + eps**2))
    return moved, (t, m, v)


RULES = {"sgd": sgd, "momentum": heavy_ball, "nesterov": functools.partial(heavy_ball, nesterov=True), "adam": adam}


def rule_of(rule):
    name, options = rule
    return functools.partial(RULES[name], **options)


def detached(x):
    if isinstance(x, (list, tuple)):
        return [detached(y) for y in x]
    return x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x


# ---- meta-gradients: (query loss, meta-gradient) ---------------------------------------------------------------------


def inner_loop(loss, phi, data, alpha, steps, rule, state=None, create_graph=True):
    for _ in range(steps):
        g = torch.autograd.grad(loss(phi, data), phi, create_graph=create_graph)
        phi, state = rule(phi, g, state, alpha)
    return phi, state


def rates(alpha, theta):
    return [alpha] * len(theta)


def maml(loss, theta, tasks, *, alpha, steps, rule):
    total = 0
    for support, query in tasks:
        phi, _ = inner_loop(loss, theta, support, rates(alpha, theta), steps, rule)
        total = total + loss(phi, query) / len(tasks)
    return total, gradient(total, theta)


def truncated(loss, theta, tasks, *, alpha, steps, rule, last):
    total, meta_grad = 0, [0] * len(theta)
    for support, query in tasks:
        phi, state = theta, None
        for _ in range(steps - last):
            phi, state = detached(inner_loop(loss, phi, support, rates(alpha, theta), 1, rule, state))
        start = detached(phi)
        phi, _ = inner_loop(loss, start, support, rates(alpha, theta), last, rule, state)
        query_loss = loss(phi, query) / len(tasks)
        total, meta_grad = total + query_loss, [m + g for m, g in zip(meta_grad, gradient(query_loss, start))]
    return total, meta_grad


def fomaml(loss, theta, tasks, **options):
    return truncated(loss, theta, tasks, last=0, **options)


def meta_sgd(loss, theta, tasks, *, steps, rule, first_order):
    w, a = theta[: len(theta) // 2], theta[len(theta) // 2 :]
    total = 0
    for support, query in tasks:
        phi, _ = inner_loop(loss, w, support, a, steps, rule, create_graph=not first_order)
        total = total + loss(phi, query) / len(tasks)
    return total, gradient(total, theta)


def anil(loss, theta, tasks, *, alpha, steps, rule, head, first_order):
    body, start = theta[: len(theta) - head], theta[len(theta) - head :]
    total = 0

    def head_loss(phi, data):
        return loss(body + list(phi), data)

    for support, query in tasks:
        phi, _ = inner_loop(head_loss, start, support, rates(alpha, start), steps, rule, create_graph=not first_order)
        total = total + loss(body + list(phi), query) / len(tasks)
    return total, gradient(total, theta)


def reptile(loss, theta, tasks, *, alpha, steps, rule):
    total, moved = 0, [0] * len(theta)
    for support, query in tasks:
        phi, _ = inner_loop(loss, theta, support, rates(alpha, theta), steps, rule)
        total = total + loss(phi, query) / len(tasks)
        moved = [m + (t - p) / len(tasks) for m, t, p in zip(moved, theta, phi)]
    return total, moved


def imaml(loss, theta, tasks, *, lam, alpha, steps, rule, cg_steps):
    """cg_steps=None: a dense solve. lam: a number, or one for each parameter."""
    lam = lam if isinstance(lam, list) else [lam] * len(theta)
    lams = torch.cat([torch.full_like(t, lam_i).reshape(-1) for lam_i, t in zip(lam, theta)])
    total, meta_grad = 0, 0
    for support, query in tasks:
        query_loss, b, H = solved(loss, theta, support, query, lam, alpha, steps, rule)
        A = torch.eye(len(b), dtype=b.dtype) + H / lams  # I + HΛ⁻¹
        x = torch.linalg.solve(A, b) if cg_steps is None else conjugate_gradients(A, b, cg_steps)
        total, meta_grad = total + query_loss / len(tasks), meta_grad + x / len(tasks)
    return total, unflat(meta_grad, theta)


def solved(loss, theta, support, query, lam, alpha, steps, rule):
    """At the φ of one task: the query loss, its gradient and the Hessian of the support loss, as vector and matrix."""

    def proximal(phi, data):
        return loss(phi, data) + sum(lam_i / 2 * ((p - t.detach()) ** 2).sum() for lam_i, p, t in zip(lam, phi, theta))

    phi, state = detached(theta), None
    for _ in range(steps):
        phi, state = detached(inner_loop(proximal, phi, support, rates(alpha, theta), 1, rule, state))
    query_loss = loss(phi, query)
    flat_phi, b = (torch.cat([x.detach().reshape(-1) for x in xs]) for xs in (phi, gradient(query_loss, phi)))
    H = torch.autograd.functional.hessian(lambda p: loss(unflat(p, theta), support), flat_phi, vectorize=True)
    return query_loss.detach(), b, H


def unflat(flat, like):
    return [part.reshape(t.shape) for part, t in zip(flat.split([t.numel() for t in like]), like)]


def conjugate_gradients(A, b, steps):
    """From x = b, so that no step is first-order MAML."""
    x, r = b, b - A @ b
    p = r
    for _ in range(steps):
        a = (r @ r) / (p @ A @ p)
        x, r_next = x + a * p, r - a * (A @ p)
        p, r = r_next + (r_next @ r_next) / (r @ r) * p, r_next
    return x


def meta_gradient(method, spec, theta, support, query, rule, **options):
    """(query loss, meta-gradient) by the function of this name above."""
    tasks = list(zip(of_tasks(support), of_tasks(query)))
    query_loss, meta_grad = globals()[method](task_loss(spec), leaves(theta), tasks, rule=rule_of(rule), **options)
    return numpy([query_loss, *meta_grad])


# ---- training --------------------------------------------------------------------------------------------------------


def train(spec, theta, batches, optimiser):
    """The parameters after a step of torch.optim on each of the batches."""
    name, options = optimiser
    params, loss = leaves(theta), task_loss(spec)
    if name == "adam":
        beta1, beta2 = options["beta1"], options["beta2"]
        optim = torch.optim.Adam(params, lr=options["lr"], betas=(beta1, beta2), eps=options["eps"])
    else:
        optim = torch.optim.SGD(params, lr=options["lr"], momentum=options["mu"], nesterov=name == "nesterov")
    for data in batches:
        optim.zero_grad()
        loss(params, [tensor(a) for a in data]).backward()
        optim.step()
    return numpy(params)


def meta_train(method, spec, theta, batches, rule, outer, **options):
    """θ after an outer step on each of the batches of (support, query)."""
    outer_rule, state = rule_of((outer[0], {name: x for name, x in outer[1].items() if name != "lr"})), None
    params = leaves(theta)
    for support, query in batches:
        tasks = list(zip(of_tasks(support), of_tasks(query)))
        _, g = globals()[method](task_loss(spec), params, tasks, rule=rule_of(rule), **options)
        params, state = detached(outer_rule(params, detached(g), state, [outer[1]["lr"]] * len(params)))
    return numpy(params)
