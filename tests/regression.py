"""A small smooth problem for the algorithms' tests: three tasks, a 1-4-1 tanh network, float64."""

from functools import partial

import numpy as np

import tinymeta as tm

TASKS = 3


def loss(phi, data):
    x, y = data
    return tm.nn.mse(tm.nn.mlp(phi, x, activation=tm.tanh), y)


def problem(seed=0, tasks=TASKS, points=5):
    """(theta, support, query): parameters [W1, b1, W2, b2] and two pairs (x, y) of (tasks, points, 1)."""
    rng = np.random.default_rng(seed)
    theta = [t + tm.Tensor(0.3 * rng.standard_normal(t.shape)) for t in tm.nn.init_mlp(rng, (1, 4, 1), np.float64)]
    (x, y), (u, v) = tm.tasks.sinusoid.training_batch(rng, tasks, points, dtype=np.float64)
    return tm.stop_gradient(theta), (x, 0.3 * y), (u, 0.3 * v)


def task(data, i):
    return tuple(a[i : i + 1] for a in data)


def finite_difference(f, theta, step=1e-6):
    """∂f/∂θ of a number f(theta) by central differences: a list of arrays like theta."""
    gradients = []
    for i, t in enumerate(theta):
        g = np.zeros(t.shape)
        for index in np.ndindex(t.shape):
            values = []
            for sign in (1, -1):
                x = t.data.copy()
                x[index] += sign * step
                values.append(f([*theta[:i], tm.Tensor(x), *theta[i + 1 :]]))
            g[index] = (values[0] - values[1]) / (2 * step)
        gradients.append(g)
    return gradients


def assert_close(gradients, expected, rtol):
    """Every list element within rtol of the largest entry of the whole gradient."""
    gradients = [g.data if isinstance(g, tm.Tensor) else g for g in gradients]
    scale = max(np.abs(e).max() for e in expected)
    for g, e in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=rtol * scale)


def flat(xs):
    return np.concatenate([np.ravel(getattr(x, "data", x)) for x in xs])


def dense_hessian(f, xs):
    """The Hessian of a scalar f(list) as one matrix."""
    blocks = tm.hessian(lambda *xs: f(list(xs)), xs)
    sizes = [x.size for x in xs]
    return np.block([[b.data.reshape(n, m) for m, b in zip(sizes, row)] for n, row in zip(sizes, blocks)])


def solve(theta, support, lam):
    """argmin of the proximal inner problem to rounding, for all tasks, which its gradient confirms."""
    phi = newton(theta, support, lam)
    objective = tm.meta.proximal(loss, theta, lam)
    assert np.abs(flat(tm.grad(tm.sum(objective(phi, support)), phi))).max() < 1e-11
    return phi


@tm.compile
def newton(theta, support, lam):
    objective = tm.meta.proximal(loss, theta, lam)
    solver = partial(tm.solvers.hessian_free, cg_steps=15)
    return tm.meta.adapt(objective, theta, support, alpha=1.0, steps=10, solve=solver)


def dense(phi, support, query, lam):
    """(I + HΛ⁻¹)⁻¹ ∇L_q(φ) of each task with dense Hessians: (tasks, n). lam: a number, or one for each parameter."""
    lams = np.concatenate([np.full(p[0].size, lam_i) for p, lam_i in zip(phi, np.broadcast_to(lam, len(phi)))])
    result = []
    for i in range(len(phi[0])):
        phi_i = [tm.Tensor(p.data[i]) for p in phi]
        h = dense_hessian(lambda x, i=i: loss([p[None] for p in x], task(support, i))[0], phi_i)
        b = flat(tm.grad(loss([p[None] for p in phi_i], task(query, i))[0], phi_i))
        result.append(np.linalg.solve(np.eye(len(h)) + h / lams, b))
    return np.array(result)
