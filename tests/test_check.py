"""check_grads must fail where a derivative is wrong, name the op, and know a kink from an error."""

import numpy as np
import pytest

import tinymeta as tm
from tinymeta.check import compare
from tinymeta.tensor import apply, stopped

X, Y = np.array([[0.3, -1.2], [0.7, 2.0]]), np.array([[1.1, 0.4], [-0.8, 0.9]])


def multiply_off_by_a_thousandth(x, y):
    return apply(np.multiply, x, y, pullbacks=(lambda z, z_bar: z_bar * y * 1.001, lambda z, z_bar: z_bar * x))


def square_with_a_cached_array(x):
    twice = 2 * x.data  # right in the first derivative, wrong in the second
    return apply(np.square, x, pullbacks=(lambda y, y_bar: y_bar * twice,))


def multiply_with_a_dropped_edge(x, y):
    return apply(np.multiply, x, y, pullbacks=(lambda z, z_bar: z_bar * y, None))


def square_cut_from_its_cotangent(x):
    return apply(np.square, x, pullbacks=(lambda y, y_bar: 2 * x * tm.stop_gradient(y_bar),))


SABOTAGE = [
    (multiply_off_by_a_thousandth, 1, r"order 1.*analytic.*numeric.*step(.|\n)*first wrong op: 'multiply'.*input 0"),
    (multiply_with_a_dropped_edge, 1, r"order 1(.|\n)*first wrong op: 'multiply'.*pullback to input 1.*analytic 0,"),
]


@pytest.mark.parametrize("op, order, message", SABOTAGE)
def test_wrong_first_order(op, order, message):
    with pytest.raises(tm.GradientError, match=message):
        tm.check_grads(lambda x, y: tm.tanh(op(tm.exp(x), tm.sin(y) * x)), [X, Y], order=order)


def test_a_cached_array_passes_the_first_order_and_fails_the_second():
    def f(x):
        return tm.logsumexp(square_with_a_cached_array(tm.sin(x)))

    tm.check_grads(f, [X], order=1)
    with pytest.raises(tm.GradientError, match="order 2(.|\n)*'multiply' in the pullback of 'square'.*but is no node"):
        tm.check_grads(f, [X])


def test_a_cut_cotangent_passes_the_first_order_and_fails_the_second():
    tm.check_grads(square_cut_from_its_cotangent, [X], order=1)
    with pytest.raises(tm.GradientError, match="order 2(.|\n)*something cuts a dependence"):
        tm.check_grads(square_cut_from_its_cotangent, [X])


def test_by_default_an_error_of_a_millionth_counts():
    def off(error):
        return lambda x: apply(np.square, x, pullbacks=(lambda y, y_bar: y_bar * 2 * x * (1 + error),))

    tm.check_grads(off(0.9e-6), [np.array([1.0])])
    with pytest.raises(tm.GradientError, match="order 1"):
        tm.check_grads(off(1.1e-6), [np.array([1.0])])


def test_a_third_order_error_passes_the_second():
    def cube(x):
        def pullback(y, y_bar):
            return y_bar * apply(np.square, x, pullbacks=(lambda z, z_bar: z_bar * (2 * x.data),)) * 3

        return apply(lambda x, out=None: np.power(x, 3.0, out=out), x, pullbacks=(pullback,))

    tm.check_grads(cube, [X])
    with pytest.raises(tm.GradientError, match="order 3(.|\n)*in the pullback of 'square'"):
        tm.check_grads(cube, [X], order=3)


def test_a_value_computed_outside_the_graph_is_named():
    with pytest.raises(tm.GradientError, match="'add'.*reads an array that changes with the inputs"):
        tm.check_grads(lambda x: tm.exp(x + np.sin(x.data)), [X])


def test_the_worst_index_is_named():
    wrong = np.zeros((2, 2))
    wrong[1, 0] = 0.5
    with pytest.raises(tm.GradientError, match=r"input 0 at index \(1, 0\)"):
        tm.check_grads(lambda x: apply(np.sin, x, pullbacks=(lambda y, g: g * (tm.cos(x) + wrong),)), [X])


@pytest.mark.parametrize("f, x", [
    (tm.relu, [0.5, 0.0]), (tm.abs, [0.0]), (lambda x: tm.max(x * np.array([1.0, 2.0])), [2.0, 1.0]),
    (lambda x: tm.where(x > 1.0, x, 2 * x), [1.0]), (lambda x: tm.sign(x) * x, [1e-7]),
])  # fmt: skip
def test_a_kink_is_called_a_kink(f, x):
    with pytest.raises(tm.KinkError, match="changes within the step: the point lies at a kink"):
        tm.check_grads(f, [np.array(x)])


