"""Where a training went wrong: the first number that is not finite, by its task, inner step and parameter.

One NaN in one task is a NaN in every parameter an iteration later, and then says nothing of where it came from. An
iteration computes, in this order, with k the inner step and t the task,

    θ, support, query
    φ_k,   L_s(φ_k),   ∇L_s(φ_k)        k = 0 ... K − 1     forward: the inner loop
    φ_K,   L_q(φ_K),   ∇L_q(φ_K)                            the query
    H(φ_k) v                            k = K − 1 ... 0     backward, in second order
    ∇F(θ),   θ after the outer update

and the first of these that isn't finite while all before it are is the place to mend. Looking at every one of them
would double the cost, so the loop looks at the last line only. When that is not finite, the iteration is run again,
eagerly, with a loss that looks at all that it is given and gives: `Watch`. H v it looks at afterwards, and with one v
for all steps, ∇L_q(φ_K), not with the chain's, which differs from algorithm to algorithm.

>>> import numpy as np, tinymeta as tm
>>> def root_loss(phi, data):                                 # has no derivative where prediction and target meet
...     return tm.mean(tm.sqrt((phi[0] - data) ** 2), axis=1)
>>> theta, options = [tm.Tensor([0.5])], {"alpha": 0.5, "steps": 3}
>>> support, query = np.array([[9.0], [1.5], [7.0]]), np.array([[9.0], [2.0], [7.0]])
>>> with np.errstate(all="ignore"):
...     for i in range(5):
...         result = tm.meta.maml(root_loss, theta, support, query, **options)
...         tm.meta.require_finite(f"iteration {i}", result, tm.meta.maml, root_loss, theta, support, query, **options)
...         theta, _ = tm.stop_gradient(tm.solvers.sgd(theta, result[1], lr=0.1))
Traceback (most recent call last):
FloatingPointError: iteration 0: the gradient of root_loss on the support of task 1 at inner step 2 is nan in parameter
0 of shape (1,), though the loss is finite: an op has no derivative there, as sqrt at 0: guard it by
tm.where, inside too
"""

import functools
import inspect
import warnings

import numpy as np

from ..ops import sum
from ..tensor import Tensor, grad, state, stop_gradient, vjp
from .adapt import count_tasks, name_of

SHORTER = "take a smaller inner step, or clip its gradient with rule=partial(tm.solvers.clipped, norm=...)"
GUARD = "an op has no derivative there, as sqrt at 0: guard it by tm.where, inside too"
VALUE = "the loss has no value there, as log of 0 or an exp that is too large: change its form"
OUTER = "take a smaller outer step, or clip the meta-gradient with tm.solvers.clip"


def require_finite(when, result, algorithm, /, loss, theta, support, query, *, updated=(), **options):
    """Nothing, if all of the iteration's result is finite; otherwise FloatingPointError, which says where it began.

    when: how the message opens, e.g. f"iteration {i}". result: (query loss, meta_grad, ...) of
    algorithm(loss, theta, support, query, **options), eager or compiled. updated: θ after the outer update; θ itself,
    from before it, is then the last good one. algorithm: one of tm.meta, or one that takes `batch` as they do.

    Of several places the first is named, of several tasks that of the smallest number. Where a compiled or sharded
    result is not finite, but the eager one is, this is said. Of an inner solver the points are looked at from which it
    takes a step, not the trials of a line search. Evolution strategies have no inner gradients: what is named is the
    data, a φ, or a loss of some member of the population.
    """
    if state.tape:
        raise ValueError("require_finite looks at values: call it on what the compiled function returns, outside of it")
    query_loss, meta_grad = result[:2]
    if not broken([query_loss, *meta_grad, *updated]):
        return
    if not broken([query_loss, *meta_grad]):
        i = broken(updated)[0]
        raise FloatingPointError(
            f"{when}: {holds(updated[i], i)} after the outer update, from a finite gradient: {OUTER}"
        )
    while isinstance(algorithm, functools.partial) and not algorithm.args:
        algorithm, options = algorithm.func, {**algorithm.keywords, **options}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raise FloatingPointError(f"{when}: {place(result, algorithm, loss, theta, support, query, options)}")


