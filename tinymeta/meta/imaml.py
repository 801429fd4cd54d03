"""iMAML (Rajeswaran et al. 2019): the meta-gradient from the solution of the inner problem, not from the path to it.

    φ*(θ) = argmin_φ G(φ),    G(φ) = L_s(φ) + λ/2 ‖φ − θ‖²      the inner problem: learn, but stay near θ
    F(θ) = mean over tasks of L_q(φ*(θ))

At the solution ∇L_s(φ*) + λ (φ* − θ) = 0 for every θ. Differentiating this with respect to θ, with the Hessian H of
L_s at φ*:

    (H + λ I) ∂φ*/∂θ = λ I,     so       ∇F(θ) = (I + H/λ)⁻¹ ∇L_q(φ*)

Conjugate gradients solve (I + H/λ) g = ∇L_q(φ*) with nothing but products H v. How φ* was found doesn't enter: no path
is stored, no step is differentiated, and the memory is that of one Hessian-vector product, whatever the inner solver.
"""

import warnings

import numpy as np

from ..ops import mean, sum, where
from ..solvers import cg, dot, per_task, sgd
from ..tensor import Tensor, grad, stop_gradient, vjp
from .adapt import adapt, check, count_tasks, parameters, task_losses


def imaml(loss, theta, support, query, *, lam, alpha, steps, cg_steps, damping=0.0, batch=None, rule=sgd, report=False):
    """(query loss, meta_grad) as above, with φ* approached by `steps` steps of size alpha on G.

    lam: λ > 0, large enough that G is convex around φ*, or the solution doesn't move smoothly with θ.
    cg_steps, damping, report: see `implicit_gradient`. batch, rule: see `adapt`.
    """
    check_lam(lam)
    theta = check(theta, support, query)
    phi = adapt(proximal(loss, theta, lam), theta, support, alpha=alpha, steps=steps, batch=batch, rule=rule)
    return implicit_gradient(loss, phi, support, query, lam=lam, cg_steps=cg_steps, damping=damping, report=report)


def proximal(loss, theta, lam):
    """G: (phi, data) ↦ loss(phi, data) + λ/2 ‖φ − θ‖², a loss that `adapt` takes."""

    def g(phi, data):
        away = [p - t for p, t in zip(phi, theta, strict=True)]
        return task_losses(loss, phi, data) + lam / 2 * dot(away, away)

    return g


def check_lam(lam):
    if not lam > 0:
        raise ValueError(f"lam must be positive, got {lam}: it weighs the pull toward θ")


def implicit_gradient(loss, phi, support, query, *, lam, cg_steps, damping=0.0, tol=1e-10, report=False):
    """(mean of L_q(φ), mean of (I + H/λ)⁻¹ ∇L_q(φ)), for a stack φ that solves the inner problem, however found.

    cg_steps: Hessian-vector products after the first residual; CG starts at ∇L_q(φ), so that 0 gives first-order MAML.
    damping: δ ≥ 0, in I + H/(λ + δ). Convnets with batch norm have negative curvature that no useful λ outweighs, and
    the system is then singular or worse. The published code has what amounts to δ = 22 at λ = 2 (it solves
    2 g + H g / 12 = ∇L_q). Biased, and the more so the larger: δ = ∞ is first-order MAML.
    A task that meets negative curvature all the same counts with its first-order gradient ∇L_q(φ): near a singular
    system CG's iterates grow without bound, and one such task would drown the others.
    tol: residual, relative to ‖∇L_q(φ)‖, at which a task is done. report=True appends cg's `Solution`: residuals,
    iterations and negative curvature per task. Without it a RuntimeWarning counts the tasks of negative curvature.
    Another one counts the tasks whose gradients or products are not finite.
    """
    check_lam(lam)
    if not damping >= 0:
        raise ValueError(f"damping must be 0 or more, got {damping}")
    phi = stop_gradient(parameters("phi", phi if isinstance(phi, Tensor) else map(Tensor, phi)))
    count_tasks(support, query, phi)
    query_losses = task_losses(loss, phi, query)
    b = grad(sum(query_losses), phi)
    g = grad(sum(task_losses(loss, phi, support)), phi, create_graph=True)  # one graph, walked by every product

    def matvec(v):
        return [v_i + hv_i / (lam + damping) for v_i, hv_i in zip(v, vjp(g, phi, v))]

    solution = cg(matvec, b, steps=cg_steps, x0=b, tol=tol)
    indefinite = [per_task(solution.negative_curvature, b_i) for b_i in b]
    x = [where(mask, b_i, x_i) for mask, b_i, x_i in zip(indefinite, b, solution.x)]
    negative = int(solution.negative_curvature.data.sum())
    if negative and not report:
        warnings.warn(
            f"iMAML: I + H/λ is not positive definite in {negative} of {len(b[0])} tasks: λ = {lam} is too small for"
            " the inner problem to be convex; they count with their first-order gradient (see damping)",
            RuntimeWarning,
            stacklevel=2,
        )
    broken = int((~np.isfinite(solution.residual.data)).sum())
    if broken:
        message = f"iMAML: gradients or Hessian-vector products of {broken} of {len(b[0])} tasks are not finite"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    result = stop_gradient((mean(query_losses), [mean(x_i, axis=0) for x_i in x]))
    return (*result, solution) if report else result
