"""The Tensor and the walk: what a graph looks like, what it costs, what it refuses."""

import copy
import gc
import pickle
import threading
import tracemalloc
import weakref

import numpy as np
import pytest

import tinymeta as tm
from tinymeta import tensor


def walk_length(y, xs):
    return len(tensor.between([y], xs))


# ---- what the walk computes ------------------------------------------------------------------------------------------


def test_fan_out_adds_up():
    x = tm.Tensor(3.0)
    assert tm.grad(x + x + x * x, [x])[0].item() == 2 + 2 * 3


def test_diamond_is_walked_in_the_right_order():
    """y = (c + d) + c d with c = a + b, d = a b: a naive recursion visits c before d has passed its share on."""
    a, b = tm.Tensor(2.0), tm.Tensor(3.0)
    c, d = a + b, a * b
    assert [g.item() for g in tm.grad((c + d) + c * d, [a, b])] == [25, 19]


def test_gradient_through_an_input_that_depends_on_another():
    a = tm.Tensor(2.0)
    b = a * 3
    assert [g.item() for g in tm.grad(b * b, [a, b])] == [36, 12]


def test_the_output_among_the_inputs():
    x = tm.Tensor(2.0)
    y = x * x
    assert [g.item() for g in tm.grad(y, [x, y])] == [4, 1]
    assert tm.grad(x, [x, x])[1].item() == 1


def test_nested_grad_and_what_it_takes_for_constant():
    x, y = tm.Tensor(3.0), tm.Tensor(2.0)
    (inner,) = tm.grad(x * y, [y], create_graph=True)
    assert tm.grad(x * inner, [x])[0].item() == 6
    (inner,) = tm.grad(x * y, [y])
    assert tm.grad(x * inner, [x])[0].item() == 3


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0, 2)])
def test_derivatives_of_linear_and_constant_functions_are_zeros_of_the_right_shape(shape):
    x, other = tm.Tensor(np.ones(shape)), tm.Tensor(np.ones(2))
    for f in (lambda: tm.sum(2 * x), lambda: tm.sum(other), lambda: tm.sum(0 * x), lambda: tm.sum(x) - tm.sum(x)):
        y = f()
        for _ in range(4):
            (g,) = tm.grad(y, [x], create_graph=True)
            assert g.shape == shape and g.dtype == x.dtype
            y = tm.sum(g)
        np.testing.assert_array_equal(g.data, np.zeros(shape))


def test_vjp_of_several_outputs():
    x = tm.Tensor([1.0, 2.0])
    y, z = x * x, tm.sin(x)
    (g,) = tm.vjp([y, z], [x], [np.array([1.0, 0.0]), tm.Tensor([0.0, 2.0])])
    np.testing.assert_allclose(g.data, [2, 2 * np.cos(2)])


def test_without_create_graph_results_are_leaves_even_if_the_cotangent_is_not():
    x = tm.Tensor(2.0)
    for create_graph, derivative in [(False, 0), (True, 2)]:
        (g,) = tm.vjp(x + 1, [x], 2 * x, create_graph=create_graph)
        assert tm.grad(g, [x])[0].item() == derivative


def test_inputs_are_any_iterable_and_results_leaves_by_default():
    x = tm.Tensor([1.0, 2.0])
    y = tm.sum(x**2)
    assert tm.grad(y, []) == tm.vjp(y, [], 1.0) == []
    for g in (tm.grad(y, iter([x])), tm.vjp(y, iter([x]), 1.0), tm.vjp(iter([y]), [x], iter([1.0]))):
        assert g[0].data.tolist() == [2, 4] and not g[0].inputs


def test_outputs_are_tensors_of_floats():
    for y in (np.ones(2), tm.Tensor([1, 2]), 1.0):
        with pytest.raises(TypeError, match="the output to differentiate is"):
            tm.vjp([y], [tm.Tensor(1.0)], [np.ones(2)])


def test_data_is_an_array():
    """Also where NumPy returns a scalar."""
    x = tm.Tensor(2.0)
    assert all(type(y.data) is np.ndarray for y in (x, tm.exp(x), x + 1, tm.sum(x * np.ones(3)), x[()]))


def test_stop_gradient():
    x = tm.Tensor(2.0)
    assert tm.grad(x * tm.stop_gradient(x), [x])[0].item() == 2
    nested = tm.stop_gradient({"params": [x * x, (x,)], "step": 3, "none": None})
    assert nested["params"][0].inputs == () and nested["params"][1][0].item() == 2 and nested["step"] == 3
    assert nested["none"] is None and isinstance(nested["params"][1], tuple)


