"""The inner loop, on all tasks of a meta-batch at once.

Tasks are the first axis. Every array of a meta-batch carries it, the adapted parameters φ too:

    theta[i]: shape               shared meta-parameters θ
    phi[i]:   (tasks, *shape)     each task's own φ; before the first step a view of θ, nothing is copied
    loss(phi, data) -> (tasks,)   each task's loss on its part of the data

What all algorithms take: loss as above, any function of parameters and data made of tm ops; theta, a list of Tensors;
support and query, arrays or nested tuples, lists and dicts of arrays, whose first axes agree, and which reach `loss` as
they are. What they return: (query loss, meta_grad), means over tasks, all leaves; meta_grad is what an outer optimiser
subtracts. θ itself is never changed. Another kind of thing raises TypeError, what doesn't fit ValueError, by its name.
"""

from .. import solvers
from ..arguments import describe, function, items, whole
from ..ops import broadcast_to
from ..solvers import gradient_descent, like, of_tasks, parameters, sgd, step_sizes
from ..tensor import Tensor, ancestors, stop_gradient


def adapt(loss, theta, support, *, alpha, steps, create_graph=False, batch=None, rule=sgd, solve=None):
    """φ ← φ − α ∇L_s(φ) from φ = θ, `steps` times, for every task: returns φ, stacked over tasks.

    alpha: the step size: a number, or a list with one for each parameter, numbers or Tensors.
    create_graph=True: φ is a differentiable function of θ. Otherwise φ is a leaf.
    batch(support, step): the data of that step, for inner minibatches; the whole support by default.
    rule: the update, one of tm.solvers' sgd, momentum, nesterov, adam, started afresh.
    solve: solve(objective, phi, lr=alpha, steps=steps) -> phi takes the place of these steps, for φ as a leaf; e.g.
    partial(tm.solvers.hessian_free, cg_steps=5). objective(phi, step) -> (tasks,); for one of your own see `imaml`.
    """
    if solve is not None and rule is not sgd:
        raise ValueError("adapt: solve takes the place of the steps, and so of their rule; leave one of them out")
    if create_graph and solve is not None:
        raise ValueError("adapt: create_graph=True differentiates gradient descent's steps; leave solve out")
    whole(steps=steps)
    objective, phi = inner_problem(loss, theta, support, batch, alpha, rule)
    if solve is not None:
        function(solve=solve)
        found = solve(objective, stop_gradient(phi), lr=alpha, steps=steps)
        return like("what solve returned", map(Tensor, items("what solve returned", found)), phi)
    phi = phi if create_graph else stop_gradient(phi)
    return gradient_descent(objective, phi, lr=alpha, steps=steps, rule=rule, create_graph=create_graph)


def trajectory(loss, theta, support, *, alpha, steps, create_graph=False, cut=0, batch=None, rule=sgd):
    """The φ of `adapt` one after the other, steps + 1 of them; create_graph, cut: see tm.solvers.trajectory."""
    objective, phi = inner_problem(loss, theta, support, batch, alpha, rule)
    options = {"steps": steps, "rule": rule, "create_graph": create_graph, "cut": cut}
    return solvers.trajectory(objective, phi, lr=alpha, **options)


def inner_problem(loss, theta, support, batch, alpha, rule):
    """(the loss on the data of a step, θ viewed as a stack over tasks): where all inner solvers start."""
    theta, tasks = parameters("theta", theta), count_tasks(support)
    function(loss=loss, rule=rule)
    step_sizes("alpha", alpha, len(theta))

    def support_loss(phi, step):
        return task_losses(loss, phi, of_step(support, batch, step))

    return support_loss, [broadcast_to(t, (tasks, *t.shape)) for t in theta]


def of_step(support, batch, step):
    """The data of an inner step, which all tasks must still be in: one task's would be broadcast to all."""
    if batch is None:
        return support
    function(batch=batch)
    data, tasks = batch(support, step), count_tasks(support)
    found = count_tasks(data, of="a batch")
    if found != tasks:
        raise ValueError(
            f"batch(support, {step}) has {found} tasks, support {tasks}: the first axis is the tasks',"
            " a minibatch is taken from the next, e.g. a[:, step]"
        )
    return data


def check(theta, support, query):
    """θ as a list of leaves; θ and data checked to be what every algorithm takes.

    A θ with a history is refused: if the graph of its updates hung on it, an outer loop would never free any.
    """
    require_tasks(support, query)
    return leaves("theta", theta)


def require_tasks(*data, of="support and query"):
    if not count_tasks(*data, of=of):
        raise ValueError(f"{of} have no tasks: the first axis of their arrays has size 0")


def leaves(name, xs):
    """xs as a list of leaves; ValueError where one has a history."""
    xs = parameters(name, xs)
    for i, x in enumerate(xs):
        if x.inputs:
            raise ValueError(
                f"{name}[{i}] is the result of {x.op} and would keep all that it was computed from: cut it, and the"
                f" optimiser's state too, with {name}, state = tm.stop_gradient(({name}, state))"
            )
    first = {x.serial: i for i, x in reversed(list(enumerate(xs)))}
    return [x if first[x.serial] == i else stop_gradient(x) for i, x in enumerate(xs)]  # given twice, it is two


def task_losses(loss, phi, data, theta=()):
    """loss(phi, data), which must be one number per task and depend on φ; but not on θ itself, where that is given."""
    function(loss=loss)
    losses = of_tasks(loss(phi, data), phi, name_of(loss))
    if not any(z is p for z in ancestors([losses], phi) for p in phi):
        raise ValueError(
            f"{name_of(loss)} does not depend on any parameter, so there is nothing to learn: does it use the"
            " parameters that it is given, and tm ops all the way (no .data, .item, stop_gradient, compiled function)?"
        )
    if theta and any(z is t for z in ancestors([losses], theta) for t in theta):
        raise ValueError(
            f"{name_of(loss)} depends on theta itself, beside the parameters that it is given, and this algorithm would"
            " leave that out: use tm.meta.maml, or a constant tm.stop_gradient(theta) in the loss"
        )
    return losses


def name_of(loss):
    return getattr(loss, "__name__", "the loss")


def count_tasks(*data, of="support and query"):
    """The size of the first axis, which all arrays in nested data share."""
    arrays, todo = [], list(data)
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            todo.extend(part.values())
        elif isinstance(part, (list, tuple)):
            todo.extend(part)
        else:
            arrays.append(part)
    sizes = {getattr(a, "shape", None) and a.shape[0] for a in arrays}
    if len(sizes) != 1 or sizes & {None, ()}:
        found = ", ".join(describe(a) for a in reversed(arrays)) or "nothing"
        raise ValueError(f"all arrays of {of} must have the tasks as their first axis; found {found}")
    return sizes.pop()
