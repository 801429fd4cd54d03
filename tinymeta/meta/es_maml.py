"""ES-MAML (Song et al. 2020): meta-gradients by evolution strategies, from losses alone. Nothing is differentiated.

Blurred by a Gaussian, f̃(x) = E f(x + σ h) with h ~ N(0, I), any f is smooth, and its derivatives are expectations:

    ∇f̃(x) = E f(x + σ h) h / σ              ESGrad
    ∇²f̃(x) = E f(x + σ h) (h hᵀ − I) / σ²   ESHess

Each is estimated from the losses of a population around x: n draws of h and their mirror images −h (antithetic), so
that all even powers of h, f(x) first, drop out of ESGrad exactly. Which gives MAML two ways:

    zero order    U(θ) = θ − α ESGrad L_s(θ)                    the inner step; `steps` of them, with K draws each
                  F(θ) = L_q(U(θ)),   ∇F̃(θ) ≈ ESGrad F(θ)       the outer one sees no more of U than its losses
    first order   ∇F ≈ (I − α ESHess L_s(θ)) ESGrad L_q(U(θ))   the chain rule; without the bracket, FO-MAML

The paper maximises rewards: f = −L turns its ascent θ + α ∇f̃ into this descent, and its I + α ∇²f̃ into I − α ∇²L̃_s.

A population is one more stack. `loss` meets all of it in one call, tasks × population as its first axis: every member
with parameters of its own, and the data of its task repeated. Noise comes from outside (`draw_es_noise`), the tasks
first like all data: outer (tasks, n, *shape), inner (tasks, steps, K, *shape) for every parameter. All members of the
outer population meet the same inner noise, so that U is one function, and only their places tell two of them apart.
"""

import numpy as np

from ..arguments import describe, finite, function, generator, items, whole
from ..ops import broadcast_to, concatenate, matmul, mean, reshape
from ..solvers import of_tasks, parameters, step, step_sizes
from ..tensor import Tensor, recording
from .adapt import check, count_tasks, name_of, of_step


def draw_es_noise(rng, theta, tasks, *, steps, perturbations, queries):
    """(outer, inner) standard normal noise from rng, a np.random.Generator: two lists of arrays like theta.

    perturbations: n, draws around θ (around U(θ) in first order); the query loss is asked for 2n times a task.
    queries: K, draws of an inner step; the support loss is asked for 2K times a step, in zero order for each of the 2n.
    """
    generator(rng)
    whole(tasks=tasks, steps=steps)
    whole(1, perturbations=perturbations, queries=queries)
    theta = parameters("theta", theta)

    def normal(*axes):
        return [rng.standard_normal((tasks, *axes, *t.shape)).astype(t.dtype) for t in theta]

    return normal(perturbations), normal(steps, queries)


def es_maml(loss, theta, support, query, *, alpha, steps, sigma, noise, batch=None):
    """(mean of L_q(U) over tasks and population, an estimate of F̃(θ); that of ∇F̃(θ)): zero order.

    alpha: inner step size. sigma: σ > 0. noise: (outer, inner) as above. batch: see `adapt`. The loss may have jumps
    and plateaus, and may take gradients of its own. Raises ValueError if noise has other shapes than these.
    """
    theta, (outer, inner) = check_noise(theta, support, query, noise, steps, sigma)
    alpha = step_sizes("alpha", alpha, len(theta))
    with recording(False):

        def adapted_loss(x):
            for k in range(steps):
                x = step(x, alpha, es_grad(on(loss, support, batch, k), x, at(inner, k), sigma)[1])
            return on(loss, query)(x)

        values, meta_grad = es_grad(adapted_loss, stacked(theta, query), outer, sigma)
        return mean(values), [mean(g, axis=(0, 1)) for g in meta_grad]


def first_order_es_maml(loss, theta, support, query, *, alpha, steps, sigma, noise, hessian=True, batch=None):
    """(mean of L_q over the population around U(θ), the chain rule's estimate of the meta-gradient).

    v = ESGrad L_q after the last step, then, back through the steps, v ← v − α ESHess L_s(θ_j) v as in MAML. ESGrad and
    ESHess of a step share their losses: 2n + 2 steps·K of them a task, where zero order takes 2n (1 + 2 steps·K).
    hessian=False leaves the brackets out (the paper's FO-NoHessian). ESHess takes 2 draws or more. Else as `es_maml`.
    """
    theta, (outer, inner) = check_noise(theta, support, query, noise, steps, sigma)
    alpha = step_sizes("alpha", alpha, len(theta))
    if hessian and inner[0].shape[2] < 2:
        raise ValueError("ESHess is a covariance over the draws of a step, of which there must be 2 or more: got 1")
    with recording(False):
        x, path = stacked(theta, query), []
        for k in range(steps):
            values, g = es_grad(on(loss, support, batch, k), x, at(inner, k), sigma)
            x = step(x, alpha, g)
            path.append(values)
        query_values, v = es_grad(on(loss, query), x, outer, sigma)
        for k in reversed(range(steps)) if hessian else ():  # α on v, as each parameter may have its own
            v = step(v, 1.0, es_hvp(path[k], at(inner, k), sigma, [a * v_i for a, v_i in zip(alpha, v)]))
        return mean(query_values), [mean(g, axis=(0, 1)) for g in v]


