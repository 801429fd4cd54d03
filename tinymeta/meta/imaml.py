"""iMAML (Rajeswaran et al. 2019): the meta-gradient from the solution of the inner problem, not from the path to it.

    φ*(θ) = argmin_φ G(φ),    G(φ) = L_s(φ) + λ/2 ‖φ − θ‖²      the inner problem: learn, but stay near θ
    F(θ) = mean over tasks of L_q(φ*(θ))

At the solution ∇L_s(φ*) + λ (φ* − θ) = 0 for every θ. Differentiating this with respect to θ, with the Hessian H of
L_s at φ*:

    (H + λ I) ∂φ*/∂θ = λ I,     so       ∇F(θ) = (I + H/λ)⁻¹ ∇L_q(φ*)

Conjugate gradients solve (I + H/λ) x = ∇L_q(φ*) with nothing but products H v. How φ* was found doesn't enter: no path
is stored, no step is differentiated, and the memory is that of one Hessian-vector product, whatever the inner solver.

λ may differ from parameter to parameter, Λ = diag(λ). Then ∇F(θ) = (I + HΛ⁻¹)⁻¹ ∇L_q(φ*), whose matrix is not symmetric
as CG needs it. This one is, and has the same eigenvalues:

    (I + Λ^−½ H Λ^−½) y = Λ^−½ ∇L_q(φ*),        ∇F(θ) = Λ^½ y
"""

import warnings

import numpy as np

from ..arguments import finite, items, whole
from ..ops import mean, sum, where
from ..solvers import cg, dot, parameters, per_task, sgd, solution_of
from ..tensor import Tensor, grad, stop_gradient, vjp
from .adapt import adapt, check, require_tasks, task_losses


def imaml(
    loss, theta, support, query, *, lam, alpha, steps, cg_steps, damping=0.0, linear_solver=cg, batch=None, rule=sgd,
    solve=None, report=False,
):  # fmt: skip
    """(query loss, meta_grad) as above, with φ* approached by `steps` steps of size alpha on G.

    lam: λ > 0, large enough that G is convex around φ*, or the solution doesn't move smoothly with θ. A number or a 0-d
    Tensor, or a list of these with one for each parameter.
    cg_steps, damping, linear_solver, report: see `implicit_gradient`. batch, rule, solve: see `adapt`.

    Any inner solver will do. One of your own, here steepest descent with each task's exact step ‖∇G‖² / ∇GᵀH∇G, takes
    G as objective(phi, step) -> (tasks,), and φ as a stack (tasks, ...):

    >>> import numpy as np, tinymeta as tm
    >>> from tinymeta.solvers import dot, per_task
    >>> def steepest_descent(objective, phi, *, lr, steps):
    ...     for k in range(steps):
    ...         g = tm.grad(tm.sum(objective(phi, k)), phi, create_graph=True)
    ...         h_g = tm.vjp(g, phi, tm.stop_gradient(g))
    ...         t = lr * dot(g, g) / (dot(g, h_g) + 1e-30)
    ...         phi = tm.stop_gradient([p - per_task(t, p) * g_i for p, g_i in zip(phi, g)])
    ...     return phi
    >>> def loss(phi, data):                                  # three tasks: ½ ‖φ − data‖², so φ* = (data + λθ)/(1 + λ)
    ...     return tm.sum((phi[0] - data) ** 2, axis=1) / 2
    >>> support, query = np.eye(3), np.ones((3, 3))
    >>> query_loss, (meta_grad,) = tm.meta.imaml(loss, [tm.Tensor(np.zeros(3))], support, query, lam=1.0, alpha=1.0,
    ...                                          steps=1, cg_steps=1, solve=steepest_descent)
    >>> meta_grad.data                                        # ½ (⅙ − 1)
    array([-0.4166667, -0.4166667, -0.4166667])
    """
    theta = check(theta, support, query)
    objective = proximal(loss, theta, lam)
    phi = adapt(objective, theta, support, alpha=alpha, steps=steps, batch=batch, rule=rule, solve=solve)
    alone = lambda phi, data: task_losses(loss, phi, data, theta)  # the equation leaves out what else depends on θ
    return implicit_gradient(
        alone, phi, support, query, lam=lam, cg_steps=cg_steps, damping=damping, linear_solver=linear_solver,
        report=report,
    )  # fmt: skip


def proximal(loss, theta, lam):
    """G: (phi, data) ↦ loss(phi, data) + Σ_i λ_i/2 ‖φ_i − θ_i‖², a loss that `adapt` takes. lam: as for `imaml`.

    G is a function of θ too, and differentiable in it: `maml` of G is right, first order refuses it.
    """
    theta = parameters("theta", theta)
    lams = per_parameter(lam, theta)

    def objective(phi, data):
        total = task_losses(loss, phi, data)
        if len(phi) != len(theta):
            raise ValueError(f"proximal: phi has {len(phi)} parameters, theta {len(theta)}")
        for p, t, lam_i in zip(phi, theta, lams):
            away = p - t
            total = total + lam_i / 2 * dot([away], [away])
        return total

    return objective


