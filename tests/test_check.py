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
    with pytest.raises(tm.GradientError, match="order 2(.|\n)*a dependence is cut somewhere"):
        tm.check_grads(square_cut_from_its_cotangent, [X])


def test_a_third_order_error_passes_the_second():
    def cube(x):
        def pullback(y, y_bar):
            return y_bar * apply(np.square, x, pullbacks=(lambda z, z_bar: z_bar * (2 * x.data),)) * 3

        return apply(lambda x, out=None: np.power(x, 3.0, out=out), x, pullbacks=(pullback,))

    tm.check_grads(cube, [X], order=2)
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


def test_a_branch_on_a_value_is_called_that():
    with pytest.raises(tm.KinkError, match="branches on a value"):
        tm.check_grads(lambda x: 2 * x if x.item() > 1 else tm.sin(x) * 3, [np.array(1.0)])


def test_a_wrong_gradient_next_to_a_mask_is_not_excused_as_a_kink():
    with pytest.raises(tm.GradientError) as e:
        tm.check_grads(lambda x: multiply_off_by_a_thousandth(tm.relu(x), tm.abs(x)), [X])
    assert not isinstance(e.value, tm.KinkError)


def test_steep_functions_are_not_blamed():
    tm.check_grads(lambda x: tm.sin(40 * x**3), [np.array([0.5, 2.0, 3.0])], order=3)


def test_nan_is_an_error():
    with np.errstate(invalid="ignore"), pytest.raises(tm.GradientError, match="nan"):
        tm.check_grads(tm.sqrt, [np.array([-1.0, 1.0])])


@pytest.mark.parametrize("x", [np.ones(2, np.float32), np.ones(2, int)])
def test_only_float64(x):
    with pytest.raises(TypeError, match="finite differences need float64"):
        tm.check_grads(tm.exp, [x])


def test_several_outputs_and_empty_inputs():
    tm.check_grads(lambda x, y: [x * y, tm.exp(x)], [X, Y], order=3)
    tm.check_grads(lambda x, y: tm.sum(x) * y, [np.ones((0, 2)), Y])
