"""Solvers: update rules, gradient descent and Hessian-free steps; linear systems. Pure functions on lists of Tensors.

An update rule, (params, grads, state, lr=...) -> (params, state), serves the inner loop, where it is differentiated
like any other computation, and the outer one, where the caller cuts the graph between two steps:

    theta, state = stop_gradient(adam(theta, meta_grad, state, lr=beta))

Without that cut θ and state would keep the graph of all updates before them, and memory would grow. `state` is None at
the first step; whoever wants a fresh optimiser passes None again. Nothing is kept anywhere else. `lr`, the η
below and the algorithms' α, is a number or a Tensor, or a list of them, one for each parameter.
"""

import builtins
from collections import deque
from typing import NamedTuple

import numpy as np

from .arguments import FLOATS, describe, finite, function, items, whole
from .ops import abs, equal, greater, less, less_equal, logical_not, max, reshape, sqrt, stack, sum, where
from .tensor import Tensor, apply, grad, stop_gradient, stopped, vjp

# ---- lists of parameters ---------------------------------------------------------------------------------------------


def parameters(name, xs):
    """A list of one or more Tensors of floats, or an error that says what it is instead."""
    xs = items(name, xs)
    if not xs:
        raise ValueError(f"{name} is empty: it is a list of one or more Tensors")
    for i, x in enumerate(xs):
        if not isinstance(x, Tensor) or x.data.dtype not in FLOATS:
            raise TypeError(f"{name}[{i}] is {describe(x)}: parameters are Tensors of floats, e.g. tm.Tensor(array)")
    return xs


def alongside(params, **lists):
    """[params, *lists], all as lists of Tensors of one length."""
    params = parameters("params", params)
    for name, xs in lists.items():
        lists[name] = [Tensor(x) for x in items(name, xs)]
        if len(lists[name]) != len(params):
            raise ValueError(f"{len(params)} parameters but {len(lists[name])} {name}: there must be one for each")
        lists[name] = parameters(name, lists[name])
    return [params, *lists.values()]


def like(name, xs, params):
    """xs, which a function of the caller's has returned, checked to be Tensors shaped like params."""
    xs = parameters(name, xs)
    shapes, expected = [x.shape for x in xs], [p.shape for p in params]
    if shapes != expected:
        raise ValueError(f"{name} has shapes {shapes}, expected {expected}")
    for i, (x, p) in enumerate(zip(xs, params)):
        if x.dtype != p.dtype:
            raise TypeError(f"{name} has {describe(x)} as parameter {i}, expected {p.dtype}")
    return xs


def step_sizes(name, sizes, count):
    """A list with a step size for each of `count` parameters: finite numbers, or Tensors, whose values are data."""
    given = sizes if isinstance(sizes, (list, tuple)) else [sizes]
    if given is sizes and len(sizes) != count:
        raise ValueError(f"{count} parameters but {len(sizes)} step sizes in {name}: give one for each, or a number")
    for size in given:
        if not isinstance(size, (Tensor, np.ndarray)) or type(size) is np.ndarray and not size.shape:
            finite(**{name: size})
        elif size.dtype.kind not in "iuf":
            raise TypeError(f"{name} must be a number or a Tensor of floats, got {describe(size)}")
    return sizes if given is sizes else given * count


# ---- stacks over tasks -----------------------------------------------------------------------------------------------


def per_task(a, like):
    """A number per task, (tasks,), so shaped that it multiplies (tasks, ...)."""
    a = Tensor(a)
    if not isinstance(like, (Tensor, np.ndarray)) or a.shape != like.shape[:1]:
        raise ValueError(f"per_task takes (tasks,) and (tasks, ...), got {a.shape} and {describe(like)}")
    return reshape(a, (len(a),) + (1,) * (like.ndim - 1))