def test_kinks_that_cancel_are_called_kinks():
    with pytest.raises(tm.KinkError, match="'less_equal' changes"):
        tm.check_grads(lambda x: tm.relu(x) - tm.relu(-x), [np.array([0.0, 1.0])])


def test_a_mask_of_a_pullback_is_named():
    def op(x):
        return apply(np.abs, x, pullbacks=(lambda y, y_bar: y_bar * tm.sign(x),))

    with pytest.raises(tm.KinkError, match="'sign' changes within the step"):
        tm.check_grads(lambda x: op(x - 1), [np.array([1 + 1e-9])], order=1)


CUT = {  # a cut is no kink, unless the mask beside it changes within the step, 6e-6
    "a small thing": (lambda x: 1e-12 * tm.stop_gradient(tm.sin(x)), None),
    "a stopped node": (lambda x: x * apply(stopped, x + 1.0), None),
    "beside a mask": (lambda x: tm.stop_gradient(x) + tm.where(x > -5.0, x, 2 * x), None),
    "behind a mask that stays": (lambda x: tm.stop_gradient(x) + (x > -5.0) * x + (x <= 3e-6) * 0.0, "less_equal"),
    "a mask within": (lambda x: tm.stop_gradient(x) + tm.where(x > 3e-6, x, x), "greater"),
    "a mask within, to the left": (lambda x: tm.stop_gradient(x) + tm.where(x > -3e-6, x, x), "greater"),
    "a mask beyond": (lambda x: tm.stop_gradient(x) + tm.where(x > 9e-6, x, x), None),
    "a mask beyond, to the left": (lambda x: tm.stop_gradient(x) + tm.where(x > -9e-6, x, x), None),
}


@pytest.mark.parametrize("f, mask", CUT.values(), ids=CUT)
def test_a_cut_dependence_is_called_that(f, mask):
    message = f"'{mask}' changes within the step" if mask else "something cuts a dependence"
    with pytest.raises(tm.GradientError, match=message) as e:
        tm.check_grads(f, [np.array(0.0)])
    assert isinstance(e.value, tm.KinkError) == bool(mask)


def test_an_array_from_outside_that_stays_as_it_is_is_not_blamed():
    with pytest.raises(tm.GradientError, match="something cuts a dependence"):
        tm.check_grads(lambda x: tm.stop_gradient(x) + x * np.floor(4 * x.data + 0.6), [np.array(1.0)])


def test_an_array_from_outside_that_changes_only_as_the_inputs_differ_is_found():
    with pytest.raises(tm.GradientError, match="'multiply'.*reads an array that changes"):
        tm.check_grads(lambda x: x * (x.data - x.data[::-1]), [np.ones(2)])


def test_a_wrong_derivative_at_a_stationary_point_is_no_kink():
    def op(x):
        return apply(np.cos, x, pullbacks=(lambda y, g: g * (1 + tm.sin(x)),))

    with pytest.raises(tm.GradientError, match="first wrong op: 'cos'") as e:
        tm.check_grads(op, [np.zeros(2)])
    assert not isinstance(e.value, tm.KinkError)


def test_a_branch_on_a_value_is_called_that():
    for f in (lambda x: 2 * x if x.item() > 1 else tm.sin(x) * 3, lambda x: 2 * x if x.item() > 1 else 3 * x):
        with pytest.raises(tm.KinkError, match="branches on a value"):
            tm.check_grads(f, [np.array(1.0)])


def test_a_wrong_gradient_next_to_a_mask_is_not_excused_as_a_kink():
    with pytest.raises(tm.GradientError) as e:
        tm.check_grads(lambda x: multiply_off_by_a_thousandth(tm.relu(x), tm.abs(x)), [X])
    assert not isinstance(e.value, tm.KinkError)


def test_steep_functions_are_not_blamed():
    tm.check_grads(lambda x: tm.sin(40 * x**3), [np.array([0.5, 2.0, 3.0])], order=3)


def test_a_function_that_is_not_finite_or_not_a_function():
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="nothing finite.*nan"):
        tm.check_grads(tm.sqrt, [np.array([-1.0, 1.0])])
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="does it draw random numbers"):
        tm.check_grads(lambda x: x * rng.random(), [X])


