"""What tinymeta computes, by JAX in double precision and in JAX's own idiom: an oracle for test_differential.

Nothing here comes from tinymeta. Derivatives are jax.grad, jax.vjp and jax.jvp of Python functions, tasks a vmap,
derivatives are cut with lax.stop_gradient. Arrays come in and go out as NumPy's.
"""

import functools
from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax")
flatten_util = pytest.importorskip("jax.flatten_util")
jnp, lax = jax.numpy, jax.lax
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)  # what is compiled runs once, or a hundred times


def running():
    """A context: without it JAX makes float32 of everything."""
    return jax.enable_x64(True)


def numpy(xs):
    return jax.tree.map(np.asarray, xs)


# ---- programs: JAX in the place of tm --------------------------------------------------------------------------------


def gather(x, index):
    return x.reshape(-1)[np.arange(x.size).reshape(x.shape)[index]]


def scatter(x, index, shape):
    n = int(np.prod(shape))
    return jnp.zeros(n).at[np.arange(n).reshape(shape)[index]].add(x).reshape(shape)


def sum_to(x, shape):
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


tm = SimpleNamespace(
    abs=jnp.abs, cos=jnp.cos, exp=jnp.exp, log=jnp.log, log1p=jnp.log1p, matmul=jnp.matmul, sign=jnp.sign, sin=jnp.sin,
    sqrt=jnp.sqrt, squeeze=jnp.squeeze, swapaxes=jnp.swapaxes, tanh=jnp.tanh, where=jnp.where, pad=jnp.pad,
    broadcast_to=jnp.broadcast_to, concatenate=jnp.concatenate, stack=jnp.stack, reshape=jnp.reshape,
    transpose=jnp.transpose, sum=jnp.sum, mean=jnp.mean, max=jnp.max, min=jnp.min, relu=jax.nn.relu,
    sigmoid=jax.nn.sigmoid, softplus=jax.nn.softplus, softmax=jax.nn.softmax, log_softmax=jax.nn.log_softmax,
    logsumexp=jax.nn.logsumexp, gather=gather, scatter=scatter, sum_to=sum_to,
)  # fmt: skip


def derivatives(program, xs, u, w):
    """(values, (∂y/∂x)ᵀ u, the vjp of that with w with respect to x and u)."""

    def first(xs, u):
        ys, pull = jax.vjp(lambda *xs: program(*xs, tm=tm), *xs)
        return list(pull(u)), ys

    g, pull, ys = jax.vjp(first, [jnp.asarray(x) for x in xs], [jnp.asarray(a) for a in u], has_aux=True)
    g_x, g_u = pull([jnp.asarray(w_i) for w_i in w])
    return numpy([ys, g, g_x + g_u])


# ---- networks and losses of one task ---------------------------------------------------------------------------------

ACTIVATION = {"relu": jax.nn.relu, "tanh": jnp.tanh, "softplus": jax.nn.softplus}


def convnet(spec, params, x):
    """Logits (n, ways) of images (n, H, W, C)."""
    for i, block in enumerate(spec.blocks):
        w, gain, bias = params[3 * i : 3 * i + 3]
        padding = block.padding.upper() if isinstance(block.padding, str) else [(block.padding, block.padding)] * 2
        strides = (block.stride, block.stride)
        x = lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        if block.norm:
            x = (x - jnp.mean(x, (0, 1, 2))) / jnp.sqrt(jnp.var(x, (0, 1, 2)) + 1e-3)
        x = ACTIVATION[block.activation](x * gain + bias)
        if block.pool:
            window, strides = (1, block.pool_size, block.pool_size, 1), (1, block.pool_stride, block.pool_stride, 1)
            if block.pool == "max":
                x = lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "VALID")
            else:
                x = lax.reduce_window(x, 0.0, lax.add, window, strides, "VALID") / block.pool_size**2
    x = x.reshape(len(x), -1) if spec.flatten else x.mean((1, 2))
    return x @ params[-2] + params[-1]


