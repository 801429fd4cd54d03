"""Modular shrinkage (Chen et al. 2020): learn which modules should move from task to task, and how far.

    φ_m ~ N(θ_m, σ_m² I) for each module m, a group of parameters; λ_m = 1/σ_m², Λ = diag(λ)
    φ*(θ, σ²) = argmin_φ G(φ),    G(φ) = L_s(φ) + Σ_m λ_m/2 ‖φ_m − θ_m‖²     the inner problem: the posterior's mode
    F(θ, σ²) = mean over tasks of L_q(φ*(θ, σ²))                              the predictive loss

A module that all tasks share learns σ_m² → 0, one that each task must change a large σ_m². The implicit function
theorem on ∇L_s(φ*) + Λ (φ* − θ) = 0, with the Hessian H of L_s at φ*, gives

    (H + Λ) ∂φ*/∂θ = Λ,      (H + Λ) ∂φ*/∂log σ_m² = λ_m (φ*_m − θ_m) in the rows of m, 0 elsewhere

and with iMAML's x = (I + HΛ⁻¹)⁻¹ ∇L_q(φ*) = Λ (H + Λ)⁻¹ ∇L_q(φ*) of each task

    ∇_θ F = mean of x,         ∂F/∂log σ_m² = mean of ⟨x_m, φ*_m − θ_m⟩

So one solve serves both. Chen et al. approximate x by ∇L_q(φ*), which is cg_steps=0 here, and move θ by the derivative
of G, λ (θ − φ*), where here it follows F too. One module of all parameters is iMAML with a learned λ.
"""

from ..arguments import describe, whole
from ..ops import exp, mean
from ..solvers import cg, dot, parameters, sgd
from ..tensor import stop_gradient
from .adapt import adapt, check, task_losses
from .imaml import implicit_gradient, proximal, warn_of_negative_curvature, warn_of_unsolved


def shrinkage(
    loss, theta, support, query, *, modules, alpha, steps, cg_steps, damping=0.0, linear_solver=cg, batch=None,
    rule=sgd, solve=None, report=False,
):  # fmt: skip
    """(query loss, [*∇_θ F, *∂F/∂log σ²]) as above, with φ* approached by `steps` steps of size alpha on G.

    theta: [*weights, *log σ²], of which `loss` sees the weights only; log σ² is a 0-d Tensor for each module.
    modules: lists of indices of weights, e.g. [[0, 1], [2, 3]]; each weight is in one module.
    All else as for `imaml`.
    """
    theta = check(theta, support, query)
    weights, lam = precisions(theta, modules)
    objective = proximal(loss, weights, lam)
    phi = adapt(objective, weights, support, alpha=alpha, steps=steps, batch=batch, rule=rule, solve=solve)
    alone = lambda phi, data: task_losses(loss, phi, data, theta)  # the equations leave out what else depends on θ
    query_loss, weights_bar, solution = implicit_gradient(
        alone,
        phi,
        support,
        query,
        lam=lam,
        cg_steps=cg_steps,
        damping=damping,
        linear_solver=linear_solver,
        report=True,
    )
    if not report:
        consequence = "a σ² is too large for the inner problem to be convex; they count with first-order gradients"
        warn_of_negative_curvature("shrinkage: I + HΛ⁻¹", solution, consequence)
        warn_of_unsolved("shrinkage: (I + HΛ⁻¹) x = ∇L_q", solution, cg_steps)
    x, away = solution.x, [p - w for p, w in zip(phi, weights)]
    log_sigma2_bar = [mean(dot([x[i] for i in module], [away[i] for i in module])) for module in modules]
    result = stop_gradient((query_loss, [*weights_bar, *log_sigma2_bar]))
    return (*result, solution) if report else result


def precisions(theta, modules):
    """(weights, λ = 1/σ² of each weight's module), of θ = [*weights, *log σ²]: also what `proximal` takes at test."""
    theta = parameters("theta", theta)
    if not isinstance(modules, (list, tuple)) or not all(
        isinstance(module, (list, tuple, range)) for module in modules
    ):
        raise TypeError(
            f"modules is a list of lists of indices of weights, e.g. [[0, 1], [2]], got {describe(modules)}"
        )
    for i in (i for module in modules for i in module):
        whole(**{"an index in modules": i})
    count = len(theta) - len(modules)
    weights, log_sigma2 = list(theta[:count]), theta[count:]
    if sorted(i for module in modules for i in module) != list(range(count)):
        raise ValueError(f"modules {modules} of {count} weights: each of 0 ... {count - 1} must be in one module")
    if any(t.shape for t in log_sigma2):
        shapes = [t.shape for t in log_sigma2]
        raise ValueError(f"theta ends in a 0-d log σ² for each of {len(modules)} modules, got shapes {shapes}")
    of_module = {i: exp(-t) for module, t in zip(modules, log_sigma2) for i in module}
    return weights, [of_module[i] for i in range(count)]
