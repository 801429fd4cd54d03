"""ANIL, almost no inner loop (Raghu et al. 2020): MAML whose inner steps move the head of the network only.

    θ = [*body, *head]
    h₀ = head,   h_{j+1} = h_j − α ∂L_s(body, h_j)/∂h           the inner loop
    F(θ) = mean over tasks of L_q(body, h_K)                    the objective

All tasks share the body: it stays where it is in the inner loop, and the outer one learns it. Its meta-gradient has two
parts: one straight from the query loss, the other by way of the head, for h_K depends on the features of the support.
First order has the first part only.
"""

from ..arguments import whole
from ..ops import broadcast_to, mean
from ..solvers import sgd
from ..tensor import grad, stop_gradient
from .adapt import check, count_tasks, task_losses, trajectory


def anil(loss, theta, support, query, *, alpha, steps, head, first_order=False, batch=None, rule=sgd):
    """(query loss, ∇F(θ)). head: how many of the last parameters adapt: 2, a weight and a bias, in tm.nn's networks.

    head = len(theta) is MAML; head = 0 leaves nothing to adapt, which is the plain gradient of the query loss.
    The loss gets all parameters as stacks over tasks, as ever; those of the body are views of θ, and nothing is copied.
    Eagerly the features of the support are computed in every inner step; a compiled function computes them once.
    At test, `adapt` with the loss lambda phi, data: loss([*tm.stop_gradient(phi[:-head]), *phi[-head:]], data).
    batch, rule: see `adapt`. Raises ValueError unless 0 ≤ head ≤ len(theta).
    """
    theta, tasks = check(theta, support, query), count_tasks(support)
    whole(steps=steps, head=head)
    if head > len(theta):
        raise ValueError(f"head is how many of theta's {len(theta)} parameters adapt, from the last on; got {head}")
    body = [broadcast_to(t, (tasks, *t.shape)) for t in theta[: len(theta) - head]]

    def head_loss(phi, data):
        return task_losses(loss, body + phi, data)

    phi = []
    if head:
        options = {"alpha": alpha, "steps": steps, "batch": batch, "rule": rule, "create_graph": not first_order}
        *_, phi = trajectory(head_loss, theta[-head:], support, **options)
    query_loss = mean(task_losses(loss, body + phi, query))
    return stop_gradient((query_loss, grad(query_loss, theta)))