# ---- a population around each point ----------------------------------------------------------------------------------
# x is a list of (tasks, m, *shape), m points of every task; f(x) -> (tasks, m); noise is a list of (tasks, n, *shape).


def es_grad(f, x, noise, sigma):
    """(f of the population, (tasks, m, 2n); ESGrad f = Σ_j f(x + σ h_j) h_j / 2nσ at every point, like x)."""
    (tasks, m), noise = x[0].shape[:2], mirrored(noise)
    both = noise[0].shape[1]  # 2n
    population = [x_i[:, :, None] + sigma * h[:, None] for x_i, h in zip(x, noise)]
    values = reshape(f([reshape(p, (tasks, m * both, *p.shape[3:])) for p in population]), (tasks, m, both))
    return values, weighted_sum(centred(values) / (both * sigma), noise)  # centred: for less rounding, as Σ h = 0


def es_hvp(values, noise, sigma, v):
    """ESHess v, v like x, from the values that es_grad returned: the covariance of f and h hᵀ, over σ².

    E f (h hᵀ − I) is that covariance, because E h hᵀ = I. Its unbiased estimate, with n − 1, doesn't change if a
    constant is added to the loss; one that subtracts f̃ I instead drowns in the noise of f(x) h hᵀ.
    """
    noise = mirrored(noise)
    both = noise[0].shape[1]  # 2n
    along = 0  # hᵀv: (tasks, m, 2n)
    for h, v_i in zip(noise, v):
        along = along + matmul(flat(v_i), flat(h).swapaxes(1, 2))
    return weighted_sum(centred(values) * along / ((both - 2) * sigma**2), noise)  # 2 (n − 1): h and −h have one h hᵀ


def mirrored(noise):
    return [concatenate([h, -Tensor(h)], axis=1) for h in noise]


def centred(values):
    return values - mean(values, axis=-1, keepdims=True)


def weighted_sum(weights, noise):
    """Σ_j w_j h_j: (tasks, m, 2n) and (tasks, 2n, *shape) -> (tasks, m, *shape)."""
    return [reshape(matmul(weights, flat(h)), (*weights.shape[:2], *h.shape[2:])) for h in noise]


def flat(h):
    return reshape(h, (*h.shape[:2], -1))


def at(inner, step):
    return [h[:, step] for h in inner]


def stacked(theta, data):
    """θ as one point for every task."""
    return [broadcast_to(t, (count_tasks(data), 1, *t.shape)) for t in theta]


def on(loss, data, batch=None, k=None):
    """f: the loss of m points of every task, on all of the data or on the batch of a step."""
    function(loss=loss)
    data = of_step(data, batch, k)

    def f(x):
        tasks, m = x[0].shape[:2]
        rows = [reshape(x_i, (tasks * m, *x_i.shape[2:])) for x_i in x]
        with recording(True):  # a loss may take gradients of its own
            losses = loss(rows, repeated(data, m))
        return reshape(of_tasks(losses, rows, name_of(loss)), (tasks, m))

    return f


def repeated(data, m):
    """Nested arrays (tasks, ...) as (tasks · m, ...), every task's m times over."""
    if isinstance(data, dict):
        return {key: repeated(value, m) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        parts = [repeated(value, m) for value in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    if not isinstance(data, Tensor):
        return np.repeat(data, m, axis=0)
    together = broadcast_to(data[:, None], (len(data), m, *data.shape[1:]))
    return reshape(together, (-1, *data.shape[1:]))


def check_noise(theta, support, query, noise, steps, sigma):
    """(θ as leaves, noise), all shapes checked."""
    theta, tasks = check(theta, support, query), count_tasks(query)
    finite(positive=True, sigma=sigma)
    whole(steps=steps)
    if not isinstance(noise, (list, tuple)) or len(noise) != 2:
        raise TypeError(f"noise is (outer, inner), as draw_es_noise makes it, got {describe(noise)}")
    outer, inner = ([Tensor(h) for h in items("noise", part)] for part in noise)
    n, k = (part[0].shape[i : i + 1] if part else () for i, part in ((1, outer), (2, inner)))  # (n,), (K,)
    shapes, found = [t.shape for t in theta], [[h.shape for h in part] for part in (outer, inner)]
    if found != [[(tasks, *n, *s) for s in shapes], [(tasks, steps, *k, *s) for s in shapes]] or 0 in n + k:
        raise ValueError(
            f"noise is (outer, inner), for parameters {shapes} outer arrays ({tasks}, n, *shape) and inner ones"
            f" ({tasks}, {steps}, K, *shape), as draw_es_noise makes them; got {found[0]} and {found[1]}"
        )
    return theta, (outer, inner)