def test_an_infinite_gradient_hides_no_others():
    def op(x):
        return apply(np.sin, x, pullbacks=(lambda y, g: g * tm.cos(x) * np.array([np.inf, 7.0, 7.0]),))

    with pytest.raises(tm.GradientError, match="analytic inf"):
        tm.check_grads(op, [np.array([0.3, 0.5, 0.7])], order=1)


def wrong_sin(x, factor=1.1):
    return apply(np.sin, x, pullbacks=(lambda y, g: factor * g * tm.cos(x),))


def flat_sqrt(x):
    return apply(np.sqrt, x, pullbacks=(lambda y, g: 0.0 * g,))


RIGHT = {  # derivatives that vanish by cancellation, or where the step must suit the scale
    "sum of softmax": (lambda x: tm.sum(tm.softmax(x)), [X]),
    "x / x": (lambda x: x / x, [Y]),
    "sin² + cos²": (lambda x: tm.sin(x) ** 2 + tm.cos(x) ** 2, [X]),
    "norm of a unit vector": (lambda x: tm.sum((x / tm.sqrt(tm.sum(x * x))) ** 2), [X]),
    "sum of normalised": (lambda x: tm.sum((x - tm.mean(x)) / tm.sqrt(tm.mean((x - tm.mean(x)) ** 2))), [X]),
    "(x + 1)(x − 1) − x² + 1": (lambda x: (x + 1) * (x - 1) - x * x + 1, [X]),
    "log of little": (tm.log, [np.array(1e-4)]),
    "log of very little": (tm.log, [np.array(1e-8)]),
    "sqrt of very little": (tm.sqrt, [np.array(1e-10)]),
    "inverse of little": (lambda x: 1 / x, [np.array(1e-4)]),
    "sin of much": (tm.sin, [np.array(1e5)]),
    "fast": (lambda x: tm.sin(1e4 * x), [np.array(0.3)]),
    "a cubic of any size": (lambda x: x + 1e12 * x**3, [np.array(0.0)]),
    "nothing": (lambda x: 0.0 * x, [X]),
}


@pytest.mark.parametrize("f, xs", RIGHT.values(), ids=RIGHT)
def test_right_derivatives_pass(f, xs):
    tm.check_grads(f, xs)


BLAMED = {  # the wrong op among innocent ones that are hard to check
    "after a log of little": lambda x: wrong_sin(tm.log(x * x * 1e-12)),
    "after a tie": lambda x: wrong_sin(tm.max(tm.stack([x, x, x]), axis=0)),
    "under a large value": lambda x: wrong_sin(x, 2.0) + 1e6,
    "beside a masked logit": lambda x: tm.softmax(tm.where(X != -1.2, wrong_sin(x, 3.0), -1e9)),
    "beside a branch not taken": lambda x: tm.where(x > -100.0, wrong_sin(x), 1e300),
    "behind a mask that matters not": lambda x: tm.where(x > 0.3, wrong_sin(x), wrong_sin(x)),
    "behind a large value": lambda x: wrong_sin((x + 1e6) - 1e6),
    "behind a sign": lambda x: wrong_sin(tm.sign(x) * x),
    "beside a root without differences": lambda x: tm.where(x < -9.0, flat_sqrt(x * 0.0), wrong_sin(x)),
    "beside a kink": lambda x: tm.relu(x - 0.3) * 1000 + wrong_sin(x),
}


@pytest.mark.parametrize("f", BLAMED.values(), ids=BLAMED)
def test_the_wrong_op_is_blamed(f):
    with pytest.raises(tm.GradientError, match="first wrong op: 'sin'") as e:
        tm.check_grads(f, [X])
    assert not isinstance(e.value, tm.KinkError)


def test_the_largest_error_of_each_order_is_returned():
    def almost_square(x):
        return apply(np.square, x, pullbacks=(lambda y, y_bar: (2 - 2e-4) * x * y_bar,))

    first, second = tm.check_grads(almost_square, [X], tol=1e-3)
    np.testing.assert_allclose(first, 1e-4, rtol=1e-3)  # at the element with the largest derivative
    assert second < 1e-9  # of the wrong derivative, which is differentiated rightly
    assert max(tm.check_grads(tm.sin, [X], order=3)) < 1e-9


