"""Gradient dropout (DropGrad, Tseng et al. 2020): noise on the inner gradients, against overfitting to training tasks.

    φ ← φ − α (n ⊙ ∇L_s(φ)),      E n = 1,   Var n = p / (1 − p)

    binary       n = b / (1 − p),   b ~ Bernoulli(1 − p): an element is left out with probability p
    Gaussian     n ~ N(1, p / (1 − p))

In training only; at test, leave it out. It is an update rule around another one, for any algorithm that takes a rule:

    maml(loss, theta, support, query, alpha=alpha, steps=steps, rule=dropout(noise))

The noise is an argument, drawn outside: the algorithm stays a function, which can be checked and compiled.
"""

from ..arguments import finite, function, generator, items, whole
from ..solvers import parameters, sgd, update
from ..tensor import Tensor


def draw_noise(rng, theta, p, *, tasks, steps, gaussian=False):
    """n for every task, step and parameter: a list of arrays (tasks, steps, *shape), one for each of theta.

    rng: a np.random.Generator. p: 0 ≤ p < 1; the paper recommends 0.1 to 0.2.
    """
    generator(rng)
    whole(tasks=tasks, steps=steps)
    finite(p=p)
    if not 0 <= p < 1:
        raise ValueError(f"p is the probability of leaving out a gradient, 0 ≤ p < 1, got {p}")
    noise = []
    for t in parameters("theta", theta):
        shape = tasks, steps, *t.shape
        n = 1 + (p / (1 - p)) ** 0.5 * rng.standard_normal(shape) if gaussian else (rng.random(shape) >= p) / (1 - p)
        noise.append(n.astype(t.dtype))
    return noise


def dropout(noise, rule=sgd):
    """The update rule that hands n ⊙ g to `rule` instead of g. noise: arrays (tasks, steps, *shape), see `draw_noise`.

    Raises ValueError if the noise doesn't fit the parameters, or if there are more inner steps than it has.
    """
    noise = [Tensor(n) for n in items("noise", noise)]
    function(rule=rule)

    def noisy(params, grads, state=None, *, lr):
        step, inner = state or (0, None)
        expected, found = [g.shape for g in grads], [(*n.shape[:1], *n.shape[2:]) for n in noise]
        if found != expected or any(n.ndim < 2 or n.shape[1] <= step for n in noise):
            raise ValueError(
                f"step {step} of stacked parameters {expected} needs noise (tasks, steps, ...) of the same shapes with"
                f" an axis of more than {step} steps after the tasks, got {[n.shape for n in noise]}"
            )
        params, inner = update(rule, params, [n[:, step] * g for n, g in zip(noise, grads)], inner, lr)
        return params, (step + 1, inner)

    return noisy
