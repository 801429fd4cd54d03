"""`check_grads`: every derivative of a function, of any order, against finite differences; and who is to blame."""

from typing import NamedTuple

import numpy as np

from .arguments import FLOATS, describe, finite, function, items, whole
from .tensor import Tensor, between, graph, op_name, stop_gradient, stopped, vjp

STEP = 6e-6  # ∛ε of float64, where a central difference is most exact; times |x| where that is larger than 1
FINER = (1, 1 / 30, 1 / 1000)  # where it is too coarse
NEAR = 1e-3  # from 0: there a step in proportion is tried too, for log and √

# What is allowed beside tol. Rounding: what that of the largest value can do to a difference. Spread: how much halving
# the step changes the difference, which mostly shows that it did less.
SPREADS = 10  # one may be small by chance
UNSEEN = 0.3  # roundings that it may not show
ROUNDINGS = 10  # at most: a larger spread is no rounding
CANCELLED = 100  # ε of the largest value, left in the analytic derivative where terms cancel

# A kink: the slopes on the two sides differ, or the slope changes when the step is halved.
SMOOTH = 0.2  # that difference over the one at ten times the step: 0.1 in a smooth function, 1 at a kink
GAP = 100  # times what is allowed, since slopes of one side are rough
BEND = 0.3  # of the slope


class GradientError(AssertionError):
    """An analytic derivative differs from the finite difference."""


class KinkError(GradientError):
    """The difference jumps from one side of the point to the other: no step tells what the derivative should be."""


class Wrong(NamedTuple):
    """An element of an analytic derivative that differs from the finite difference."""

    error: float  # in units of what is allowed
    i: int  # the input
    index: tuple
    step: float
    analytic: float
    numeric: float
    kink: bool  # the differences to the left and to the right, or with ever smaller steps, don't agree

    def __str__(self):
        return f"analytic {self.analytic:.9g}, numeric {self.numeric:.9g}, step {self.step:.1e}"


def check_grads(f, xs, *, order=2, tol=1e-6, seed=0):
    """Check the derivatives of f(*xs), a Tensor or a list of them, up to `order` against central differences.

    Order 1 compares (∂y/∂x)ᵀ ȳ, for a random ȳ, with the difference of ⟨y, ȳ⟩ in every element of every x. The next
    order does the same to the function (xs, ȳ) ↦ (∂y/∂x)ᵀ ȳ, analytic as it is, and so on: so each order is checked
    in the inputs and in the cotangents. Float64 only: the noise of float32 would pass for an error, or hide one.

    xs: a list of arrays or Tensors. tol: largest error allowed, relative to the largest derivative with respect to the
    same x, beside the rounding that the differences show: an error that drowns in the rounding of a larger value is
    not found.
    Returns the largest error found in each order, relative likewise.
    Raises GradientError with the order, the worst index, both values, the step, and the first op whose own pullback is
    wrong; KinkError if all that is wrong lies at a kink (of relu, max, abs, ...); TypeError and ValueError for inputs
    that are not float64, and for an f that is not finite, or not the same when called twice.
    """
    function(f=f)
    whole(1, order=order)
    whole(seed=seed)
    finite(positive=True, tol=tol)
    xs = [Tensor(x) for x in items("xs", xs)]
    for i, x in enumerate(xs):
        if x.dtype != np.float64:
            raise TypeError(f"check_grads: xs[{i}] is {describe(x)}; finite differences need float64")
    rng, errors = np.random.default_rng(seed), []
    for k in range(1, order + 1):
        ys = outputs(f, xs)
        if not ys or not all(np.isfinite(y.data).all() for y in ys):
            raise ValueError(f"check_grads: order {k}: nothing finite to differentiate, the output is {ys}")
        if not all(np.array_equal(y.data, again.data) for y, again in zip(ys, outputs(f, xs))):
            raise ValueError(f"check_grads: order {k}: f differs when called again; does it draw random numbers?")
        y_bars = [Tensor(rng.standard_normal(y.shape)) for y in ys]
        errors.append(check_first_order(f, xs, y_bars, tol, k))
        f, xs = pulled_back(f, len(xs)), xs + y_bars
    return errors