def test_the_largest_error_counts_where_a_finer_step_was_needed():
    error = 3e-4 + 1e-9

    def op(x):
        return apply(lambda x, out=None: np.sin(1e4 * x, out=out), x, pullbacks=(
            lambda y, y_bar: y_bar * 1e4 * tm.cos(1e4 * x) * (1 + error),))  # fmt: skip

    (found,) = tm.check_grads(op, [np.zeros(1)], order=1, tol=4e-4)
    np.testing.assert_allclose(found, error, rtol=1e-3)


def worst_of(analytic, numeric):
    """The places of wrong derivatives, lists of arrays, of a linear function; the worst first."""
    zeros = [np.zeros(np.shape(d)) for d in numeric]
    terms = lambda *xs: np.concatenate([d * x for d, x in zip(numeric, xs)])
    return [(w.i, *w.index) for w in compare([np.array(a) for a in analytic], terms, zeros, 1e-6, 0.0)[0]]


def test_the_worst_error_is_that_farthest_beyond_what_is_allowed():
    assert worst_of([[3.0, -1.0]], [[2.0, 1.0]]) == [(0, 1), (0, 0)]
    assert worst_of([[2e6, 0.0], [3.0, 0.5]], [[1e6, 0.0], [1.0, 0.5]]) == [(1, 0), (0, 0)]  # each x has its scale
    assert worst_of([[9.0, 9.0, np.nan, 1e3]], [[9.0, 1.0, 1.0, 1.0]]) == [(0, 2), (0, 3), (0, 1)]
    assert worst_of([[9.0, np.inf]], [[1.0, 1.0]]) == [(0, 1), (0, 0)]


# ---- what is allowed, which step is taken, and what is a kink --------------------------------------------------------
#
# By a function of h = x − x₀ whose slope is known at every step; by default the step is 6e-6.


def compared(f, analytic, x=0.0, size=1.0):
    """The Wrong of f's derivative at x, or None; size: of the largest value on the way."""
    wrong, _ = compare([np.array(analytic)], lambda x: f(x), [np.array(x)], 1e-6, size)
    return wrong[0] if wrong else None


def onset(happens, low=1e-9, high=10.0):
    """Where happens(e) begins to be true, to a thousandth."""
    assert not happens(low) and happens(high)
    while high > 1.001 * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if happens(middle) else (middle, high)
    return low


def tilted(h, c, slope=0.0):
    """By `c` the slope changes whenever h is halved; extrapolated from 6e-6 and 3e-6 it is `slope`."""
    return h * (slope + c * (np.log2(np.abs(h / 3e-6) + (h == 0)) + 1 / 3))


ALLOWED = {  # of a derivative 1: f(x), x, the size of the largest value on the way, the largest error that passes
    "tol alone": (lambda x: x, 0.0, 0.0, 1e-6),
    "rounding that may not show": (lambda x: x, 0.0, 1e6, 1.212e-5),
    "the same by a step of 6e-3": (lambda x: x - 1e3, 1e3, 1e9, 3.43e-5),
    "rounding left where terms cancel": (lambda x: x - 1e6, 1e6, 1e12, 2.222e-2),
    "rounding that shows": (lambda x: tilted(x, 1e-6, 1.0), 0.0, 3e5, 1.434e-5),
    "more than rounding can show": (lambda x: tilted(x, 1e-4, 1.0), 0.0, 3e5, 1.120e-4),
}


@pytest.mark.parametrize("f, x, size, allowed", ALLOWED.values(), ids=ALLOWED)
def test_how_much_is_allowed(f, x, size, allowed):
    found = onset(lambda error: compared(f, 1.0 - error, x, size))
    np.testing.assert_allclose(found, allowed, rtol=3e-3)


KINKS = {  # f(h, k) whose derivative is -1 by mistake: from which k on it is called a kink
    "sides that differ": (lambda h, k: h + k * np.abs(h), 5e-5),
    "the same in a bend": (lambda h, k: h + k * np.abs(h) + 2 * h**2, 3.8e-5),
    "less than the bend": (lambda h, k: h + k * np.abs(h) + 1e3 * h**2, 7.5e-3),
    "a slope that depends on the step": (lambda h, k: tilted(h, k, 1.0), 0.3),
    "the same, steeper": (lambda h, k: tilted(h, k, 10.0), 3.0),
    "the same, level": (lambda h, k: tilted(h, k), 1e-6),
}


@pytest.mark.parametrize("f, least", KINKS.values(), ids=KINKS)
def test_from_where_on_it_is_a_kink(f, least):
    found = onset(lambda k: compared(lambda h: f(h, k), -1.0).kink)
    np.testing.assert_allclose(found, least, rtol=3e-3)