def place(result, algorithm, loss, theta, support, query, options):
    """The sentence that names the first number that is not finite when the iteration is run again."""
    if broken(theta):
        i = broken(theta)[0]
        return f"{holds(theta[i], i)} before the first inner step: go back to the last good θ; then {OUTER}"
    for name, array in arrays({"support": support, "query": query, **options}):
        if broken([array]):
            value, index = first(array)
            task = f" of task {index[0]}" if name.startswith(("support", "query")) else ""
            at = f" at {index}" if index else ""
            return f"{name}{task} is {value}{at}: mend it, nothing can be learned from it"
    taken = inspect.signature(algorithm).parameters
    if "batch" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise TypeError(f"{name_of(algorithm)} must take `batch` and hand it to `adapt`: it tells the inner step")
    watch = Watch(loss, theta, support, options.get("batch"))
    try:
        query_loss, meta_grad = algorithm(watch, theta, support, query, **{**options, "batch": watch.batch})[:2]
    except Broken as found:
        return str(found)
    if not broken([query_loss, *meta_grad]):
        what = [f"meta_grad[{i}]" for i in broken(result[1])] or ["the query loss"]
        return (
            f"{what[0]} is not finite, but run again eagerly all is: the numbers are at the end of {query_loss.dtype}'s"
            f" range, and rounding, which differs in a compiled or sharded function, decides: {SHORTER}; or the loss or"
            " `batch` draws random numbers, others than before"
        )
    if not broken(meta_grad):
        return f"the mean of the query losses overflows {query_loss.dtype}, though each is finite: {SHORTER}"
    i = broken(meta_grad)[0]
    return watch.backward() or (
        f"the meta-gradient is {first(meta_grad[i])[0]} in parameter {i} of shape {meta_grad[i].shape}, though all"
        " losses, gradients and Hessian-vector products are finite: the update rule has no derivative there (the root"
        " of a second moment of 0: put an ε inside it), or their product over the steps, their sum over tasks or a"
        f" square in the rule overflows {meta_grad[i].dtype}: {SHORTER}"
    )


class Broken(Exception):
    """What a Watch has found. It ends the run."""