def per_parameter(lam, params):
    """λ as a list, one for each parameter."""
    lams = list(lam) if isinstance(lam, (list, tuple)) else [lam] * len(params)
    if len(lams) != len(params):
        raise ValueError(f"lam has {len(lams)} entries for {len(params)} parameters: give one for each, or a number")
    for lam_i in lams:
        finite(positive=True, lam=lam_i)
    return lams


def implicit_gradient(loss, phi, support, query, *, lam, cg_steps, damping=0.0, linear_solver=cg, report=False):
    """(mean of L_q(φ), mean of (I + HΛ⁻¹)⁻¹ ∇L_q(φ)), for a stack φ that solves the inner problem, however found.

    cg_steps: Hessian-vector products after the first residual; CG starts at ∇L_q(φ), so that 0 gives first-order MAML.
    damping: δ ≥ 0, in I + H/(λ + δ). Convnets with batch norm have negative curvature that no useful λ outweighs, and
    the system is then singular or worse. The published code has what amounts to δ = 22 at λ = 2 (it solves
    2 x + H x / 12 = ∇L_q, for half of this x). Biased, and the more so the larger: δ = ∞ is first-order MAML.
    A task that meets negative curvature all the same counts with its first-order gradient ∇L_q(φ): near a singular
    system CG's iterates grow without bound, and one such task would drown the others.
    linear_solver: cg, or e.g. partial(cg, tol=1e-3) or partial(neumann, eta=0.5); the series converges if the
    eigenvalues of η (I + HΛ⁻¹) lie in (0, 2). Called as linear_solver(matvec, b, steps=cg_steps, x0=b).
    report=True appends its `Solution`: each task's gradient x, residual (of the symmetric system), iterations and
    negative curvature. Without it a RuntimeWarning counts the tasks of negative curvature, and another one the tasks
    whose system is left unsolved (`unconverged`), if these are more than half and cg_steps is not 0.
    A third counts the tasks whose gradients or products are not finite. A compiled function warns at its first call
    at most: there, take the report.
    """
    finite(0, damping=damping)
    whole(cg_steps=cg_steps)
    phi = stop_gradient(parameters("phi", [Tensor(p) for p in items("phi", phi)]))
    require_tasks(support, query, phi, of="support, query and phi")
    roots = [(lam_i + damping) ** 0.5 for lam_i in per_parameter(lam, phi)]
    query_losses = task_losses(loss, phi, query)
    b = grad(sum(query_losses), phi)
    g = grad(sum(task_losses(loss, phi, support)), phi, create_graph=True)  # one graph, walked by every product

    def matvec(v):
        products = vjp(g, phi, [v_i / root for v_i, root in zip(v, roots)])
        return [v_i + hv_i / root for v_i, hv_i, root in zip(v, products, roots)]

    scaled = [b_i / root for b_i, root in zip(b, roots)]
    solution = solution_of(linear_solver, matvec, scaled, steps=cg_steps, x0=scaled)
    negative = solution.negative_curvature
    x = [where(per_task(negative, b_i), b_i, y_i * root) for b_i, y_i, root in zip(b, solution.x, roots)]
    solution = stop_gradient(solution._replace(x=x))
    if not report:
        warn_of_negative_curvature(
            "iMAML: I + H/λ", solution, f"λ = {lam} is too small for the inner problem to be convex; they count with"
            " their first-order gradient (see damping)",
        )  # fmt: skip
        warn_of_unsolved("iMAML: (I + H/λ) x = ∇L_q", solution, cg_steps)
    warn_of_numbers("iMAML", solution)
    result = stop_gradient((mean(query_losses), [mean(x_i, axis=0) for x_i in x]))
    return (*result, solution) if report else result


def warn_of_negative_curvature(matrix, solution, consequence):
    tasks, negative = len(solution.residual), int(solution.negative_curvature.data.sum())
    if negative:
        message = f"{matrix} is not positive definite in {negative} of {tasks} tasks: {consequence}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def warn_of_unsolved(system, solution, steps):
    """If more than half of the tasks are unconverged: a few others would be lost in the mean over tasks."""
    tasks, unsolved = len(solution.residual), int(solution.unconverged.data.sum())
    if steps and 2 * unsolved > tasks:
        left = float(np.median(solution.relative_residual.data))
        message = (
            f"{system} is left unsolved in {unsolved} of {tasks} tasks, with a median residual of {left:.2g} of the"
            f" right-hand side after {steps} products: conjugate gradients need more of them or a better conditioned"
            " system (a larger λ or damping), a Neumann series that diverges a smaller eta"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def warn_of_numbers(name, solution):
    tasks, broken = len(solution.residual), int((~np.isfinite(solution.residual.data)).sum())
    if broken:
        message = f"{name}: gradients or Hessian-vector products of {broken} of {tasks} tasks are not finite"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