def dot(xs, ys):
    """⟨x, y⟩ of each task: two lists of (tasks, ...) -> (tasks,)."""
    xs, ys, total = parameters("xs", xs), parameters("ys", ys), 0
    if [x.shape for x in xs] != [y.shape for y in ys]:
        raise ValueError(f"dot of shapes {[x.shape for x in xs]} and {[y.shape for y in ys]}: they must be alike")
    for x, y in zip(xs, ys):
        total = total + sum(x * y, axis=tuple(range(1, x.ndim)))
    return total


def largest(xs):
    """The largest |element| of each task over a list of (tasks, ...), 0 of none: (tasks,)."""
    rows = [reshape(max(abs(x), axis=tuple(range(1, x.ndim))), -1) for x in xs if 0 not in x.shape[1:]]
    return max(stack(rows), axis=0) if rows else Tensor(np.zeros(len(xs[0]), xs[0].dtype))


# ---- update rules ----------------------------------------------------------------------------------------------------


def step(params, lr, directions):
    """p − η d for each, which must not change a shape: a bias minus a wider d would grow by broadcasting."""
    lrs = step_sizes("lr", lr, len(params))
    moved = [p - lr * d for p, lr, d in zip(params, lrs, directions)]
    for i, (p, d, lr, new) in enumerate(zip(params, directions, lrs, moved)):
        if not p.shape == d.shape == new.shape:
            raise ValueError(
                f"parameter {i} of shape {p.shape} would become {new.shape} by {describe(lr)}, times {describe(d)}:"
                " gradient, state, lr must fit"
            )
    return moved


def sgd(params, grads, state=None, *, lr):
    """p ← p − η g"""
    params, grads = alongside(params, grads=grads)
    return step(params, lr, grads), None


def with_momentum(params, grads, state, mu):
    finite(mu=mu)
    if state is None:
        params, grads = alongside(params, grads=grads)
        return params, grads, grads
    params, grads, state = alongside(params, grads=grads, state=state)
    return params, grads, [mu * v + g for v, g in zip(like("state", state, params), grads)]


def momentum(params, grads, state=None, *, lr, mu=0.9):
    """v ← μ v + g,   p ← p − η v        (Polyak's heavy ball)"""
    params, grads, v = with_momentum(params, grads, state, mu)
    return step(params, lr, v), v


def nesterov(params, grads, state=None, *, lr, mu=0.9):
    """v ← μ v + g,   p ← p − η (g + μ v)

    Nesterov's accelerated gradient in the form that takes the gradient at the point it returns: p is already looked
    ahead along v (Sutskever et al. 2013).
    """
    params, grads, v = with_momentum(params, grads, state, mu)
    return step(params, lr, [g + mu * v for g, v in zip(grads, v)]), v