def mlp(spec, params, x):
    for w, b in zip(params[:-2:2], params[1:-2:2]):
        x = ACTIVATION[spec.activation](x @ w + b)
    return x @ params[-2] + params[-1]


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def task_loss(spec):
    """loss(params, (x, target)) of one task."""
    if hasattr(spec, "blocks"):
        return lambda params, data: cross_entropy(convnet(spec, params, data[0]), data[1])
    return lambda params, data: jnp.mean((mlp(spec, params, data[0]) - data[1]) ** 2)


def network_derivatives(spec, params, data, v):
    """(logits, losses, gradient, Hessian-vector product) with respect to every task's own parameters and images."""
    images, labels = data

    @jit
    @jax.vmap
    def of_task(p, labels, v):
        def loss(p):
            return cross_entropy(convnet(spec, p[:-1], p[-1]), labels)

        g, hv = jax.jvp(jax.grad(loss), (p,), (v,))
        return [convnet(spec, p[:-1], p[-1]), loss(p)], g, hv

    return numpy(of_task([*params, images], labels, v))


# ---- update rules: (params, gradients, state, lr) -> (params, state), lr a list --------------------------------------


def sgd(p, g, state, lr):
    return jax.tree.map(lambda p, g, lr: p - lr * g, p, g, lr), None


def momentum(p, g, v, lr, mu):
    v = g if v is None else jax.tree.map(lambda v, g: mu * v + g, v, g)
    return jax.tree.map(lambda p, v, lr: p - lr * v, p, v, lr), v


def nesterov(p, g, v, lr, mu):
    v = g if v is None else jax.tree.map(lambda v, g: mu * v + g, v, g)
    return jax.tree.map(lambda p, g, v, lr: p - lr * (g + mu * v), p, g, v, lr), v


def adam(p, g, state, lr, beta1, beta2, eps):
    """ε in the root: √(v̂ + ε²)."""
    zeros = [jnp.zeros_like(g_i) for g_i in g]
    t, m, v = state or (0.0, zeros, zeros)
    t = t + 1
    m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, m, g)
    v = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, v, g)
    d = jax.tree.map(lambda m, v: (m / (1 - beta1**t)) / jnp.sqrt(v / (1 - beta2**t) + eps**2), m, v)
    return jax.tree.map(lambda p, d, lr: p - lr * d, p, d, lr), (t, m, v)


def rule_of(rule):
    name, options = rule
    return functools.partial(globals()[name], **options)


# ---- meta-gradients: (query loss, meta-gradient) ---------------------------------------------------------------------


def inner_loop(loss, phi, data, alpha, steps, rule, state=None, second_order=True):
    for _ in range(steps):
        g = jax.grad(loss)(phi, data)
        phi, state = rule(phi, g if second_order else lax.stop_gradient(g), state, alpha)
    return phi, state


def value_and_grad_of_mean(query_loss, theta, tasks):
    """query_loss(theta, support, query) of each task, differentiated as their mean."""
    return jax.value_and_grad(lambda t: jnp.mean(jax.vmap(functools.partial(query_loss, t))(*tasks)))(theta)


def rates(alpha, theta):
    return [alpha] * len(theta)


def maml(loss, theta, tasks, *, alpha, steps, rule):
    def query_loss(theta, support, query):
        return loss(inner_loop(loss, theta, support, rates(alpha, theta), steps, rule)[0], query)

    return value_and_grad_of_mean(query_loss, theta, tasks)


def fomaml(loss, theta, tasks, *, alpha, steps, rule):
    def query_loss(theta, support, query):
        phi, _ = inner_loop(loss, theta, support, rates(alpha, theta), steps, rule, second_order=False)
        return loss(phi, query)

    return value_and_grad_of_mean(query_loss, theta, tasks)


def truncated(loss, theta, tasks, *, alpha, steps, rule, last):
    def query_loss(theta, support, query):
        early = lax.stop_gradient(inner_loop(loss, theta, support, rates(alpha, theta), steps - last, rule))
        start = [t + (e - lax.stop_gradient(t)) for t, e in zip(theta, early[0])]  # θ plus a constant
        return loss(inner_loop(loss, start, support, rates(alpha, theta), last, rule, early[1])[0], query)

    return value_and_grad_of_mean(query_loss, theta, tasks)