def outputs(f, xs):
    ys = f(*xs)
    ys = [ys] if isinstance(ys, Tensor) else ys
    if not isinstance(ys, (list, tuple)) or not all(isinstance(y, Tensor) for y in ys):
        came = map(describe, ys if isinstance(ys, (list, tuple)) else [ys])
        raise TypeError(f"check_grads: f returns a Tensor or a list of them, got {', '.join(came)}")
    return list(ys)


def pulled_back(f, n):
    """(x_1 … x_n, ȳs) ↦ (∂f/∂x)ᵀ ȳ, to be differentiated in turn."""
    return lambda *args: vjp(outputs(f, args[:n]), args[:n], args[n:], create_graph=True)


def check_first_order(f, xs, y_bars, tol, order):
    def terms(*arrays):
        ys = outputs(f, [Tensor(x) for x in arrays])
        return np.concatenate([(y.data * y_bar.data).ravel() for y, y_bar in zip(ys, y_bars)])

    leaves = [stop_gradient(x) for x in xs]
    ys = outputs(f, leaves)
    magnitude = largest(between(ys, leaves)) * largest(y_bars)
    analytic = [g.data for g in vjp(ys, leaves, y_bars)]
    wrong, error = compare(analytic, terms, [x.data for x in xs], tol, magnitude)
    if wrong:
        worst = wrong[0]
        what = f"order {order}, derivative with respect to input {worst.i} at index {worst.index}: {worst}"
        culprit = None if worst.kink else find_culprit(f, xs, y_bars, tol)
        if culprit:
            raise GradientError(f"{what}\nfirst wrong op: {culprit}")
        mask = find_mask(f, xs, y_bars, worst)
        if worst.kink or mask:
            mask = mask or "f itself jumps, or branches on a value,"
            raise KinkError(f"{what}\n{mask} within the step: the point lies at a kink; move it away")
        raise GradientError(
            f"{what}\nevery op's own pullback is right: something cuts a dependence, stop_gradient or .data"
        )
    return error


def largest(tensors):
    """The largest finite value in these Tensors."""
    floats = (t.data[np.isfinite(t.data)] for t in tensors if t.dtype in FLOATS)
    return max((float(np.max(np.abs(a), initial=0)) for a in floats), default=0.0)


@np.errstate(all="ignore")  # a step that is too coarse may leave the domain
def compare(analytic, terms, arrays, tol, magnitude):
    """(all elements of `analytic` that differ from differences of Σ terms(*arrays), the worst first and kinks last;
    the largest error).

    magnitude: of the largest value on the way, whose rounding the differences suffer at most.
    """
    wrong, largest_error, eps, tiny = [], 0.0, np.finfo(float).eps, np.finfo(float).tiny

    def at(i, index, step):
        x = arrays[i].copy()
        x[index] += step
        return terms(*arrays[:i], x, *arrays[i + 1 :]), x[index]

    def central(i, index, step):
        (up, x_up), (down, x_down) = at(i, index, step), at(i, index, -step)
        return float((up - down).sum()) / (x_up - x_down)  # terms that x doesn't move cancel exactly

    def sides_differ(i, index, step):
        """How much the slopes on the two sides differ; 0 if that grows with the step, as in a smooth function."""
        here, gaps = terms(*arrays), []
        for h in (step, 10 * step):
            sides = at(i, index, h), at(i, index, -h)
            right, left = (float((side - here).sum()) / (x - arrays[i][index]) for side, x in sides)
            gaps.append(abs(right - left))
        return gaps[0] if gaps[0] > SMOOTH * gaps[1] else 0.0

    def best(i, index):
        """(spread, rounding, step, slope) of the step that is to be believed: whose halving changes the slope least."""
        size, found = abs(arrays[i][index]), []
        little = [STEP * size] if 0 < size < NEAR else []
        for step in [STEP * max(1, size) * fine for fine in FINER] + little:
            slope, half = central(i, index, step), central(i, index, step / 2)
            better = half + (half - slope) / 3  # Richardson: an error of O(step⁴)
            found.append((abs(slope - half), eps * magnitude / step, step, better))
        return min(found, key=lambda e: (not np.isfinite(e[0]), e[0] + e[1]))

    for i, x in enumerate(arrays):
        numeric = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            numeric[index] = central(i, index, STEP * max(1, abs(x[index])))
        sizes = [np.abs(a[np.isfinite(a)]) for a in (analytic[i], numeric)]
        scale = max(np.max(a, initial=tiny) for a in sizes)
        for index in np.ndindex(x.shape):
            a, d, allowed = analytic[i][index], numeric[index], tol * scale
            if not abs(a - d) <= allowed:  # perhaps the step was too coarse
                spread, rounding, step, d = best(i, index)
                noise = min(SPREADS * spread + UNSEEN * rounding, ROUNDINGS * rounding)
                allowed += CANCELLED * eps * magnitude + noise
                if not abs(a - d) <= allowed:
                    kink = sides_differ(i, index, step) > GAP * allowed or spread > BEND * abs(d) + allowed
                    error = np.nan_to_num(abs(a - d) / allowed, nan=np.inf)
                    wrong.append(Wrong(float(error), i, index, float(step), a, d, bool(kink)))
            largest_error = max(largest_error, abs(a - d) / scale)
    return sorted(wrong, key=lambda w: (w.kink, -w.error)), float(largest_error)


