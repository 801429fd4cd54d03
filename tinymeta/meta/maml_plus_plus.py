"""MAML++ (Antoniou et al. 2019): what makes MAML of several inner steps train more steadily.

    w_{j+1} = w_j − a_j ∇L_s(w_j)                               a step size for each tensor of w and each step
    F(w, a) = mean over tasks of Σ_j ω_j L_q(w_j),  j = 1 ... K     multi-step loss: the query after every step

Every step gets a gradient by a short way, and not only through all the steps after it. In the course of the training
the weights ω go from equal ones to (0, ..., 0, 1), MAML's. The meta-parameters are one list, θ = [*w, *a], and each
element of a is of shape (K,). Derivative-order annealing is `first_order=True` in the first epochs. Of the rest of the
paper, batch norm's statistics per step have no place here, where none are kept, and annealing the outer step is the
outer loop's.
"""

import numpy as np

from ..arguments import FLOATS, describe, finite, type_of, whole
from ..ops import mean, stack, sum
from ..solvers import alongside, parameters, sgd
from ..tensor import Tensor, grad, stop_gradient
from .adapt import check, task_losses, trajectory
from .meta_sgd import require_shapes, split


def maml_plus_plus(loss, theta, support, query, *, steps, weights, first_order=False, batch=None):
    """(query loss after the last step, [∂F/∂w..., ∂F/∂a...]); theta = [*w, *a] as of `init_lslr`.

    weights: ω, an array (steps,) of θ's type, e.g. of `multi_step_weights`; an array, so that a compiled function can
    take another one at every call. first_order: as in `meta_sgd`, but the graphs of the query losses, one a step, are
    kept in either order. batch: see `adapt`. To adapt at test:
    w, a = tm.meta.split(theta), then adapt(loss, w, support, alpha=a, steps=steps, rule=tm.meta.per_step).
    Raises ValueError for fewer than 1 step, and where step sizes or weights aren't of shape (steps,).
    """
    w, a = split(check(theta, support, query))
    whole(1, steps=steps)
    require_shapes(a, [(steps,)] * len(w))
    weights = Tensor(weights)
    if weights.shape != (steps,) or weights.dtype != w[0].dtype:
        raise ValueError(
            f"weights are {describe(weights)}, expected {w[0].dtype}, shape ({steps},): one for the loss after each"
            " step"
        )
    options = {"steps": steps, "batch": batch, "rule": per_step, "create_graph": not first_order}
    _, *path = trajectory(loss, w, support, alpha=a, **options)
    query_losses = [mean(task_losses(loss, phi, query)) for phi in path]
    objective = sum(weights * stack(query_losses))
    return stop_gradient((query_losses[-1], grad(objective, w + a)))


def per_step(params, grads, step=None, *, lr):
    """p ← p − a_j g in step j, for a list lr of step sizes a, each (steps,): an update rule for `adapt`."""
    step = 0 if step is None else step
    whole(step=step)
    _, lr = alongside(params, lr=lr)
    if any(a.ndim != 1 for a in lr):
        raise ValueError(f"lr has shapes {[a.shape for a in lr]}, expected (steps,): a step size for each step")
    if step >= min(len(a) for a in lr):
        raise ValueError(f"there are step sizes for {len(lr[0])} steps, and none for step {step}")
    return sgd(params, grads, lr=[a[step] for a in lr])[0], int(step) + 1


def init_lslr(w, alpha, steps):
    """θ = [*w, *a] of LSLR, per-layer per-step learning rates, which start at alpha (0.1 in the published code)."""
    w = parameters("w", w)
    finite(alpha=alpha)
    whole(1, steps=steps)
    return w + [Tensor(np.full(steps, float(alpha), w_i.dtype)) for w_i in w]


def multi_step_weights(steps, epoch, *, epochs=10, dtype=np.float32):
    """ω in epoch 0, 1, ...: an array (steps,) that sums to 1, by the schedule of the published code.

    All start at 1/steps. All but the last fall in proportion to 1 − epoch/epochs, down to 0.03/steps, which the last
    makes up for; from `epochs` on only the last counts.
    """
    whole(1, steps=steps, epochs=epochs)
    whole(epoch=epoch)
    others = max(1 - epoch / epochs, 0.03) / steps if epoch < epochs else 0.0
    weights = np.full(steps, others, type_of(dtype, FLOATS))
    weights[-1] = 1 - (steps - 1) * others
    return weights