def adam(params, grads, state=None, *, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   p ← p − η m̂ / √(v̂ + ε²),   m̂ = m / (1 − β₁ᵗ), v̂ likewise

    ε stands inside the root (Kingma and Ba 2015 add it outside): √v̂ has no derivative at v̂ = 0, where every unit that
    gets no gradient is, and the meta-gradient through an inner Adam would be NaN. There the first step's derivative is
    −η / ε: finite, but large.
    """
    finite(0, beta1=beta1, beta2=beta2, eps=eps)
    if not (beta1 < 1 and beta2 < 1):
        raise ValueError(f"beta1 and beta2 must be below 1, got {beta1} and {beta2}")
    params, grads = alongside(params, grads=grads)
    if state is None:
        t, m, v = Tensor(np.zeros((), params[0].dtype)), [0.0] * len(grads), [0.0] * len(grads)
    elif isinstance(state, (list, tuple)) and len(state) == 3:
        t, (_, m, v) = Tensor(state[0]), alongside(params, **{"state's m": state[1], "state's v": state[2]})
        m, v = like("state's m", m, params), like("state's v", v, params)
    else:
        raise TypeError(f"state is what adam has returned, (t, m, v), or None at the first step; got {describe(state)}")
    t = t + 1
    m = [beta1 * m + (1 - beta1) * g for m, g in zip(m, grads)]
    v = [beta2 * v + (1 - beta2) * (g * g) for v, g in zip(v, grads)]
    m_unbias, v_unbias = 1 / (1 - beta1**t), 1 / (1 - beta2**t)
    return step(params, lr, [m_unbias * m / sqrt(v_unbias * v + eps**2) for m, v in zip(m, v)]), (t, m, v)


def update(rule, params, grads, state, lr):
    """rule(params, grads, state, lr=lr), checked to be (params, state)."""
    result = rule(params, grads, state, lr=lr)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"the rule returned {describe(result)}, expected a tuple (params, state)")
    return like("what the rule returned", result[0], params), result[1]


def clip(grads, norm, *, stacked=False):
    """g ← g · min(1, c / ‖g‖), c = norm, ‖g‖ over all parameters together (Pascanu et al. 2013): a list like grads.

    The direction stays, the length is c at most. stacked=True: grads are (tasks, ...), and each task has a ‖g‖ and a
    factor of its own, which no other task's gradient enters. Differentiable like all else; with u = g / ‖g‖ the
    derivative of a clipped g is (c / ‖g‖) (I − u uᵀ), of one that is not clipped I, and I too at the kink ‖g‖ = c. A
    gradient that isn't finite comes out as it went in: clipping prevents a NaN, and hides none.
    """
    finite(positive=True, norm=norm)
    grads = parameters("grads", grads)
    if not stacked:
        return [g[0] for g in clip([reshape(g, (1, *g.shape)) for g in grads], norm, stacked=True)]
    unit = largest(grads)  # ‖g‖ = unit · ‖g / unit‖ for any unit: a constant
    unit = apply(stopped, where(greater(unit, norm), unit, norm))
    scaled = [g / per_task(unit, g) for g in grads]  # 1 at most, so that no square overflows in float32
    square = dot(scaled, scaled)
    long = greater(sqrt(square), norm / unit)  # false for NaN
    factor = norm / sqrt(where(long, square, 1))  # √ has no derivative at a gradient of 0
    return [where(per_task(long, g), per_task(factor, s) * s, g) for g, s in zip(grads, scaled)]


def clipped(params, grads, state=None, *, lr, norm, rule=sgd):
    """`rule` on gradients clipped to `norm`, each task's own: an update rule for the inner loop's stacks.

    adapt(..., rule=partial(tm.solvers.clipped, norm=10.0)), and of another rule partial(clipped, norm=10.0, rule=adam).
    In the outer loop, where there are no tasks, clip itself: sgd(theta, clip(meta_grad, 10.0), lr=beta).
    """
    function(rule=rule)
    params, grads = alongside(params, grads=grads)
    return update(rule, params, clip(grads, norm, stacked=True), state, lr)


# ---- linear systems, one per task ------------------------------------------------------------------------------------


class Solution(NamedTuple):
    """What `cg` and `neumann` return: x is a list like b; the others have one entry per task."""

    x: list
    residual: Tensor  # ‖b − A x‖ as the iteration carries it along; if A is ill-conditioned the true one is larger
    iterations: Tensor
    negative_curvature: Tensor  # True: pᵀA p ≤ 0 was met (neumann: rᵀA r < 0), so A is not positive definite
    relative_residual: Tensor  # ‖b − A x‖ / ‖b‖, 1 if x is no better than 0; where b = 0, the residual itself
    unconverged: Tensor  # True: cg left more than a tenth of b, or neumann more than it began with


def checked(name, matvec, b, steps):
    """(matvec, its result checked; b as a list)."""
    whole(steps=steps)
    function(matvec=matvec)
    if isinstance(b, (Tensor, np.ndarray)) or not hasattr(b, "__iter__"):
        raise TypeError(f"{name} needs b as a list of Tensors (tasks, ...), got {describe(b)}")
    b = parameters("b", map(Tensor, b))
    shapes = [b_i.shape for b_i in b]
    if len({shape[:1] for shape in shapes} | {()}) != 2:
        raise ValueError(f"{name}: b has shapes {shapes}, expected (tasks, ...) with one number of tasks")

    def product(v):
        result = matvec(v)
        result = [Tensor(a) for a in result] if isinstance(result, (list, tuple)) else result
        if not isinstance(result, list) or [a.shape for a in result] != shapes:
            found = [a.shape for a in result] if isinstance(result, list) else describe(result)
            raise ValueError(f"{name}: b has shapes {shapes}, matvec(v) of such a v has {found}")
        return like("what matvec returned", result, b)

    return product, b


def size(b):
    """‖b‖ of each task, 1 where b = 0."""
    square = dot(b, b)
    return sqrt(where(greater(square, 0), square, 1))


def cg(matvec, b, *, steps, x0=None, tol=1e-10):
    """Solve A x = b by conjugate gradients (Hestenes and Stiefel 1952), for a stack of tasks with an A each.

        a = rᵀr / pᵀA p,   x ← x + a p,   r⁺ = r − a A p,   p ← r⁺ + (r⁺ᵀr⁺ / rᵀr) p        from p = r = b − A x

    matvec(v) -> A v and b are lists of (tasks, ...); A is symmetric, and met only in these products. x0: the start,
    zero by default; a product more gives its residual. Always `steps` products are made. A task keeps its solution once
    ‖b − A x‖ ≤ tol ‖b‖, or that of rounding; one that meets negative curvature stops at its last iterate and says so.
    Any other with a residual above ‖b‖/10 (and tol ‖b‖) at the end is called unconverged: where A has no eigenvalue
    below 1, as iMAML's I + H/λ of a convex loss, ‖x − A⁻¹b‖ ≤ ‖b − A x‖, and what passes is wrong by ‖b‖/10 at most.
    The result is a leaf.
    """
    finite(0, tol=tol)
    product, b = checked("cg", matvec, b, steps)
    # A is linear: with the largest element of each task's b as the unit, no square under- or overflows in float32.
    unit = largest(b)
    unit = where(greater(unit, 0), unit, 1)
    b = [b_i / per_task(unit, b_i) for b_i in b]
    if x0 is None:
        x, r = [Tensor(np.zeros_like(b_i.data)) for b_i in b], b
    else:
        x = [Tensor(x_i) / per_task(unit, b_i) for x_i, b_i in zip(like("x0", map(Tensor, items("x0", x0)), b), b)]
        r = [b_i - a_i for b_i, a_i in zip(b, product(x))]
    tol = builtins.max(tol, np.finfo(b[0].dtype).eps)
    p, rr, enough = r, dot(r, r), tol**2 * dot(b, b)
    negative, iterations = Tensor(np.zeros(rr.shape, bool)), Tensor(np.zeros(rr.shape, np.int64))
    for _ in range(steps):
        ap = product(p)
        pap = dot(p, ap)
        active = greater(rr, enough) & logical_not(negative)
        negative = negative | (active & less_equal(pap, 0))
        active = active & greater(pap, 0)
        a = where(active, rr / where(active, pap, 1), 0)  # 0: the task stays where it is
        x = [x_i + per_task(a, x_i) * p_i for x_i, p_i in zip(x, p)]
        r = [r_i - per_task(a, r_i) * ap_i for r_i, ap_i in zip(r, ap)]
        rr, rr_before = dot(r, r), rr
        beta = where(active, rr / where(active, rr_before, 1), 0)
        p = [r_i + per_task(beta, r_i) * p_i for r_i, p_i in zip(r, p)]
        iterations = iterations + active.astype(np.int64)
        x, r, p, rr, negative, iterations = stop_gradient((x, r, p, rr, negative, iterations))
    x, residual = [x_i * per_task(unit, x_i) for x_i in x], sqrt(rr)
    unconverged = greater(rr, builtins.max(tol, 0.1) ** 2 * dot(b, b)) & logical_not(negative)
    return Solution(*stop_gradient((x, residual * unit, iterations, negative, residual / size(b), unconverged)))


def neumann(matvec, b, *, steps, eta, x0=None):
    """Σ_{j < steps} (I − η A)ʲ η b, the first terms of the Neumann series of A⁻¹ b, for tasks with an A each.

        x ← x + η r,   r ← r − η A r        from x = 0, r = b: Richardson's iteration

    It converges if all eigenvalues of η A lie in (0, 2): η < 2 over the largest. CG gets farther with as many products
    and needs no η; the series is what back-propagation through `steps` gradient steps of size η computes when these
    are taken at the solution (Lorraine et al. 2020). matvec, b, x0 and the result: as for `cg`; no task stops early.
    A series may be cut on purpose: unconverged are tasks whose residual has grown, for which η is too large.
    """
    finite(positive=True, eta=eta)
    product, b = checked("neumann", matvec, b, steps)
    if x0 is None:
        x, r = [Tensor(np.zeros_like(b_i.data)) for b_i in b], b
    else:
        x = like("x0", map(Tensor, items("x0", x0)), b)
        r = [b_i - a_i for b_i, a_i in zip(b, product(x))]
    before = sqrt(dot(r, r))
    negative, iterations = Tensor(np.zeros(before.shape, bool)), Tensor(np.full(before.shape, steps, np.int64))
    for _ in range(steps):
        ar = product(r)
        negative = negative | less(dot(r, ar), 0)
        x = [x_i + eta * r_i for x_i, r_i in zip(x, r)]
        r = [r_i - eta * ar_i for r_i, ar_i in zip(r, ar)]
        x, r, negative = stop_gradient((x, r, negative))
    residual = sqrt(dot(r, r))
    grown = greater(residual, before) & logical_not(negative)
    return Solution(*stop_gradient((x, residual, iterations, negative, residual / size(b), grown)))


def solution_of(linear_solver, matvec, b, **options):
    """linear_solver(matvec, b, **options), checked to be a Solution shaped like b."""
    function(linear_solver=linear_solver)
    solution = linear_solver(matvec, b, **options)
    if not isinstance(solution, Solution):
        raise TypeError(f"linear_solver returned {describe(solution)}, expected a tm.solvers.Solution")
    like("linear_solver's x", solution.x, b)
    return solution


# ---- inner problems, one per task ------------------------------------------------------------------------------------


def of_tasks(losses, phi, name="the loss"):
    """What a loss has returned, checked to be one number for each task of the stack φ."""
    if not isinstance(losses, Tensor) or losses.dtype not in FLOATS or losses.shape != phi[0].shape[:1]:
        raise ValueError(
            f"{name} returned {describe(losses)}, expected a Tensor of floats of shape {phi[0].shape[:1]}, one loss"
            " per task: reduce over examples and features, not over the first axis"
        )
    return losses


def gradient_descent(loss, phi, *, lr, steps, rule=sgd, create_graph=False):
    """φ ← rule(φ, ∇loss(φ, step)) for step = 0 ... steps − 1, on every task of a stack at once.

    loss(phi, step) -> (tasks,). Tasks don't interact, so the gradient of the sum of their losses with respect to the
    stacked φ is each task's own gradient. With create_graph=True the result can be differentiated through all steps,
    whose graphs are therefore kept; otherwise φ is a leaf after every step, and memory doesn't grow with `steps`.
    """
    options = {"create_graph": create_graph, "cut": 0 if create_graph else steps}
    return deque(trajectory(loss, phi, lr=lr, steps=steps, rule=rule, **options), maxlen=1).pop()  # keeps the last φ


def trajectory(loss, phi, *, lr, steps, rule=sgd, create_graph=False, cut=0):
    """The φ of `gradient_descent` one after the other: a generator of steps + 1 lists, from the start on.

    cut: after each of the first `cut` steps φ and the rule's state become leaves, as if they were constants.
    create_graph: whether the gradients of the other steps are differentiable. If not, φ is still a function of start
    and step sizes, with the gradients as constants.
    """
    whole(steps=steps, cut=cut)
    function(loss=loss, rule=rule)
    own = lambda phi: [p[...] for p in phi]  # new nodes: a rule may return one twice, or an old one, far down the graph
    phi, state = parameters("phi", phi), None
    if steps:
        phi = stop_gradient(phi) if cut else own(phi)
    yield phi
    for k in range(steps):
        g = grad(sum(of_tasks(loss(phi, k), phi)), phi, create_graph=create_graph and k >= cut)
        phi, state = update(rule, phi, g, state, lr)
        if k >= cut and not all(p.inputs for p in phi):
            raise ValueError(
                "the rule returned a leaf, from which no gradient gets back to the start: write the rule in tm ops"
                " alone, without .data, stop_gradient or a compiled function"
            )
        phi, state = stop_gradient((phi, state)) if k < cut else (own(phi), state)
        yield phi


def hessian_free(loss, phi, *, lr=1.0, steps, cg_steps, halvings=10):
    """φ ← φ + t d,   d ≈ −H⁻¹∇loss(φ),   on every task of a stack at once (Martens 2010).

    The Newton direction d comes from `cg_steps` of conjugate gradients, which need products H v alone. Where CG meets
    negative curvature, d is its last iterate, or −∇loss if that was at its first step; either way d points downhill.
    t is each task's first of lr, lr/2, ... lr/2^halvings that brings enough,

        loss(φ + t d) ≤ loss(φ) + 10⁻⁴ t ⟨∇loss(φ), d⟩        (Armijo 1966)

    and 0 if none does, so no step ever raises a task's loss, but for its rounding: 4 ε |loss| more is let pass, or the
    line search would end in the noise at √ε from the minimum. Every step makes halvings + 1 trials of all tasks.
    A task whose loss, gradient, d or ⟨∇loss, d⟩ isn't finite has no step, and its φ becomes NaN.
    loss: as in `gradient_descent`. Martens's products are with the Gauss-Newton matrix and damped; here H is the
    Hessian, and the pull of iMAML's objective its damping. φ is a leaf.
    """
    whole(steps=steps)
    whole(cg_steps=cg_steps, halvings=halvings)
    finite(positive=True, lr=lr)
    function(loss=loss)
    phi = stop_gradient(parameters("phi", phi))
    for k in range(steps):
        before = of_tasks(loss(phi, k), phi)
        g = grad(sum(before), phi, create_graph=True)  # one graph, walked by every product
        downhill = stop_gradient([-g_i for g_i in g])
        newton = cg(lambda v, g=g, phi=phi: vjp(g, phi, v), downhill, steps=cg_steps)
        at_once = equal(newton.iterations, 0)
        d = [where(per_task(at_once, x_i), d_i, x_i) for d_i, x_i in zip(downhill, newton.x)]
        rounding = 4 * np.finfo(before.dtype).eps * abs(before)
        bound, slope, t = stop_gradient(before + rounding), -dot(downhill, d), lr
        sound = less(abs(before), np.inf) & less(abs(slope), np.inf) & less(newton.residual, np.inf)
        lost = logical_not(sound)  # no trial of such a task is enough, or none is right: it must not look solved
        phi = stop_gradient([where(per_task(lost, p), np.nan, p) for p in phi])
        found = Tensor(np.zeros(bound.shape, bool))
        for _ in range(halvings + 1):
            trial = stop_gradient([p + t * d_i for p, d_i in zip(phi, d)])
            enough = less_equal(of_tasks(loss(trial, k), trial), bound + 1e-4 * t * slope)
            first = enough & logical_not(found)  # a task that has moved ignores its later trials
            phi = [where(per_task(first, p), trial_i, p) for trial_i, p in zip(trial, phi)]
            found, t = found | enough, t / 2
            phi, found = stop_gradient((phi, found))  # or all trials' graphs would be kept
    return phi