def test_grad_is_pure():
    x = tm.Tensor([1.0, 2.0])
    y = tm.sum(tm.exp(x) * x)
    before = [(z.serial, z.data.tobytes()) for z in tensor.graph(y)]
    a, b = (tm.grad(y, [x])[0].data.tobytes() for _ in range(2))
    assert a == b and before == [(z.serial, z.data.tobytes()) for z in tensor.graph(y)]


def test_origin_tells_the_passes_apart():
    x = tm.Tensor(2.0)
    y = tm.sin(x) * x
    (g,) = tm.grad(y, [x], create_graph=True)
    (gg,) = tm.grad(g, [x], create_graph=True)
    orders = [{z.origin[0] if z.origin else 0 for z in tensor.graph(t)} for t in (y, g, gg)]
    assert orders == [{0}, {0, 1}, {0, 1, 2}]


def test_threads_record_independently():
    """While one thread runs pullbacks unrecorded, another keeps recording."""
    inside, go_on, recorded = threading.Event(), threading.Event(), []

    def slow(y, y_bar):
        inside.set()
        assert go_on.wait(10)
        return y_bar * 2

    x = tm.Tensor(1.0)
    y = tensor.apply(np.negative, x, pullbacks=(slow,))
    thread = threading.Thread(target=lambda: recorded.append(tm.grad(y, [x])[0].inputs))
    thread.start()
    assert inside.wait(10)
    assert (x * x).inputs
    go_on.set()
    thread.join()
    assert recorded == [()]


def test_a_gradient_where_nothing_is_recorded_is_refused():
    """It would be 0."""

    def calls_grad(y, y_bar):
        x = tm.Tensor(2.0)
        return tm.grad(x * x * x, [x], create_graph=True)[0] * y_bar

    x = tm.Tensor(1.0)
    y = tensor.apply(np.negative, x, pullbacks=(calls_grad,))
    with pytest.raises(
        ValueError, match="^grad finds no graph: where it is called, as in a pullback, nothing is recor"
    ):
        tm.grad(y, [x])
    assert tm.grad(y, [x], create_graph=True)[0].item() == 12
    square = x * x
    with tensor.recording(False):
        assert tm.grad(square, [x])[0].item() == 2  # of what was recorded before


def test_an_exception_in_a_pullback_leaves_no_state():
    def fails(y, y_bar):
        raise ZeroDivisionError

    x = tm.Tensor(1.0)
    bad = tensor.apply(np.negative, x, pullbacks=(fails,))
    for create_graph in (False, True):
        with pytest.raises(ZeroDivisionError):
            tm.grad(bad, [x], create_graph=create_graph)
        assert (x * x).inputs and (x * x).origin is None


def test_a_pullback_of_the_wrong_shape_or_type_is_named():
    x = tm.Tensor(np.ones(3))
    for wrong in (lambda y, y_bar: tm.sum(y_bar), lambda y, y_bar: y_bar.astype(np.float32)):
        y = tensor.apply(np.negative, x, pullbacks=(wrong,))
        with pytest.raises(ValueError, match="pullback of negative gave a Tensor of float"):
            tm.vjp(y, [x], np.ones(3))


# ---- what it costs ---------------------------------------------------------------------------------------------------


def test_a_chain_of_50000_ops_needs_no_recursion():
    x = tm.Tensor(1.0)
    y = x
    for _ in range(50_000):
        y = y * 0.99999
    (g,) = tm.grad(y * y, [x], create_graph=True)
    (gg,) = tm.grad(g, [x])
    assert gg.item() == pytest.approx(2 * 0.99999**100_000)
    del y, g, gg


