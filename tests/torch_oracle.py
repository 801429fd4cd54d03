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
        _, query_loss, b, H = solved(loss, theta, support, query, lam, alpha, steps, rule)
        A = torch.eye(len(b), dtype=b.dtype) + H / lams  # I + HΛ⁻¹
        x = torch.linalg.solve(A, b) if cg_steps is None else conjugate_gradients(A, b, cg_steps)
        total, meta_grad = total + query_loss / len(tasks), meta_grad + x / len(tasks)
    return total, unflat(meta_grad, theta)


def solved(loss, theta, support, query, lam, alpha, steps, rule):
    """φ of one task; the query loss there, its gradient as a vector, and the Hessian of the support loss as a matrix."""

    def proximal(phi, data):
        return loss(phi, data) + sum(lam_i / 2 * ((p - t.detach()) ** 2).sum() for lam_i, p, t in zip(lam, phi, theta))

    phi, state = detached(theta), None
    for _ in range(steps):
        phi, state = detached(inner_loop(proximal, phi, support, rates(alpha, theta), 1, rule, state))
    query_loss = loss(phi, query)
    flat_phi, b = (torch.cat([x.detach().reshape(-1) for x in xs]) for xs in (phi, gradient(query_loss, phi)))
    H = torch.autograd.functional.hessian(lambda p: loss(unflat(p, theta), support), flat_phi, vectorize=True)
    return flat_phi, query_loss.detach(), b, H


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


def shrinkage(loss, theta, tasks, *, modules, alpha, steps, rule):
    """∂φ*/∂log σ_m² = λ_m (H + Λ)⁻¹ (φ* − θ)_m, one column for each module."""
    w = theta[: -len(modules)]
    module_of = [next(m for m, module in enumerate(modules) if i in module) for i in range(len(w))]
    lam = [torch.exp(-theta[len(w) + m]).detach() for m in module_of]
    spread = lambda values: torch.cat([torch.full_like(t, float(v)).reshape(-1) for v, t in zip(values, w)])
    lams, start = spread(lam), torch.cat([t.detach().reshape(-1) for t in w])
    total, meta_grad = 0, 0
    for support, query in tasks:
        phi, query_loss, b, H = solved(loss, w, support, query, lam, alpha, steps, rule)
        columns = [lams * (phi - start) * spread([m == n for n in module_of]) for m in range(len(modules))]
        jacobian = torch.linalg.solve(H + torch.diag(lams), torch.cat([torch.diag(lams), torch.stack(columns, 1)], 1))
        total, meta_grad = total + query_loss / len(tasks), meta_grad + b @ jacobian / len(tasks)
    return total, [*unflat(meta_grad[: len(start)], w), *meta_grad[len(start) :]]


def hypergradient(spec, w, hyper, data, val_data):
    """(mean validation loss, dF/dλ) of `weighted` losses from dense Hessians, λ = hyper, at weights w of each task."""
    found = [of_one_task(spec, [w_i[task] for w_i in w], hyper, *both)
             for task, both in enumerate(zip(of_tasks(data), of_tasks(val_data)))]  # fmt: skip
    return [np.mean(each, axis=0) for each in zip(*found)]


def of_one_task(spec, w, hyper, data, val_data):
    w, hyper = leaves(w), leaves(hyper)
    n, flat = sum(w_i.numel() for w_i in w), torch.cat([x.detach().reshape(-1) for x in w + hyper])

    def train_loss(flat):
        xs = unflat(flat, w + hyper)
        decay = sum(torch.exp(log_c) / 2 * (w_i**2).sum() for log_c, w_i in zip(xs[len(w)], xs))
        return weighted(spec, xs[: len(w)], xs[-1], data) + decay

    value = weighted(spec, w, hyper[-1], val_data)
    bar = torch.cat([g.reshape(-1) for g in gradient(value, w + hyper)])
    H = torch.autograd.functional.hessian(train_loss, flat)
    v = torch.linalg.solve(H[:n, :n], bar[:n])
    return numpy([value, *unflat(bar[n:] - v @ H[:n, n:], hyper)])


def weighted(spec, w, weight, data):
    return (weight * (mlp(spec, w, data[0]) - data[1]) ** 2).mean()