def meta_sgd(loss, theta, tasks, *, steps, rule, first_order):
    def query_loss(theta, support, query):
        w, a = theta[: len(theta) // 2], theta[len(theta) // 2 :]
        return loss(inner_loop(loss, w, support, a, steps, rule, second_order=not first_order)[0], query)

    return value_and_grad_of_mean(query_loss, theta, tasks)


def anil(loss, theta, tasks, *, alpha, steps, rule, head, first_order):
    def query_loss(theta, support, query):
        body, start = theta[: len(theta) - head], theta[len(theta) - head :]
        options = {"second_order": not first_order}
        phi, _ = inner_loop(
            lambda h, data: loss(body + h, data), start, support, rates(alpha, start), steps, rule, **options
        )
        return loss(body + phi, query)

    return value_and_grad_of_mean(query_loss, theta, tasks)


def reptile(loss, theta, tasks, *, alpha, steps, rule):
    def run(support, query):
        phi, _ = inner_loop(loss, theta, support, rates(alpha, theta), steps, rule)
        return loss(phi, query), jax.tree.map(jnp.subtract, theta, phi)

    return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(run)(*tasks))


def imaml(loss, theta, tasks, *, lam, alpha, steps, rule, cg_steps):
    """cg_steps=None: a dense solve. lam: a number, or one for each parameter."""
    lam = lam if isinstance(lam, list) else [lam] * len(theta)

    def run(support, query):
        def proximal(phi, data):
            return loss(phi, data) + sum(lam_i / 2 * jnp.sum((p - t) ** 2) for lam_i, p, t in zip(lam, phi, theta))

        phi, _ = inner_loop(proximal, theta, support, rates(alpha, theta), steps, rule)
        query_loss, b = jax.value_and_grad(loss)(phi, query)
        flat_phi, unflat = flatten_util.ravel_pytree(phi)
        b = flatten_util.ravel_pytree(b)[0]
        lams = jnp.concatenate([jnp.full(t.size, lam_i) for lam_i, t in zip(lam, theta)])
        A = jnp.eye(len(b)) + jax.hessian(lambda p: loss(unflat(p), support))(flat_phi) / lams
        x = jnp.linalg.solve(A, b) if cg_steps is None else conjugate_gradients(A, b, cg_steps)
        return query_loss, unflat(x)

    return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(run)(*tasks))


def conjugate_gradients(A, b, steps):
    """From x = b, so that no step is first-order MAML."""
    x, r = b, b - A @ b
    p = r
    for _ in range(steps):
        Ap = A @ p
        a = (r @ r) / (p @ Ap)
        x, new = x + a * p, r - a * Ap
        p, r = new + ((new @ new) / (r @ r)) * p, new
    return x


def meta_gradient(method, spec, theta, support, query, rule, **options):
    """(query loss, meta-gradient) by the function of this name above."""
    run = functools.partial(globals()[method], task_loss(spec), rule=rule_of(rule), **options)
    query_loss, meta_grad = jit(run)([jnp.asarray(t) for t in theta], (support, query))
    return numpy([query_loss, *meta_grad])


# ---- training --------------------------------------------------------------------------------------------------------


def follow(gradient, theta, batches, outer):
    """θ after a step along gradient(θ, data) on each of the batches."""
    name, options = outer
    rule = rule_of((name, {key: x for key, x in options.items() if key != "lr"}))

    @jit
    def step(params, state, data):
        return rule(params, gradient(params, data), state, [options["lr"]] * len(params))

    params, state = [jnp.asarray(t) for t in theta], None
    for data in batches:
        params, state = step(params, state, data)
    return numpy(params)


def train(spec, theta, batches, optimiser):
    return follow(jax.grad(task_loss(spec)), theta, batches, optimiser)


def meta_train(method, spec, theta, batches, rule, outer, **options):
    run = functools.partial(globals()[method], task_loss(spec), rule=rule_of(rule), **options)
    return follow(lambda theta, tasks: run(theta, tasks)[1], theta, batches, outer)
