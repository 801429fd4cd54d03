"""Networks and losses."""

from functools import partial

import numpy as np
import pytest

import tinymeta as tm

RNG = np.random.default_rng(0)


def test_mlp_is_its_equation():
    params = tm.nn.init_mlp(np.random.default_rng(0), (2, 5, 3, 1), dtype=np.float64)
    assert [p.shape for p in params] == [(2, 5), (1, 5), (5, 3), (1, 3), (3, 1), (1, 1)]
    params = [tm.Tensor(p.data + RNG.standard_normal(p.shape)) for p in params]
    x = RNG.standard_normal((4, 2))
    w1, b1, w2, b2, w3, b3 = (p.data for p in params)
    expected = np.maximum(np.maximum(x @ w1 + b1, 0) @ w2 + b2, 0) @ w3 + b3
    np.testing.assert_allclose(tm.nn.mlp(params, x).data, expected, rtol=1e-14)
    np.testing.assert_allclose(tm.nn.mlp(params[:2], x).data, x @ w1 + b1, rtol=1e-14)


def test_initial_weights_have_the_variance_stated():
    w, b = tm.nn.init_mlp(np.random.default_rng(0), (100, 1000))
    assert w.data.std() == pytest.approx(np.sqrt(2 / 100), rel=0.01) and not b.data.any() and w.dtype == np.float32
    assert tm.nn.init_mlp(np.random.default_rng(0), (100, 1000), scale=1)[0].data.std() == pytest.approx(0.1, rel=0.01)


def test_a_stack_of_networks_is_each_network():
    """Also with as many tasks as examples and features, where a misplaced bias would broadcast unnoticed."""
    tasks = n = features = 4
    singles = [
        tm.nn.init_mlp(np.random.default_rng(i), (features, features, features), np.float64) for i in range(tasks)
    ]
    singles = [[p + 0.1 * i for p in params] for i, params in enumerate(singles)]
    stacked = [tm.stack(ps) for ps in zip(*singles)]
    x, y = RNG.standard_normal((2, tasks, n, features))
    together = tm.nn.mlp(stacked, x)
    for i in range(tasks):
        np.testing.assert_allclose(together.data[i], tm.nn.mlp(singles[i], x[i]).data, rtol=1e-13)
        np.testing.assert_allclose(tm.nn.mse(together, y).data[i], tm.nn.mse(together[i], y[i]).item(), rtol=1e-13)


def test_mlp_derivatives():
    params = [p.data for p in tm.nn.init_mlp(np.random.default_rng(1), (2, 3, 2), np.float64)]
    x = RNG.standard_normal((2, 4, 2))
    tm.check_grads(lambda *params: tm.nn.mlp(params, x), params, order=2)
    tm.check_grads(lambda *params: tm.nn.mlp(params, x, activation=tm.tanh), params, order=3)


def test_mse():
    prediction, target = RNG.standard_normal((2, 3, 5, 2))
    np.testing.assert_allclose(tm.nn.mse(prediction, target).data, ((prediction - target) ** 2).mean((1, 2)))
    assert tm.nn.mse(prediction[0], target[0]).shape == () and tm.nn.mse([[1]], [[3]]).item() == 4
    doubled = [np.concatenate([a, a], axis=1) for a in (prediction, target)]
    np.testing.assert_allclose(tm.nn.mse(*doubled).data, tm.nn.mse(prediction, target).data)
    tm.check_grads(tm.nn.mse, [prediction, target], order=3)
    for wrong in (target[..., 0], target[:, :, :1], target[0]):
        with pytest.raises(ValueError, match="mse needs two of one shape"):
            tm.nn.mse(prediction, wrong)
    with pytest.raises(ValueError, match="mse needs two of one shape"):
        tm.nn.mse(prediction[0, 0], target[0, 0])


def test_cross_entropy():
    logits, labels = RNG.standard_normal((2, 4, 3)), RNG.integers(0, 3, (2, 4))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, labels[..., None], -1)).mean((1, 2))
    np.testing.assert_allclose(tm.nn.cross_entropy(logits, labels).data, expected, rtol=1e-13)
    assert tm.nn.cross_entropy(logits[0], labels[0]).shape == ()
    assert tm.nn.cross_entropy(logits[:0], labels[:0]).shape == (0,)
    tm.check_grads(lambda x: tm.nn.cross_entropy(x, labels), [logits], order=3)


def test_cross_entropy_is_finite_at_huge_logits_and_its_hessian_is_the_known_one():
    for scale in (1.0, 1000.0):
        logits = tm.Tensor(scale * np.array([[1.0, 0.0, -1.0]]))
        for label in range(3):

            def f(x, label=label):
                return tm.nn.cross_entropy(x, np.array([label]))

            p = tm.softmax(logits).data[0]
            (g,) = tm.grad(f(logits), [logits])
            h = tm.hessian(f, [logits])[0][0].data[0, :, 0]
            np.testing.assert_allclose(f(logits).item(), -tm.log_softmax(logits).data[0, label], rtol=1e-14)
            np.testing.assert_allclose(g.data[0], p - np.eye(3)[label], atol=1e-14)
            np.testing.assert_allclose(h, np.diag(p) - np.outer(p, p), atol=1e-14)


