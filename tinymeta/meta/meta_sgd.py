"""Meta-SGD (Li et al. 2017): learn how far each weight moves, and which way, together with where it starts.

    w₀ = w,   w_{j+1} = w_j − a ⊙ ∇L_s(w_j),   φ = w_K          a step size for each element of w, of any sign
    F(w, a) = mean over tasks of L_q(φ)

The meta-parameters are one list, θ = [*w, *a]. Back-propagation goes down the steps as in MAML, and on its way collects
the gradient of the step sizes, j = K − 1 ... 0, from v = ∇L_q(φ):

    ∂F/∂a ← ∂F/∂a − v ⊙ ∇L_s(w_j),    v ← v − H(w_j) (a ⊙ v),        and at last  ∂F/∂w = v

First order leaves H out, as if each ∇L_s(w_j) were a constant. The step sizes still learn, from −v ⊙ ∇L_s(w_j): so the
chain of the updates is kept, without the graphs of their gradients.
"""

import numpy as np

from ..arguments import finite
from ..ops import mean
from ..solvers import parameters, sgd
from ..tensor import Tensor, grad, stop_gradient
from .adapt import check, task_losses, trajectory


def meta_sgd(loss, theta, support, query, *, steps, first_order=False, batch=None, rule=sgd):
    """(query loss, [∂F/∂w..., ∂F/∂a...]) of the objective above; theta = [*w, *a] as of `init_meta_sgd`.

    loss sees the weights only: the first half of theta, adapted. To adapt at test: w, a = tm.meta.split(theta), then
    adapt(loss, w, support, alpha=a, steps=steps). batch, rule: see `adapt`. Raises ValueError unless every step size
    has the shape of its weight.
    """
    w, a = split(check(theta, support, query))
    require_shapes(a, [w_i.shape for w_i in w])
    options = {"steps": steps, "batch": batch, "rule": rule, "create_graph": not first_order}
    *_, phi = trajectory(loss, w, support, alpha=a, **options)
    query_loss = mean(task_losses(loss, phi, query))
    return stop_gradient((query_loss, grad(query_loss, w + a)))


def init_meta_sgd(w, alpha):
    """θ = [*w, *a], where all step sizes a start at alpha."""
    w = parameters("w", w)
    finite(alpha=alpha)
    return w + [Tensor(np.full(w_i.shape, float(alpha), w_i.dtype)) for w_i in w]


def split(theta):
    """θ = [*w, *a] as (w, a): the weights, and the step sizes that are learned with them."""
    theta = parameters("theta", theta)
    if len(theta) % 2:
        raise ValueError(f"theta has {len(theta)} parameters: it is [*weights, *step sizes], one step size each")
    return theta[: len(theta) // 2], theta[len(theta) // 2 :]


def require_shapes(a, shapes):
    found = [a_i.shape for a_i in a]
    if found != shapes:
        raise ValueError(f"the step sizes, the second half of theta, have shapes {found}, expected {shapes}")