class Watch:
    """The loss, looking at what it is given and gives; and `batch`, which is told the inner step.

    Every algorithm asks batch(support, k) for the data of step k = 0 ... K − 1, then calls the loss at φ_k. Where Leap
    and line searches come back to step k with another φ, nothing is looked at: if it is taken, it comes again. A call
    that has not asked `batch` is the query's, at φ_K; MAML++ makes one for each step, when all are done, so each φ is
    known by its last parameter. iMAML then makes one on the support itself, for the Hessian at the solution. Evolution
    strategies, whose stack is a population of several rows for every task, have no gradients to look at.
    """

    def __init__(self, loss, theta, support, batch):
        self.loss, self.support, self.batches = loss, support, batch
        self.tasks, self.size = count_tasks(support), largest(theta)
        self.announced, self.step = None, -1  # the step that the next call belongs to; the last one looked at
        self.begins = {}  # the step that begins at a φ, by the serial of its last parameter
        self.supports, self.v = [], None  # (where, φ, data) of the losses on the support; the gradient of the query's
        functools.update_wrapper(self, loss, assigned=["__name__"], updated=[])

    def batch(self, support, step):
        self.announced = step
        return self.batches(support, step) if self.batches else support

    def __call__(self, phi, data):
        k, self.announced = self.announced, None
        if k is None or k > self.step:
            self.look(k, phi, data)
        return self.loss(phi, data)

    def look(self, k, phi, data):
        """Raise Broken where φ, the loss or its gradient isn't finite; k: the inner step, None on the query."""
        before = self.begins.get(phi[-1].serial, self.step + 1) if k is None else k
        after = f"after inner step {before - 1}" if before else "before any inner step"
        phi, serial = stop_gradient(phi), phi[-1].serial
        population = len(phi[-1]) > self.tasks
        if found := self.first_task(phi):
            task, i, value = found
            finite = "" if population else ", though the gradient was finite"
            cause = "the update overflows, or divides by 0"
            raise Broken(f"φ of task {task} is {value} in {shape(phi[i], i)} {after}{finite}: {cause}; {SHORTER}")
        on, at = ("query", after) if k is None else ("support", f"at inner step {k}")
        if data is self.support and self.v:
            on, at = "support", "at the solution of the inner problem"
        if k is not None:
            self.step, self.begins[serial] = k, k
        for name, array in arrays(data, f"the data of the {on} {at}"):
            if broken([array]):
                raise Broken(f"{name} is {first(array)[0]}: mend `batch`, for support and query are finite")
        losses, of = self.loss(phi, data), f"{name_of(self.loss)} on the {on} of task"
        if found := self.first_task([losses]):
            task, _, value = found
            raise Broken(f"{of} {task} is {value} {at}, though φ is finite: {self.remedy(phi, VALUE)}")
        if population:
            return
        g = grad(sum(losses), phi)
        if found := self.first_task(g):
            task, i, value = found
            place = f"the gradient of {of} {task} {at} is {value} in {shape(g[i], i)}"
            raise Broken(f"{place}, though the loss is finite: {self.remedy(phi, GUARD)}")
        if on == "query":
            self.v = g
        else:
            self.supports.append((at, phi, data))

    def backward(self):
        """The sentence on the first H v that isn't finite, from the last step on, v = ∇L_q(φ_K); None if all are."""
        for at, phi, data in reversed(self.supports):
            g = grad(sum(self.loss(phi, data)), phi, create_graph=True)
            h_v = vjp(g, phi, self.v)
            if found := self.first_task(h_v):
                task, i, value = found
                place = f"{name_of(self.loss)} on the support of task {task} {at} is {value} in {shape(h_v[i], i)}"
                finite = f"though losses and gradients are finite: {self.remedy(phi, GUARD)}"
                return f"the second derivative H v of {place}, {finite}"

    def remedy(self, phi, otherwise):
        """By whether φ has left the range of θ."""
        size = largest(phi)
        far = size > 1e3 * (self.size + 1)
        return f"φ has elements of {size:.1e}, θ of {self.size:.1e}; {SHORTER}" if far else otherwise

    def first_task(self, stacks):
        """(task, i, value) of the first task that isn't finite, in its first such parameter i; None if all are.

        A population's stack has several rows for every task.
        """
        found = [(i, *first(stacks[i])) for i in broken(stacks)]
        return min(((index[0] * self.tasks // len(stacks[i]), i, value) for i, value, index in found), default=None)


# ---- what is finite --------------------------------------------------------------------------------------------------


def broken(xs):
    """The positions of arrays that are not finite."""
    return [i for i, x in enumerate(xs) if (a := bare(x)).dtype.kind in "fc" and not np.isfinite(a).all()]


def bare(x):
    return x.data if isinstance(x, Tensor) else np.asarray(x)


def first(x):
    """(value, index) of the first element that is not finite."""
    a = bare(x)
    index = tuple(np.argwhere(~np.isfinite(a))[0].tolist())
    return a[index].item(), index


def largest(xs):
    return max(float(np.abs(x.data).max(initial=0)) for x in xs)


def arrays(nested, name=""):
    """(name, array) of every array and number in nested dicts, lists and tuples."""
    if isinstance(nested, dict):
        for key, value in nested.items():
            yield from arrays(value, f"{name}[{key!r}]" if name else key)
    elif isinstance(nested, (list, tuple)):
        for i, value in enumerate(nested):
            yield from arrays(value, f"{name}[{i}]")
    elif isinstance(nested, (Tensor, np.ndarray, float)):
        yield name, nested


def shape(x, i):
    return f"parameter {i} of shape {x.shape[1:]}"


def holds(t, i):
    return f"theta[{i}] of shape {t.shape} holds {first(t)[0]}"
