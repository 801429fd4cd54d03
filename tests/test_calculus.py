"""jvp, hvp and hessian against closed forms, dense matrices and finite differences."""

import tracemalloc

import numpy as np
import pytest

import tinymeta as tm

RNG = np.random.default_rng(0)
A = RNG.standard_normal((6, 6))


def quartic(x, y):
    """A scalar of two inputs whose Hessian couples them."""
    return tm.sum(tm.sin(x @ A[:3, :3]) * x) ** 2 + tm.sum(x * y) * tm.sum(y**3)


def pair():
    return [tm.Tensor(RNG.standard_normal(3)), tm.Tensor(RNG.standard_normal((2, 3)))]


def dense(blocks):
    n = [int(np.sqrt(blocks[i][i].size)) for i in range(len(blocks))]
    return np.block([[b.data.reshape(n[i], n[j]) for j, b in enumerate(row)] for i, row in enumerate(blocks)])


def flat(tensors):
    return np.concatenate([t.data.ravel() for t in tensors])


def test_jvp_is_the_directional_derivative():
    x, v, h = RNG.standard_normal(3), RNG.standard_normal(3), 1e-6

    def f(x):
        return tm.exp(x[:2]) * tm.sum(x)

    y, tangent = tm.jvp(f, [tm.Tensor(x)], [v])
    np.testing.assert_array_equal(y.data, f(tm.Tensor(x)).data)
    numeric = (f(tm.Tensor(x + h * v)).data - f(tm.Tensor(x - h * v)).data) / (2 * h)
    np.testing.assert_allclose(tangent.data, numeric, rtol=1e-8)


def test_jvp_can_be_differentiated():
    tm.check_grads(lambda x, v: tm.jvp(tm.tanh, [x], [v])[1], [RNG.standard_normal(3), RNG.standard_normal(3)])


def test_hessian_is_symmetric_and_right():
    xs = pair()
    h = dense(tm.hessian(quartic, xs))
    np.testing.assert_allclose(h, h.T, rtol=1e-10, atol=1e-10)
    shapes = [[b.shape for b in row] for row in tm.hessian(quartic, xs)]
    assert shapes == [[(3, 3), (3, 2, 3)], [(2, 3, 3), (2, 3, 2, 3)]]
    s = A + A.T
    np.testing.assert_allclose(tm.hessian(lambda x: 0.5 * x @ s @ x, [tm.Tensor(np.ones(6))])[0][0].data, s)


def test_hvp_is_the_hessian_times_v():
    xs = pair()
    vs = [RNG.standard_normal(x.shape) for x in xs]
    product = flat(tm.hvp(quartic, xs, vs))
    np.testing.assert_allclose(product, dense(tm.hessian(quartic, xs)) @ flat(map(tm.Tensor, vs)), rtol=1e-10)


def test_hvp_is_a_leaf_by_default_and_takes_any_iterable():
    x = tm.Tensor([1.0, 2.0])
    (h,) = tm.hvp(lambda x: tm.sum(x**3), iter([x]), [np.ones(2)])
    assert h.data.tolist() == [6, 12] and not h.inputs


def test_hvp_can_be_differentiated():
    tm.check_grads(lambda x, v: tm.hvp(lambda x: tm.sum(x**4), [x], [v], create_graph=True)[0], [np.ones(3), A[0, :3]])


def test_bad_directions_and_outputs():
    x = tm.Tensor(np.ones(3))
    with pytest.raises(TypeError, match="jvp: f returns one Tensor, got a list"):
        tm.jvp(lambda x: [x, x], [x], [np.ones(3)])
    for directions in ([np.ones(2)], []):
        with pytest.raises(ValueError, match="one direction for each x: of shapes"):
            tm.jvp(tm.sin, [x], directions)
        with pytest.raises(ValueError, match="one direction for each x: of shapes"):
            tm.hvp(lambda x: tm.sum(x**3), [x], directions)


def test_hvp_of_a_linear_function_is_zero():
    (product,) = tm.hvp(lambda x: tm.sum(2 * x), [tm.Tensor(np.ones(3))], [np.ones(3)])
    np.testing.assert_array_equal(product.data, np.zeros(3))


def test_hvp_takes_linear_memory():
    n = 100_000  # a Hessian would need 80 GB
    x, v = tm.Tensor(np.linspace(0, 1, n)), np.ones(n)
    tracemalloc.start()
    (product,) = tm.hvp(lambda x: tm.sum(tm.sin(x)) * tm.sum(x), [x], [v])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * x.data.nbytes
    expected = -np.sin(x.data) * x.data.sum() + np.cos(x.data) * n + np.cos(x.data).sum()
    np.testing.assert_allclose(product.data, expected, rtol=1e-10)


def test_relu_networks_have_second_derivatives():
    """relu'' = 0, yet the Hessian of w₂ relu(w₁ x) is not: its mixed blocks survive."""
    x, w1, w2 = tm.Tensor(1.5), tm.Tensor(0.7), tm.Tensor(-0.4)
    h = tm.hessian(lambda x, w1, w2: w2 * tm.relu(w1 * x), [x, w1, w2])
    np.testing.assert_allclose([[b.item() for b in row] for row in h], [[0, -0.4, 0.7], [-0.4, 0, 1.5], [0.7, 1.5, 0]])


def test_a_tensor_at_two_positions_is_two_arguments():
    """f = a² b at a = b = 2: ∂f/∂a = 8, ∂f/∂b = 4, H = [[2b, 2a], [2a, 0]]."""
    x, f = tm.Tensor(2.0), lambda a, b: a * a * b
    assert [part.item() for part in tm.jvp(f, [x, x], [1.0, 0.0])] == [8, 8]
    assert [h.item() for h in tm.hvp(f, [x, x], [1.0, 0.0])] == [4, 4]
    assert [[h.item() for h in row] for row in tm.hessian(f, [x, x])] == [[4, 4], [4, 0]]
