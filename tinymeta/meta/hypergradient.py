"""The hypergradient: how the solution of a training problem answers to what the problem was made of.

    w*(λ) = argmin_w L_T(w, λ)             λ: any hyper-parameters: weight decay, augmentation, a prior's mean
    F(λ) = L_V(w*(λ), λ)                   the validation loss

By the implicit function theorem on ∂L_T/∂w (w*(λ), λ) = 0 (Pedregosa 2016; Lorraine et al. 2020):

    dF/dλ = ∂L_V/∂λ − v ∂²L_T/∂w∂λ,        v = ∂L_V/∂w [∂²L_T/∂w∂w]⁻¹

The first term is the direct one, usually 0. For v, a linear solver needs nothing but products with the Hessian; the
mixed term is one more product, the derivative of ⟨∂L_T/∂w, v⟩ with respect to λ. How w* was found doesn't enter.
With L_T = L_s(w) + c/2 ‖w − λ‖² the mixed term is −c v, and dF/dλ is iMAML's meta-gradient.
"""

from ..arguments import function, whole
from ..ops import mean, sum
from ..solvers import cg, parameters, solution_of
from ..tensor import grad, stop_gradient, vjp
from .adapt import leaves, require_tasks, task_losses
from .imaml import warn_of_negative_curvature, warn_of_numbers, warn_of_unsolved


def hypergradient(train_loss, val_loss, w, hyper, *, steps, linear_solver=cg, report=False):
    """(mean of L_V, dF/dλ: a list like hyper), the mean over the tasks, at weights w that minimise the training loss.

    train_loss(w, hyper), val_loss(w, hyper) -> (tasks,). w: a list of (tasks, ...), stacks as `adapt` returns them; a
    single problem is a stack of one. hyper: a list of Tensors, which all tasks share.
    steps: Hessian-vector products. linear_solver: cg, or e.g. partial(cg, tol=1e-3) or partial(neumann, eta=0.1), whose
    η times the Hessian's eigenvalues must lie in (0, 2); its sum of `steps` terms is what back-propagation through as
    many gradient steps of size η, taken at w*, would give. No steps leave the direct term.
    report=True appends the solver's `Solution`; without it a RuntimeWarning counts the tasks of negative curvature,
    which are at no minimum, and whose v is as far as CG got, and another one says when most systems are left unsolved,
    as in `implicit_gradient`.
    """
    function(train_loss=train_loss, val_loss=val_loss)
    whole(steps=steps)
    w, hyper = stop_gradient(parameters("w", w)), leaves("hyper", hyper)
    require_tasks(w, of="w")
    val_losses = task_losses(val_loss, w, hyper)
    bars = grad(sum(val_losses), [*w, *hyper])
    w_bar, direct = bars[: len(w)], bars[len(w) :]
    g = grad(sum(task_losses(train_loss, w, hyper)), w, create_graph=True)  # one graph, walked by every product
    solution = solution_of(linear_solver, lambda v: vjp(g, w, v), w_bar, steps=steps)
    mixed = vjp(g, hyper, solution.x)  # like `direct`, a sum over tasks
    if not report:
        consequence = "w is no minimum of the training loss there"
        warn_of_negative_curvature("hypergradient: the Hessian", solution, consequence)
        warn_of_unsolved("hypergradient: ∂²L_T/∂w∂w v = ∂L_V/∂w", solution, steps)
    warn_of_numbers("hypergradient", solution)
    result = stop_gradient((mean(val_losses), [(d - m) / len(w[0]) for d, m in zip(direct, mixed)]))
    return (*result, solution) if report else result