def maml_plus_plus(loss, theta, tasks, *, steps, weights, first_order, rule):
    w, a = theta[: len(theta) // 2], theta[len(theta) // 2 :]
    total, objective = 0, 0
    for support, query in tasks:
        phi = w
        for j in range(steps):
            g = torch.autograd.grad(loss(phi, support), phi, create_graph=not first_order)
            phi = [p - a_i[j] * g_i for p, a_i, g_i in zip(phi, a, g)]
            query_loss = loss(phi, query) / len(tasks)
            objective = objective + weights[j] * query_loss
        total = total + query_loss
    return total, gradient(objective, theta)


def dropout(loss, theta, tasks, *, alpha, steps, noise, rule):
    """MAML whose inner gradients are multiplied by noise (tasks, steps, ...)."""
    total = 0
    for task, (support, query) in enumerate(tasks):
        phi, state = theta, None
        for k in range(steps):
            g = torch.autograd.grad(loss(phi, support), phi, create_graph=True)
            phi, state = rule(phi, [tensor(n[task, k]) * g_i for n, g_i in zip(noise, g)], state, rates(alpha, theta))
        total = total + loss(phi, query) / len(tasks)
    return total, gradient(total, theta)


def leap(loss, theta, tasks, *, alpha, steps, p, loss_coordinate, stabiliser, rule):
    """Σ ‖γ̄ − γ(θ_i)‖ᵖ by autograd: γ̄ is a constant, and each θ_i moves as θ does."""
    total, meta_grad = 0, [torch.zeros_like(t) for t in theta]
    for support, query in tasks:
        phi, state = detached(theta), None
        for _ in range(steps):
            ahead, state = detached(inner_loop(loss, phi, support, rates(alpha, theta), 1, rule, state))
            square = sum(((b - a) ** 2).sum() for a, b in zip(phi, detached(ahead)))
            if loss_coordinate:
                f = loss(phi, support)
                climb = (loss(ahead, support) - f).detach()
                end = f.detach() + (-climb.abs() if stabiliser else climb)
                square = square + (end - f) ** 2
            meta_grad = [m + g / len(tasks) for m, g in zip(meta_grad, gradient(square ** (p / 2), phi))]
            phi = ahead
        total = total + loss(phi, query) / len(tasks)
    return total, meta_grad


def shifted(theta, noise, sigma):
    """θ + σ h and θ − σ h for every draw: a list of (h, point), noise: arrays (n, ...)."""
    draws = [[sign * tensor(h[j]) for h in noise] for sign in (1, -1) for j in range(len(noise[0]))]
    return [(h, [t + sigma * h_i for t, h_i in zip(theta, h)]) for h in draws]


def es_gradient(f, theta, noise, sigma):
    """(f at the points around θ, Σ f(θ + σ h) h / (their number · σ))."""
    points = shifted(theta, noise, sigma)
    values = [f(point) for _, point in points]
    sums = [sum(y * h[i] for y, (h, _) in zip(values, points)) for i in range(len(theta))]
    return torch.stack(values), [s / (len(points) * sigma) for s in sums]


def es_step(loss, theta, support, noise, alpha, sigma):
    values, g = es_gradient(lambda phi: loss(phi, support), theta, noise, sigma)
    return values, [t - alpha * g_i for t, g_i in zip(theta, g)]


def es_maml(loss, theta, tasks, *, alpha, steps, sigma, noise, rule):
    total, meta_grad = 0, [0] * len(theta)
    for task, (support, query) in enumerate(tasks):
        outer, inner = ([h[task] for h in part] for part in noise)

        def adapted(phi, support=support, query=query, inner=inner):
            for k in range(steps):
                _, phi = es_step(loss, phi, support, [h[k] for h in inner], alpha, sigma)
            return loss(phi, query)

        values, g = es_gradient(adapted, theta, outer, sigma)
        total, meta_grad = total + values.mean() / len(tasks), [m + g_i / len(tasks) for m, g_i in zip(meta_grad, g)]
    return total, meta_grad


def first_order_es_maml(loss, theta, tasks, *, alpha, steps, sigma, noise, hessian, rule):
    """ESHess as a dense matrix: Σ (f − f̄) h hᵀ / (2 (n − 1) σ²) over the 2n points of n draws."""
    total, meta_grad = 0, 0
    for task, (support, query) in enumerate(tasks):
        outer, inner = ([h[task] for h in part] for part in noise)
        phi, factors = theta, []
        for k in range(steps):
            at_k = [h[k] for h in inner]
            h = torch.stack([torch.cat([h_i.reshape(-1) for h_i in h]) for h, _ in shifted(phi, at_k, sigma)])
            values, phi = es_step(loss, phi, support, at_k, alpha, sigma)
            H = h.T @ ((values - values.mean())[:, None] * h) / ((len(h) - 2) * sigma**2)
            factors.append(torch.eye(len(H), dtype=H.dtype) - alpha * H)
        values, v = es_gradient(lambda phi, query=query: loss(phi, query), phi, outer, sigma)
        v = torch.cat([v_i.reshape(-1) for v_i in v])
        for factor in reversed(factors) if hessian else ():
            v = factor @ v
        total, meta_grad = total + values.mean() / len(tasks), meta_grad + v / len(tasks)
    return total, unflat(meta_grad, theta)


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