def find_mask(f, xs, y_bars, wrong):
    """The first piecewise constant node, of f or of its pullbacks, that differs between x − step and x + step."""
    programs = []
    for sign in (1, -1):
        arrays = [x.data.copy() for x in xs]
        arrays[wrong.i][wrong.index] += sign * wrong.step
        leaves = [Tensor(x) for x in arrays]
        ys = outputs(f, leaves)
        programs.append(graph(*ys, *vjp(ys, leaves, y_bars, create_graph=True)))
    for up, down in zip(*programs):
        constant = up.inputs and not up.pullbacks and up.kernel is not stopped
        if constant and not np.array_equal(up.data, down.data):
            return f"'{up.op}' changes"
    return None


def find_culprit(f, xs, y_bars, tol):
    """Check each node's own pullbacks, oldest first; then look for leaves, beside f's inputs, that move with them."""
    leaves = [stop_gradient(x) for x in xs]
    nodes, inputs_of_f = graph(*outputs(f, leaves)), {x.serial for x in leaves}
    for z in nodes:
        if z.dtype not in FLOATS or z.kernel is stopped:
            continue
        z_bar = Tensor(np.random.default_rng(0).standard_normal(z.shape))
        floats = [j for j, x in enumerate(z.inputs) if x.dtype in FLOATS and (x.inputs or x.serial in inputs_of_f)]
        arrays = [z.inputs[j].data for j in floats]

        def terms(*moved, z=z, z_bar=z_bar, floats=floats):
            moved = dict(zip(floats, moved))
            return z.kernel(*[moved.get(j, x.data) for j, x in enumerate(z.inputs)]) * z_bar.data

        pullbacks = [z.pullbacks[j] if j < len(z.pullbacks) else None for j in floats]
        analytic = [p(z, z_bar).data if p else np.zeros(x.shape) for p, x in zip(pullbacks, arrays)]
        wrongs, _ = compare(analytic, terms, arrays, tol, largest([z, *z.inputs]) * largest([z_bar]))
        for wrong in wrongs:
            if not wrong.kink and np.isfinite(wrong.numeric):
                return f"{name(z)}; its pullback to input {floats[wrong.i]}, at index {wrong.index}: {wrong}"
    moved = [stop_gradient(x + STEP * Tensor(np.random.default_rng(0).standard_normal(x.shape))) for x in xs]
    for z, other in zip(nodes, graph(*outputs(f, moved))):
        for x, y in zip(z.inputs, other.inputs):
            if x.op in ("leaf", "number", "replayed") and not np.array_equal(x.data, y.data):
                return f"{name(z)}; it reads an array that changes with the inputs, but is no node"
    return None


def name(z):
    where = f" in the pullback of '{op_name(z.origin[1])}'" if z.origin else ""
    return f"'{z.op}'{where}, of inputs shaped {', '.join(str(x.shape) for x in z.inputs)}"
