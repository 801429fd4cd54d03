"""check_grads must fail where a derivative is wrong, name the op, and know a kink from an error."""

import numpy as np
import pytest

import tinymeta as tm
from tinymeta.tensor import apply

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


def test_bad_arguments():
    for xs, order in [(X, 1), ([X], 0), (tm.Tensor(X), 2)]:
        with pytest.raises((TypeError, ValueError), match="xs is a list of Tensors|order must be 1 or more, got 0"):
            tm.check_grads(tm.sin, xs, order=order)
    with pytest.raises(ValueError, match="nothing finite"):
        tm.check_grads(lambda x: [], [X])


@pytest.mark.parametrize("x", [np.ones(2, np.float32), np.ones(2, int)])
def test_only_float64(x):
    with pytest.raises(TypeError, match="finite differences need float64"):
        tm.check_grads(tm.exp, [x])


def test_several_outputs_and_empty_inputs():
    tm.check_grads(lambda x, y: [x * y, tm.exp(x)], [X, Y], order=3)
    tm.check_grads(lambda x, y: tm.sum(x) * y, [np.ones((0, 2)), Y])
