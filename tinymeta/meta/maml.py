"""MAML (Finn et al. 2017): learn the θ from which a few gradient steps on a new task's support lead far.

    θ₀ = θ,   θ_{j+1} = θ_j − α ∇L_s(θ_j),   φ = θ_K            the inner loop, on the support
    F(θ) = mean over tasks of L_q(φ(θ))                         the objective, on the query

How does the loss at φ get back to θ? By the chain rule through each step, whose Jacobian is I − α H(θ_j) with the
Hessian H of L_s. Back-propagation starts from v = ∇L_q(φ) and goes down the steps, j = K − 1 ... 0:

    v ← v − α H(θ_j) v,         and at last  ∇F(θ) = v

No H is ever formed. Hᵀv is what comes out when the graph of ∇L_s(θ_j), which `create_graph=True` has kept, is walked
backward with v as the cotangent, and H = Hᵀ: differentiating the gradient is all there is to it. The price is the
memory of the K graphs. First-order MAML leaves the loop out, v = ∇L_q(φ), as if φ were θ plus a constant.

Truncated back-propagation (Shaban et al. 2019) stops the loop early and goes down the last R steps only, j = K − 1 ...
K − R, as if θ_{K−R} were θ plus a constant. R = K is MAML, R = 0 first-order MAML. Where the inner loop contracts, with
all eigenvalues of I − α H between −1 and 1, what is left out shrinks geometrically with R. So does the gradient itself,
with K: what is truncated is too long by the factors that it lacks.
"""

from ..arguments import whole
from ..ops import mean, sum
from ..solvers import sgd
from ..tensor import grad, stop_gradient
from .adapt import adapt, check, task_losses, trajectory


def maml(loss, theta, support, query, *, alpha, steps, batch=None, rule=sgd):
    """(query loss, ∇F(θ)) of the objective above. Time and memory grow with `steps`.

    alpha: inner step size. batch, rule: see `adapt`. steps=0 gives the plain gradient of the query loss.
    """
    theta = check(theta, support, query)
    phi = adapt(loss, theta, support, alpha=alpha, steps=steps, create_graph=True, batch=batch, rule=rule)
    query_loss = mean(task_losses(loss, phi, query))
    meta_grad = grad(query_loss, theta)  # through every inner step, down to θ
    return stop_gradient((query_loss, meta_grad))


def fomaml(loss, theta, support, query, *, alpha, steps, batch=None, rule=sgd):
    """(query loss, mean over tasks of ∇L_q(φ)). As `maml`, but the memory doesn't grow with `steps`."""
    theta = check(theta, support, query)
    phi = adapt(loss, theta, support, alpha=alpha, steps=steps, batch=batch, rule=rule)
    query_loss = mean(task_losses(loss, phi, query, theta))
    meta_grad = [sum(g, axis=0) for g in grad(query_loss, phi)]  # only down to φ; query_loss is the mean
    return stop_gradient((query_loss, meta_grad))


def truncated(loss, theta, support, query, *, alpha, steps, last, batch=None, rule=sgd):
    """(query loss, mean over tasks of v after the `last` inner steps). The memory grows with `last`, not with `steps`.

    Raises ValueError unless 0 ≤ last ≤ steps. batch's steps and the rule's state go on across the cut.
    """
    whole(steps=steps)
    whole(last=last)
    if last > steps:
        raise ValueError(f"last is the number of inner steps to go back through, 0 to steps={steps}, got {last}")
    theta, cut = check(theta, support, query), steps - last
    options = {"alpha": alpha, "steps": steps, "batch": batch, "rule": rule}
    for k, phi in enumerate(trajectory(loss, theta, support, create_graph=True, cut=cut, **options)):
        if k == cut:
            start = phi
    query_loss = mean(task_losses(loss, phi, query, theta if cut else ()))
    if not cut:
        return stop_gradient((query_loss, grad(query_loss, theta)))
    meta_grad = [sum(g, axis=0) for g in grad(query_loss, start)]  # only down to θ_{K−R}, likewise
    return stop_gradient((query_loss, meta_grad))
