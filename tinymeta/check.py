"""`check_grads`: every derivative of a function, of any order, against finite differences; and who is to blame."""

import numpy as np

from .tensor import FLOATS, Tensor, describe, graph, op_name, stop_gradient, stopped, vjp

STEP = 6e-6  # ∛ε of float64, where a central difference is most exact; times |x| where that is larger than 1


class GradientError(AssertionError):
    """An analytic derivative differs from the finite difference."""


class KinkError(GradientError):
    """The finite difference straddles a kink: no verdict on the derivative is possible at this point."""


def check_grads(f, xs, *, order=2, tol=1e-6, seed=0):
    """Check the derivatives of f(*xs), a Tensor or a list of them, up to `order` against central differences.

    Order 1 compares (∂y/∂x)ᵀ ȳ, for a random ȳ, with the difference of ⟨y, ȳ⟩ in every element of every x. The next
    order does the same to the function (xs, ȳ) ↦ (∂y/∂x)ᵀ ȳ, analytic as it is, and so on: so each order is checked
    in the inputs and in the cotangents. Float64 only: the noise of float32 would pass for an error, or hide one.

    xs: arrays or Tensors. tol: largest error allowed, relative to the largest derivative with respect to the same x.
    Raises GradientError with the order, the worst index, both values, the step, and the first op whose own pullback is
    wrong; KinkError where a mask (relu, max, abs, ...) changes within the step.
    """
    xs = [Tensor(x) for x in xs]
    for i, x in enumerate(xs):
        if x.dtype != np.float64:
            raise TypeError(f"check_grads: xs[{i}] is {describe(x)}; finite differences need float64")
    rng = np.random.default_rng(seed)
    for k in range(1, order + 1):
        y_bars = [Tensor(rng.standard_normal(y.shape)) for y in outputs(f, xs)]
        check_first_order(f, xs, y_bars, tol, k)
        f, xs = pulled_back(f, len(xs)), xs + y_bars


def outputs(f, xs):
    ys = f(*xs)
    return [ys] if isinstance(ys, Tensor) else list(ys)


def pulled_back(f, n):
    """(x_1 … x_n, ȳs) ↦ (∂f/∂x)ᵀ ȳ, to be differentiated in turn."""
    return lambda *args: vjp(outputs(f, args[:n]), args[:n], args[n:], create_graph=True)


def check_first_order(f, xs, y_bars, tol, order):
    def terms(*arrays):
        return [y.data * y_bar.data for y, y_bar in zip(outputs(f, [Tensor(x) for x in arrays]), y_bars)]

    leaves = [stop_gradient(x) for x in xs]
    analytic = [g.data for g in vjp(outputs(f, leaves), leaves, y_bars)]
    wrong = compare(analytic, terms, [x.data for x in xs], tol)
    if wrong:
        i, index, step, values = wrong
        what = f"order {order}, derivative with respect to input {i} at index {index}: {values}, step {step:.1e}"
        kink = find_kink(f, xs, y_bars, i, index, step)
        if kink:
            raise KinkError(f"{what}\n{kink}: the point lies at a kink, where no step tells; move it away")
        raise GradientError(f"{what}\n{find_culprit(f, xs, y_bars, tol)}")


