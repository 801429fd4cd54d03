"""Leap (Flennerhag et al. 2019): a θ from which the gradient paths to all tasks' solutions are short.

Training on a task walks over its loss surface, from γ₀ at θ to γ_K at φ. The way's length (p = 1) or energy (p = 2):

    γ_i = (θ_i, f(θ_i)),   θ₀ = θ,   θ_{i+1} = θ_i − α ∇f(θ_i)        K steps, so K segments
    d(θ) = Σ_{i<K} ‖γ_{i+1} − γ_i‖ᵖ                                  f: the loss on the support, or on that step's batch

On a plateau nothing moves and d = 0, so a short way is worth something only if it ends no higher than it did. Leap sees
to that by pulling forward: the end γ̄_{i+1} of every segment stays where the present θ has led, and only its start γ_i
follows θ. With J_i = ∂θ_i/∂θ, the gradient of the mean over tasks of Σ ‖γ̄_{i+1} − γ_i‖ᵖ is

    −p Σ_{i<K} J_iᵀ (Δf_i ∇f(θ_i) + Δθ_i) ‖γ̄_{i+1} − γ_i‖ᵖ⁻²,        Δf_i = f(θ_{i+1}) − f(θ_i),  Δθ_i = θ_{i+1} − θ_i

and J_i is taken as the identity, which is first order: gradients on the way, no Hessian, memory flat in the steps.
Energy without the loss coordinate f is Σ −2 Δθ_i = 2 (θ − φ): Reptile, twice.

The stabiliser: where a step went uphill, Δf_i > 0, the equation would pull θ up too; −|Δf_i| instead pulls it down.

The authors' code differs. It meets each minibatch once, so that K of them give K − 1 segments; the two losses of a
segment come from different minibatches, where here both are of the batch that made the step, for one forward pass
more; and it leaves out the factor p, which matters for the energy alone.
"""

from ..arguments import whole
from ..ops import abs, greater, mean, sqrt, sum, where
from ..solvers import dot, per_task, sgd, update
from ..tensor import grad, stop_gradient
from .adapt import check, inner_problem, task_losses


def leap(
    loss, theta, support, query, *, alpha, steps, p=1, loss_coordinate=True, stabiliser=True, batch=None, rule=sgd
):
    """(query loss at φ, the gradient above). The query loss is for the log only: Leap learns from the support.

    alpha: inner step size. p: 1, the length, or 2, the energy. loss_coordinate=False: γ_i = θ_i, where the stabiliser
    has nothing to do. batch, rule: see `adapt`; another rule changes the θ_i and nothing else in the equation.
    A segment of length 0 adds nothing. Raises ValueError for another p, or steps < 0.
    """
    whole(1, p=p)
    if p > 2:
        raise ValueError(f"p must be 1, the length of the way, or 2, its energy; got {p}")
    whole(steps=steps)
    theta = check(theta, support, query)
    objective, phi = inner_problem(loss, theta, support, batch, alpha, rule)
    phi, state = stop_gradient(phi), None
    meta_grad = [t * 0 for t in theta]
    for k in range(steps):
        f = objective(phi, k)
        g = grad(sum(f), phi)
        ahead, state = stop_gradient(update(rule, phi, g, state, alpha))
        way = [b - a for a, b in zip(phi, ahead)]
        square = dot(way, way)
        if loss_coordinate:
            climb = objective(ahead, k) - f
            square = square + climb * climb
            climb = -abs(climb) if stabiliser else climb
            way = [d + per_task(climb, g_i) * g_i for d, g_i in zip(way, g)]
        if p == 1:
            length = sqrt(where(greater(square, 0), square, 1))
            way = [d / per_task(length, d) for d in way]
        meta_grad = [m - p * mean(d, axis=0) for m, d in zip(meta_grad, way)]
        phi, meta_grad = stop_gradient((ahead, meta_grad))
    return stop_gradient((mean(task_losses(loss, phi, query)), meta_grad))