def test_graphs_are_freed_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        x = tm.Tensor(np.ones(3))
        y = tm.sum(tm.softmax(tm.relu(x) @ np.ones((3, 3)))[1:] ** 2)
        (g,) = tm.grad(y, [x], create_graph=True)
        (gg,) = tm.grad(tm.sum(g), [x], create_graph=True)
        dead = [weakref.ref(z) for z in tensor.graph(y, g, gg) if z is not x]
        del y, g, gg
        assert len(dead) > 50 and not any(r() for r in dead)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_memory_is_flat_over_many_meta_steps():
    theta = tm.nn.init_mlp(np.random.default_rng(0), (1, 8, 1))
    rng, state, used = np.random.default_rng(0), None, []

    def loss(phi, data):
        return tm.nn.mse(tm.nn.mlp(phi, data[0]), data[1])

    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for i in range(120):
            support, query = tm.tasks.sinusoid.training_batch(rng, 4, 5)
            _, meta_grad = tm.meta.maml(loss, theta, support, query, alpha=0.01, steps=2)
            theta, state = tm.stop_gradient(tm.solvers.adam(theta, meta_grad, state, lr=1e-3))
            if i % 60 == 59:
                used.append(tracemalloc.get_traced_memory()[0])
    finally:
        found = gc.collect()
        tracemalloc.stop()
        gc.enable()
    assert found == 0
    assert used[1] - used[0] < 150_000  # what CPython keeps of freed tuples; one leaked graph a step would be 10 MB


def test_the_walk_of_inner_step_k_is_no_longer_than_that_of_step_1():
    a, lengths, seen = tm.Tensor(np.ones((2, 3))), [], []
    phi = [tm.Tensor(np.ones((2, 3))) * 0.5]
    for _ in range(6):
        loss = tm.sum(tm.sin(phi[0] * a) ** 2)
        lengths.append(walk_length(loss, phi))
        seen.append(len(list(tensor.ancestors([loss], phi))))
        (g,) = tm.grad(loss, phi, create_graph=True)
        phi = [phi[0] - 0.1 * g]
    assert len(set(lengths)) == 1 and len(set(seen)) == 1


def test_only_the_path_to_the_inputs_is_visited():
    x, image = tm.Tensor(2.0), tm.Tensor(np.ones(3))

    def forbidden(y, y_bar):
        raise AssertionError("nobody asked for the gradient with respect to the image")

    for z in (image, tm.abs(image)):
        y = tm.sum(tensor.apply(np.negative, z, pullbacks=(forbidden,)) * x)
        assert tm.grad(y, [x])[0].item() == -3


def test_a_node_is_visited_once():
    """Of 2^100 paths."""
    x = y = tm.Tensor(1.0)
    for _ in range(100):
        y = y + y
    assert tm.grad(y, [x])[0].item() == 2.0**100


# ---- the Tensor itself -----------------------------------------------------------------------------------------------


def test_tensor_of_a_tensor_is_itself_and_of_an_array_shares_its_memory():
    a = np.ones(3)
    t = tm.Tensor(a)
    assert tm.Tensor(t) is t and t.data is a
    assert (t.shape, t.dtype, t.ndim, t.size, len(t), t.op) == ((3,), np.float64, 1, 3, 3, "leaf")
    assert [x.item() for x in t] == [1, 1, 1] and tm.Tensor(2.5).item() == 2.5 and tm.Tensor([1, 2]).dtype == np.int64


def test_repr_names_values_type_and_op():
    assert repr(tm.Tensor([1.0, 2.0]) * 2) == "Tensor([2., 4.], float64, multiply)"
    assert repr(tm.Tensor(1)) == "Tensor(1, int64, leaf)"