def test_losses_and_networks_are_finite_at_awkward_points():
    """Zero weights, zero inputs, equal rows, huge values: values, gradients and Hessian-vector products."""
    labels, target = np.array([0, 1, 2]), np.zeros((3, 3))
    for scale in (0.0, 1.0, 1e4):
        for x in (np.zeros((3, 4)), np.ones((3, 4)), 1e4 * np.eye(3, 4)):
            theta = [scale * t.data for t in tm.nn.init_mlp(np.random.default_rng(0), (4, 5, 3), np.float64)]
            for loss in (lambda y: tm.nn.cross_entropy(y, labels), lambda y: tm.nn.mse(y, target)):

                def f(*theta, x=x, loss=loss):
                    return loss(tm.nn.mlp(theta, x))

                xs = [tm.Tensor(t) for t in theta]
                found = [f(*xs), *tm.grad(f(*xs), xs), *tm.hvp(f, xs, [np.ones(t.shape) for t in theta])]
                assert all(np.isfinite(t.data).all() for t in found)


def test_every_layer_and_solver_is_known_to_the_tests():
    """A new one fails here until its derivatives are checked, in this file, test_conv.py or test_solvers.py."""

    def own(module):
        return {name for name, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__}

    assert own(tm.nn) - {"init_blocks", "blocks_of", "row"} == {
        "init_mlp",
        "mlp",
        "batch_norm",
        "init_convnet",
        "convnet",
        "init_dense",
        "dense",
        "mse",
        "cross_entropy",
    }
    rules = {"sgd", "momentum", "nesterov", "adam", "step", "clip", "clipped"}
    checks = {
        "parameters",
        "alongside",
        "with_momentum",
        "like",
        "step_sizes",
        "update",
        "of_tasks",
        "checked",
        "solution_of",
    }
    solvers = {"gradient_descent", "trajectory", "hessian_free", "cg", "neumann"}
    assert own(tm.solvers) == rules | solvers | {"dot", "Solution", "per_task", "largest", "size"} | checks


def test_bad_input():
    x = np.zeros((2, 3))
    for labels in (np.zeros(2), np.zeros((2, 1), int), np.zeros(3, int), np.zeros(2, bool)):
        with pytest.raises(ValueError, match="cross_entropy needs logits"):
            tm.nn.cross_entropy(x, labels)
    for labels in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="for logits of 3 classes"):
            tm.nn.cross_entropy(x, np.array(labels))
    with pytest.raises(ValueError, match="cross_entropy needs logits"):
        tm.nn.cross_entropy(np.zeros(3), np.array(1))
    w, b = np.zeros((3, 2)), np.zeros((1, 2))
    for params in ([], [w], [w, b, w]):
        with pytest.raises(ValueError, match="W_1, b_1"):
            tm.nn.mlp(params, x)
    assert tm.nn.dense([w, b], x).shape == (2, 2)  # nothing but a head
    for params in ([], [w], [w, b, b], [w, b, b, w]):
        with pytest.raises(ValueError, match="dense takes three parameters for each block"):
            tm.nn.dense(params, x)
    with pytest.raises(ValueError, match="eps"):
        tm.nn.batch_norm(x, eps=float("nan"))
    assert [p.shape for p in tm.nn.init_dense(RNG, 1, features=[1], inputs=1)] == [(1, 1)] * 5
    with pytest.raises(ValueError, match="features of input and output"):
        tm.nn.init_mlp(np.random.default_rng(0), (3,))


def test_biases_that_are_no_rows_are_refused():
    """Stacked over as many tasks as there are examples, a bias (features,) would fit, and go to the wrong places."""
    rng = np.random.default_rng(0)
    x, w, row, other = (rng.standard_normal(shape) for shape in [(3, 3, 2), (3, 2, 4), (3, 1, 4), (3, 4)])
    head, head_row, flat = rng.standard_normal((3, 4, 5)), np.zeros((3, 1, 5)), np.zeros((3, 5))
    refused = partial(pytest.raises, ValueError, match=r"are rows \(..., 1, features\), got shape \(3, [45]\)")
    tm.nn.mlp([w, row, head, head_row], x)
    for params in ([w, other, head, head_row], [w, row, head, flat]):
        with refused():
            tm.nn.mlp(params, x)
    tm.nn.dense([w, row, row, head, head_row], x)
    for params in ([w, other, row, head, head_row], [w, row, other, head, head_row], [w, row, row, head, flat]):
        with refused():
            tm.nn.dense(params, x)
    one = tm.nn.mlp([w[0], other[0], head[0], flat[0]], x[0])  # of a single task
    np.testing.assert_array_equal(one.data, tm.nn.mlp([w[0], other[:1], head[0], flat[:1]], x[0]).data)