def compare(analytic, terms, arrays, tol):
    """The worst element of `analytic` against differences of Σ terms(*arrays): None if no one is off."""
    noise = 100 * np.finfo(float).eps * total(np.abs(t) for t in terms(*arrays)) / STEP  # rounding of the terms
    worst, found = 1.0, None

    def difference(i, index, step):
        up, down = (shifted(arrays, i, index, sign * step) for sign in (1, -1))
        return total(u - d for u, d in zip(terms(*up), terms(*down))) / (up[i][index] - down[i][index])

    for i, x in enumerate(arrays):
        steps = STEP * np.maximum(1, np.abs(x))
        numeric = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            numeric[index] = difference(i, index, steps[index])
        allowed = tol * max(np.max(np.abs(a), initial=0) for a in (analytic[i], numeric)) + noise
        for index in np.ndindex(x.shape):
            if not abs(analytic[i][index] - numeric[index]) <= allowed:  # or is the difference itself too coarse?
                numeric[index] += (numeric[index] - difference(i, index, 2 * steps[index])) / 3  # Richardson: O(step⁴)
                error = abs(analytic[i][index] - numeric[index]) / allowed
                if not error <= worst:
                    worst = error if np.isfinite(error) else np.inf
                    values = f"analytic {analytic[i][index]:.9g}, numeric {numeric[index]:.9g}"
                    found = i, index, float(steps[index]), values
    return found


def total(arrays):
    return float(sum(np.sum(a) for a in arrays))


def shifted(arrays, i, index, step):
    x = arrays[i].copy()
    x[index] += step
    return [*arrays[:i], x, *arrays[i + 1 :]]


def find_kink(f, xs, y_bars, i, index, step):
    """The first piecewise constant node that differs between x − step and x + step: a mask of f or of its pullbacks."""
    programs = []
    for sign in (1, -1):
        leaves = [Tensor(x) for x in shifted([x.data for x in xs], i, index, sign * step)]
        ys = outputs(f, leaves)
        programs.append(graph(*ys, *vjp(ys, leaves, y_bars, create_graph=True)))
    for up, down in zip(*programs):
        if up.inputs and not up.pullbacks and up.kernel is not stopped and not np.array_equal(up.data, down.data):
            return f"'{up.op}' changes within the step"
    return len(set(map(len, programs))) > 1 and "f itself branches on a value within the step"


def find_culprit(f, xs, y_bars, tol):
    """Check each node's own pullbacks, oldest first, and then look for constants that should not be constant."""
    leaves = [stop_gradient(x) for x in xs]
    nodes = graph(*outputs(f, leaves))
    inputs_of_f = {x.serial for x in leaves}
    for z in nodes:
        if not z.inputs or z.dtype not in FLOATS or z.kernel is stopped:
            continue
        rng = np.random.default_rng(0)
        z_bar = Tensor(rng.standard_normal(z.shape))
        floats = [j for j, x in enumerate(z.inputs) if x.dtype in FLOATS and (x.inputs or x.serial in inputs_of_f)]
        pullbacks = [z.pullbacks[j] if j < len(z.pullbacks) else None for j in floats]
        inputs = [x.data for x in z.inputs]

        def terms(*arrays, z=z, z_bar=z_bar, floats=floats, inputs=inputs):
            arrays = dict(zip(floats, arrays))
            return [z.kernel(*[arrays.get(j, x) for j, x in enumerate(inputs)]) * z_bar.data]

        analytic = [p(z, z_bar).data if p else np.zeros(inputs[j].shape) for j, p in zip(floats, pullbacks)]
        wrong = compare(analytic, terms, [inputs[j] for j in floats], tol)
        if wrong:
            j, index, step, values = wrong
            return f"first wrong op: {name(z)}; its pullback to input {floats[j]}, at index {index}: {values}"
    moved = [stop_gradient(x + STEP * Tensor(np.random.default_rng(0).standard_normal(x.shape))) for x in xs]
    for z, other in zip(nodes, graph(*outputs(f, moved))):
        for x, y in zip(z.inputs, other.inputs):
            if x.kernel is None and not np.array_equal(x.data, y.data):  # a bare array that follows the inputs
                return f"first wrong op: {name(z)}; it reads an array that changes with the inputs, but is no node"
    return "every op's own pullback is right: a dependence is cut somewhere, by stop_gradient or .data"


def name(z):
    where = f" in the pullback of '{op_name(z.origin[1])}'" if z.origin else ""
    return f"'{z.op}'{where}, of inputs shaped {', '.join(str(x.shape) for x in z.inputs)}"