def test_a_copy_is_a_leaf():
    t = tm.Tensor([1.0, 2.0]) * 2
    for twin in (copy.copy(t), copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert twin.op == "leaf" and twin.data.tolist() == [2, 4]


def test_array_op_tensor_is_a_tensor():
    t = tm.Tensor(np.ones(3))
    for y in (
        np.ones(3) + t,
        np.ones(3) * t,
        np.ones((2, 3)) @ t,
        np.float64(2) * t,
        np.array(2.0) - t,
        np.ones(3) / t,
    ):
        assert isinstance(y, tm.Tensor) and y.dtype == np.float64


T = tm.Tensor(np.ones(3))
REFUSED = [
    (lambda: tm.grad(T, [T]), ValueError, "grad needs a scalar.*sum it, or use vjp"),
    (lambda: tm.grad(1.0, [T]), TypeError, "got a float"),
    (lambda: tm.grad(tm.sum(T), T), TypeError, r"write grad\(y, \[x\]\)"),
    (lambda: tm.grad(tm.sum(T), [T.data]), TypeError, r"xs\[0\] is an array.*make it a Tensor before"),
    (lambda: tm.grad(tm.sum(T), [tm.Tensor([1])]), TypeError, "int64.*no derivative: take floats"),
    (lambda: tm.grad(tm.Tensor(1) * 2, [T]), TypeError, "must be a Tensor of floats"),
    (lambda: tm.vjp(T, [T], np.ones(2)), ValueError, r"cotangent is .*\(2,\), the output .*\(3,\)"),
    (lambda: tm.vjp(T, [T], T.astype(np.float32)), ValueError, "must be alike"),
    (lambda: tm.vjp([T, T], [T], [np.ones(3)]), ValueError, "2 outputs but 1 cotangents"),
    (lambda: tm.Tensor([1j]), TypeError, "not complex128.*convert it first"),
    (lambda: tm.Tensor(np.ones(2, np.float16)), TypeError, "not float16"),
    (lambda: tm.Tensor(["a"]), TypeError, "a Tensor holds"),
    (lambda: tm.Tensor([T, T]), TypeError, "tm.stack"),
    (lambda: np.exp(T), TypeError, r"tm.exp\(t\) for np.exp\(t\)"),
    (lambda: np.sum(T), TypeError, "tm.sum"),
    (lambda: np.asarray(T), TypeError, "t.data for the bare array"),
    (lambda: float(T), TypeError, r"t.item\(\)"),
    (lambda: int(T), TypeError, r"t.item\(\)"),
    (lambda: bool(T > 0), TypeError, "tm.where"),
    (lambda: T.__setitem__(0, 1.0), TypeError, "never changed in place.*tm.where"),
    (lambda: T.item(), ValueError, "one element"),
    (lambda: len(tm.Tensor(1.0)), TypeError, "0-d"),
    (lambda: T + np.ones(2), ValueError, r"add of shapes \(3,\) and \(2,\).*x\[:, None\]"),
    (lambda: T * T.astype(np.float32), TypeError, "multiply of float32 and float64: convert one"),
    (lambda: T @ np.ones((2, 3)), ValueError, "inner sizes 3 and 2 differ"),
    (lambda: T @ tm.Tensor(1.0), ValueError, "0-d Tensor is no matrix"),
    (lambda: tm.ones, AttributeError, "ones"),
    (lambda: T & T, TypeError, "a mask is boolean"),
    (lambda: tm.sum(T, axis=0.5), TypeError, "float"),
    (lambda: tm.matmul(np.ones((2, 3, 3)), np.ones((3, 3, 3))), ValueError, "matmul's stacks of shapes"),
    (lambda: tm.where(T, T, T), TypeError, "a mask is boolean.*compare first"),
    (lambda: tm.where(T > 0, T, np.ones(2)), ValueError, "where of shapes"),
    (lambda: tm.reshape(T, (2, -1)), ValueError, r"\(3,\) has 3 elements, which don't make \(2, -1\)"),
    (lambda: tm.reshape(tm.Tensor([1.0]), -1, -1), ValueError, "don't make"),
    (lambda: tm.squeeze(np.zeros((0, 2)), 1), ValueError, "not of size 1"),
    (lambda: tm.scatter(np.ones(1), [0, 1], 4), ValueError, r"scatter of shape \(1,\).*which has shape \(2,\)"),
    (lambda: tm.pad(T, (-1, 1)), ValueError, "to crop, use a slice"),
    (lambda: tm.sum(T, axis=1), ValueError, "axis 1 of shape .* it has 1 axes"),
    (lambda: tm.sum(T, axis=(0, -1)), ValueError, "each may be named once"),
    (lambda: tm.transpose(T, (1,)), ValueError, "no order of the 1 axes"),
    (lambda: tm.concatenate([T, tm.Tensor([[1.0]])]), ValueError, "concatenate along axis 0"),
    (lambda: tm.stack([T, T[:2]]), ValueError, "one shape"),
    (lambda: tm.broadcast_to(T, (2,)), ValueError, "does not broadcast"),
    (lambda: tm.sum_to(T, (2,)), ValueError, "cannot be summed"),
    (lambda: tm.mean(tm.Tensor(np.ones(0))), ValueError, "nothing to average"),
    (lambda: T[T], TypeError, "integers, slices and booleans"),
    (lambda: T[3], IndexError, "out of bounds"),
    (lambda: tm.squeeze(T, 0), ValueError, "not of size 1"),
]  # fmt: skip


@pytest.mark.parametrize("use, error, message", REFUSED)
def test_errors_say_what_to_do(use, error, message):
    with pytest.raises(error, match=message):
        use()