def test_the_step_balances_its_rounding_and_what_halving_it_changes():
    for cubic, step in [(1e2, 6e-6), (1e5, 2e-7), (1e9, 6e-9)]:
        wrong = compared(lambda h, cubic=cubic: h + cubic * h**3, -1.0, size=100.0)
        np.testing.assert_allclose([wrong.step, wrong.numeric], [step, 1.0])
    np.testing.assert_allclose(compared(lambda h: h * np.nan, -1.0).step, 6e-6)  # no step is any good


HALVED = [6e-6, 3e-6, 2e-7, 1e-7, 6e-9, 3e-9]
SIDES = [0.0, 6e-5]


@pytest.mark.parametrize("f, x, analytic, distances", [
    (lambda x: x, 0.0, 1.0, [6e-6]),
    (lambda x: x, 100.0, 1.0, [6e-4]),
    (lambda x: 0.0 * x, 0.0, 0.0, [6e-6]),
    (lambda x: x, 0.0, 2.0, HALVED + SIDES),
    (lambda x: x, 1.1e-3, 2.0, HALVED + SIDES),
    (lambda x: x, -9e-4, 2.0, [*HALVED, 5.4e-9, 2.7e-9, *SIDES]),
    (lambda x: x - 100, 100.0, 2.0, [100 * h for h in HALVED + SIDES]),
])  # fmt: skip
def test_how_far_from_x_it_looks(f, x, analytic, distances):
    """Further on only where the first step does not agree; the sides only if no step does."""
    seen = []
    compared(lambda moved: seen.append(abs(moved - x)) or f(moved), analytic, x)
    first = [h for h, before in zip(seen, [np.inf, *seen]) if not np.isclose(h, before, rtol=1e-4, atol=1e-15)]
    np.testing.assert_allclose(sorted(set(map(float, np.round(first, 15)))), sorted(distances), rtol=1e-4, atol=1e-12)


def exact(x, large):
    """x, by way of a large value that is not rounded."""
    return x * large * (1 / large)


@pytest.mark.parametrize("large, allowed", [(2.0**29, 5.96e-3), (2.0**34, 0.1911)])
def test_an_error_that_drowns_in_a_large_value(large, allowed):
    def passes(error):
        tilt = lambda x: apply(np.positive, x, pullbacks=(lambda y, y_bar: y_bar * (1 - error),))
        try:
            tm.check_grads(lambda x: exact(tilt(x), large), [np.array(1.0)], order=1)
        except tm.GradientError:
            return False
        return True

    np.testing.assert_allclose(onset(lambda error: not passes(error)), allowed, rtol=5e-3)


@pytest.mark.parametrize("error, message", [(1.12e-3, "first wrong op"), (1.1e-3, "every op's own pullback is right")])
def test_a_large_constant_excuses_only_what_it_could(error, message):
    """It stands beside the op that is off, whose own check allows for its rounding."""

    def f(x):
        kernel = lambda x, large, out=None: np.positive(x, out=out)
        return apply(kernel, x, tm.Tensor(1e8), pullbacks=(lambda y, y_bar: y_bar * (1 - error), None))

    with pytest.raises(tm.GradientError, match=message):
        tm.check_grads(f, [np.array(0.0)], order=1)


def test_bad_arguments():
    for xs, order in [(X, 1), ([X], 0), (tm.Tensor(X), 2)]:
        with pytest.raises((TypeError, ValueError), match="xs is a list of Tensors|order must be 1 or more, got 0"):
            tm.check_grads(tm.sin, xs, order=order)
    with pytest.raises(ValueError, match="nothing finite"):
        tm.check_grads(lambda x: [], [X])
    with pytest.raises(TypeError, match="f returns a Tensor or a list of them, got a Tensor.*, "):
        tm.check_grads(lambda x: [x, X], [X])


@pytest.mark.parametrize("x", [np.ones(2, np.float32), np.ones(2, int)])
def test_only_float64(x):
    with pytest.raises(TypeError, match="finite differences need float64"):
        tm.check_grads(tm.exp, [x])


def test_several_outputs_and_empty_inputs():
    tm.check_grads(lambda x, y: [x * y, tm.exp(x)], [X, Y], order=3)
    tm.check_grads(lambda x, y: tm.sum(x) * y, [np.ones((0, 2)), Y])
