"""Every op, alone: `pytest tests/test_ops.py -v` ends with a table of ops, inputs, domains and errors by order.

The derivatives to third order in every input and in the cotangent, on the op and inside a nonlinear function (a linear
op's own second derivative is 0 whatever its pullback does); the values against NumPy; the singular points; sabotage.
"""

import inspect

import numpy as np
import pytest

import tinymeta as tm
from tinymeta import ops, tensor

RNG = np.random.default_rng(0)


def real(*shape):
    return RNG.standard_normal(shape)


def positive(*shape):
    return RNG.uniform(0.5, 2.0, shape)


def apart(*shape):
    """No two values closer than 0.1, none closer than 0.1 to 0: away from the kinks of abs, relu and max."""
    n = int(np.prod(shape))
    return RNG.permutation(np.linspace(-1.0, 1.0, n + n % 2 + 2)[:n]).reshape(shape) * (0.1 * n + 1)


MASK = np.array([[True, False, True, False]])
POSITIONS = np.array([2, 0, 2])

# op: (function, arguments, domain) or several of them; NumPy's function of the same name must agree in value
TABLE = {
    "abs": [(tm.abs, [apart(3, 4)], "x ≠ 0")],
    "add": [(tm.add, [real(3, 4), real(4)], "ℝ"), (tm.add, [real(), real(2, 1)], "ℝ"), (tm.add, [real(0, 3), real(1, 3)], "ℝ")],
    "broadcast_to": [(lambda x: tm.broadcast_to(x, (2, 3, 4)), [real(3, 1)], "ℝ")],
    "concatenate": [(lambda x, y: tm.concatenate([x, y], axis=-1), [real(2, 1), real(2, 3)], "ℝ")],
    "cos": [(tm.cos, [real(3)], "ℝ")],
    "divide": [(tm.divide, [real(3, 1), positive(4)], "y ≠ 0")],
    "exp": [(tm.exp, [real(3)], "ℝ")],
    "gather": [
        (lambda x: tm.gather(x, (slice(None, None, 2), -1)), [real(3, 4)], "ℝ"),
        (lambda x: tm.gather(x, (..., None, POSITIONS)), [real(2, 3)], "ℝ, an array of positions"),
        (lambda x: tm.gather(x, (POSITIONS, slice(1), tm.Tensor([1, 1, 0]))), [real(3, 2, 2)], "ℝ, two arrays"),
        (lambda x: tm.gather(x, tm.Tensor(x).data > 0), [apart(3, 2)], "ℝ, a boolean mask"),
        (lambda x: tm.gather(x, ((0, 0),)), [real(3)], "ℝ, a tuple of positions"),
        (lambda x: tm.gather(x, (slice(None), (0, 0, 2))), [real(2, 3)], "ℝ, a tuple of positions"),
        (lambda x: tm.gather(x, ()), [real(2)], "ℝ"),
        (lambda x: tm.gather(x, ...), [real(2)], "ℝ"),
    ],
    "log": [(tm.log, [positive(3)], "x > 0")],
    "log1p": [(tm.log1p, [positive(3)], "x > −1")],
    "log_softmax": [(tm.log_softmax, [real(2, 3)], "ℝ"), (lambda x: tm.log_softmax(x, 0), [real(3, 2)], "ℝ")],
    "logsumexp": [(tm.logsumexp, [real(2, 3)], "ℝ"), (lambda x: tm.logsumexp(x, (0, -1), keepdims=True), [real(2, 2, 2)], "ℝ")],
    "matmul": [
        (tm.matmul, [real(*a), real(*b)], "ℝ")
        for a, b in [((2, 3), (3, 2)), ((3,), (3,)), ((3,), (3, 2)), ((2, 3), (3,)), ((2, 1, 2, 3), (3, 3, 1)),
                     ((3,), (2, 3, 2)), ((2, 2, 3), (3,)), ((1, 2, 3), (2, 3, 2)), ((2, 2), (2, 2, 2, 1)), ((2, 2, 1, 2), (2, 2))]
    ],
    "max": [(tm.max, [apart(2, 3)], "no ties"), (lambda x: tm.max(x, -1, keepdims=True), [apart(2, 3)], "no ties"),
            (lambda x: tm.max(x, (0, 2)), [apart(2, 2, 2)], "no ties")],
    "mean": [(tm.mean, [real(2, 3)], "ℝ"), (lambda x: tm.mean(x, -2), [real(2, 3)], "ℝ")],
    "min": [(lambda x: tm.min(x, 0), [apart(3, 2)], "no ties")],
    "multiply": [(tm.multiply, [real(3, 1), real(1, 4)], "ℝ"), (tm.multiply, [real(), real()], "ℝ")],
    "negative": [(tm.negative, [real(3)], "ℝ")],
    "pad": [(lambda x: tm.pad(x, ((1, 0), (0, 2))), [real(2, 3)], "ℝ"), (lambda x: tm.pad(x, 1), [real(2)], "ℝ")],
    "power": [
        (tm.power, [positive(3, 1), real(2)], "x > 0"),
        (tm.power, [positive(4), np.array([0.0, 1.0, 2.0, 3.0])], "x > 0, whole exponents"),
        (lambda x: tm.power(x, 3), [real(3)], "ℝ, whole exponents"),
        (lambda x: tm.power(x, -1.5), [positive(3)], "x > 0"),
        (lambda x: tm.power(x, -1), [positive(3)], "x ≠ 0"),
        (lambda x: tm.power(2, x), [real(3)], "ℝ"),
    ],
    "relu": [(tm.relu, [apart(3, 4)], "x ≠ 0")],
    "reshape": [(lambda x: tm.reshape(x, (3, -1)), [real(2, 6)], "ℝ")],
    "scatter": [
        (lambda x: tm.scatter(x, POSITIONS, (4,)), [real(3)], "ℝ, repeated positions"),
        (lambda x: tm.scatter(x, (slice(1, 3), -1), (4, 2)), [real(2)], "ℝ"),
    ],
    "sigmoid": [(tm.sigmoid, [real(3)], "ℝ")],
    "sin": [(tm.sin, [real(3)], "ℝ")],
    "softmax": [(tm.softmax, [real(2, 3)], "ℝ")],
    "softplus": [(tm.softplus, [real(3)], "ℝ")],
    "sqrt": [(tm.sqrt, [positive(3)], "x > 0")],
    "squeeze": [(lambda x: tm.squeeze(x, (0, -1)), [real(1, 3, 1)], "ℝ")],
    "stack": [(lambda x, y: tm.stack([x, y, x], axis=-2), [real(2, 3), real(2, 3)], "ℝ")],
    "subtract": [(tm.subtract, [real(1, 3), real(2, 1)], "ℝ")],
    "sum": [(tm.sum, [real(2, 3)], "ℝ"), (lambda x: tm.sum(x, (0, -1), keepdims=True), [real(2, 3, 2)], "ℝ"), (tm.sum, [real()], "ℝ")],
    "sum_to": [(lambda x: tm.sum_to(x, (3, 1)), [real(2, 3, 4)], "ℝ"), (lambda x: tm.sum_to(x, ()), [real(2, 2)], "ℝ")],
    "swapaxes": [(lambda x: tm.swapaxes(x, 0, -1), [real(2, 1, 3)], "ℝ")],
    "tanh": [(tm.tanh, [real(3)], "ℝ")],
    "transpose": [(tm.transpose, [real(2, 3)], "ℝ"), (lambda x: tm.transpose(x, (1, -1, 0)), [real(2, 3, 1)], "ℝ")],
    "where": [(lambda x, y: tm.where(MASK, x, y), [real(3, 1), real(4)], "ℝ"), (lambda x: tm.where(MASK, 0, x), [real(3, 4)], "ℝ"),
              (lambda x, y: tm.where(MASK, x, y), [real(1), real(1)], "ℝ, a larger mask"),
              (lambda x: tm.where(MASK, x, 0), [real()], "ℝ, a larger mask"),
              (lambda x: tm.where(MASK, x, 0), [real(3, 4)], "ℝ")],
}  # fmt: skip

# Piecewise constant: the derivative is 0, of the input's shape.
CONSTANT = {
    "equal": tm.equal,
    "greater": tm.greater,
    "greater_equal": tm.greater_equal,
    "less": tm.less,
    "less_equal": tm.less_equal,
    "not_equal": tm.not_equal,
    "sign": tm.sign,
}
OF_MASKS = {"logical_and", "logical_not", "logical_or"}  # take booleans, which have no derivative
OF_TYPES = {"astype"}  # beyond float64, where finite differences tell nothing: test_astype
IN_TEST_CONV = {"average_pool", "conv2d", "global_average", "max_pool", "patches", "unpatch"}
NOT_OPS = {
    "GradientError",
    "KinkError",
    "Tensor",
    "check_grads",
    "draw",
    "grad",
    "hessian",
    "hvp",
    "compile",
    "jvp",
    "stop_gradient",
    "vjp",
}


def rows_of(names):
    """Parametrises a test over the table's rows of these ops, by op, shapes and domain."""
    rows = [
        pytest.param(name, op, xs, id=f"{name} {' '.join(str(x.shape) for x in xs)} {domain}")
        for name in names
        for op, xs, domain in TABLE[name]
    ]
    return pytest.mark.parametrize("name, op, xs", rows)


each_row = rows_of(TABLE)


def test_the_table_lists_every_public_op():
    public = {name for name, value in vars(tm).items() if callable(value) and not name.startswith("_")}
    assert public - NOT_OPS == set(TABLE) | set(CONSTANT) | OF_MASKS | OF_TYPES | IN_TEST_CONV
    ours = {f.__name__ for f in vars(ops).values() if inspect.isfunction(f) and f.__module__ == ops.__name__}
    assert {
        name for name in ours if (getattr(getattr(ops, name, None), "__doc__", None) or "")[:2] in ("z ", "y ", "y_")
    } <= public


@each_row
def test_derivatives_to_third_order(name, op, xs, record_property):
    alone = tm.check_grads(op, xs, order=3)
    inside = tm.check_grads(lambda *xs: tm.sin(1.3 * op(*xs)), xs, order=3)
    record_property("errors", [max(pair) for pair in zip(alone, inside)])


@rows_of(name for name in TABLE if hasattr(np, name))
def test_value_is_numpys(name, op, xs, monkeypatch):
    y = op(*xs)
    if op is getattr(tm, name):
        expected = getattr(np, name)(*xs)
    else:  # a lambda of the table: the same line with NumPy under the name tm
        monkeypatch.setitem(op.__globals__, "tm", np)
        expected = op(*xs)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    np.testing.assert_allclose(y.data, expected, rtol=1e-14)


def test_values_of_ops_that_numpy_lacks():
    x = real(2, 3)
    e = np.exp(x)
    expected = {
        tm.relu: np.maximum(x, 0), tm.sigmoid: 1 / (1 + np.exp(-x)), tm.softplus: np.log(1 + e),
        tm.softmax: e / e.sum(-1, keepdims=True), tm.log_softmax: np.log(e / e.sum(-1, keepdims=True)),
        tm.logsumexp: np.log(e.sum()),
    }  # fmt: skip
    for op, value in expected.items():
        np.testing.assert_allclose(op(x).data, value, rtol=1e-13, err_msg=op.__name__)
    np.testing.assert_array_equal(tm.scatter([1.0, 2.0, 4.0], POSITIONS, 4).data, [2, 0, 5, 0])
    np.testing.assert_array_equal(tm.sum_to(np.ones((2, 3, 4)), (3, 1)).data, [[8], [8], [8]])
    np.testing.assert_array_equal(tm.sum_to(np.ones((2, 3)), 3).data, [2, 2, 2])
    np.testing.assert_array_equal(tm.squeeze(np.ones((1, 2, 1)), -1).data, [[1, 1]])


@each_row
def test_arrays_and_lists_are_constants(name, op, xs):
    """What is given as one is a leaf of the graph."""
    y, z = op(*xs), op(*[x.tolist() if x.size else x for x in xs])
    assert all(isinstance(node, tm.Tensor) for node in tensor.graph(y, z))
    np.testing.assert_array_equal(y.data, z.data)


def test_masks_are_arrays_lists_or_tensors():
    for mask in ([True, False], np.array([True, False]), tm.Tensor([True, False])):
        for z in (
            tm.logical_not(mask),
            tm.logical_and(mask, mask),
            tm.logical_or(mask, mask),
            tm.where(mask, 1.0, 0.0),
        ):
            assert z.data.tolist() == ([False, True] if z.op == "logical_not" else [True, False])
            assert all(isinstance(node, tm.Tensor) for node in tensor.graph(z))


def test_ops_have_their_names():
    x = tm.Tensor(real(2, 3))
    linear = [x.reshape(6), x.T, x[0], tm.broadcast_to(x, (2, 2, 3)), tm.scatter(x[0], 0, (1, 3)), x.astype(np.float32)]
    assert [y.op for y in linear] == ["reshape", "transpose", "gather", "broadcast_to", "scatter", "astype"]
    assert all(op.__name__ == name == (op(x, 0) if op is not tm.sign else op(x)).op for name, op in CONSTANT.items())


def test_powers():
    x = positive(5)
    for exponent in np.arange(-30, 31) / 10:
        np.testing.assert_allclose(tm.power(x, exponent).data, x**exponent, rtol=1e-14)
        if exponent % 1 == 0:
            np.testing.assert_allclose(tm.power(x, int(exponent)).data, x**exponent, rtol=1e-14)


def test_something_times_itself():
    """Which is a square, where it can be differentiated."""
    x, i = tm.Tensor(real(3)), tm.Tensor([1, 2])
    assert (x * x).kernel.keywords == {"exponent": 2}
    assert (i * i).dtype == i.dtype and (i * i).data.tolist() == [1, 4]
    assert tm.multiply(x.data, x.data).data.tolist() == (x.data * x.data).tolist()
    assert tm.multiply(*[3] * 2).item() == 9


INDICES = [2, -1, slice(None), slice(3, 0, -2), ..., None, (1, ..., 0), (slice(1, None), None, -1), ([0, 2, 0],), (..., [1, 1]),
           ([0, 1], [2, 3]), ([0, 1], slice(None), [1]), np.arange(4)[:, None], np.array([True, False, True, False]), ()]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_is_numpys(index):
    x = real(4, 4, 4)
    np.testing.assert_array_equal(tm.Tensor(x)[index].data, x[index])
    arrays_as_tensors = tuple(
        tm.Tensor(i) if isinstance(i, (list, np.ndarray)) else i
        for i in (index if isinstance(index, tuple) else (index,))
    )
    np.testing.assert_array_equal(tm.Tensor(x)[arrays_as_tensors].data, x[index])


def test_an_empty_list_is_an_index():
    assert tm.Tensor(real(4, 3))[[]].shape == tm.Tensor(real(4, 3))[[], :].shape == (0, 3)


BINARY = [
    lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x * y, lambda x, y: x / y, lambda x, y: y**x, lambda x, y: x @ y,
    lambda x, y: x > y, lambda x, y: x >= y, lambda x, y: x < y, lambda x, y: x <= y, lambda x, y: x == y,
    lambda x, y: x != y, lambda x, y: (x > 0) & (y > 1) | ~(x < y),
]  # fmt: skip
OTHERS = [
    lambda x: -x + abs(x), lambda x: 2 - x, lambda x: 1 / x, lambda x: 2**x, lambda x: x.T[0] * x.sum(axis=0),
    lambda x: x.mean() + x.max(), lambda x: x.reshape((4,)), lambda x: x.reshape(2, -1, 1), lambda x: x.swapaxes(0, 1),
    lambda x: x.min(1), lambda x: x.transpose((1, 0)), lambda x: x.transpose(1, 0), lambda x: x[None].squeeze(),
]  # fmt: skip


def test_operators():
    a, b = real(2, 2), positive(2, 2)
    x, y = tm.Tensor(a), tm.Tensor(b)
    results = [(f(*pair), f(a, b)) for f in BINARY for pair in [(x, y), (a, y), (x, b)]]  # an array on either side
    results += [(f(x, x), f(a, a)) for f in BINARY[6:12]]
    for result, expected in results + [(f(x), f(a)) for f in OTHERS]:
        assert isinstance(result, tm.Tensor)
        np.testing.assert_allclose(result.data, expected, rtol=1e-15)


# ---- adjoint pairs ---------------------------------------------------------------------------------------------------

LINEAR = ["broadcast_to", "concatenate", "gather", "negative", "pad", "reshape", "scatter", "squeeze", "stack",
          "sum", "sum_to", "swapaxes", "transpose", "mean"]  # fmt: skip


@rows_of(LINEAR)
def test_adjoint_identity(name, op, xs):
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩"""
    xs = [tm.Tensor(x) for x in xs]
    z = op(*xs)
    y = tm.Tensor(real(*z.shape))
    left = float((z.data * y.data).sum())
    right = sum(float((x.data * g.data).sum()) for x, g in zip(xs, tm.vjp(z, xs, y)))
    assert left == pytest.approx(right, rel=1e-12, abs=1e-12)


# ---- singular and awkward points: value, first and second derivative -------------------------------------------------


def orders(f, x):
    """f, f', f'' at a number."""
    x = tm.Tensor(float(x))
    y = f(x)
    (d1,) = tm.grad(y, [x], create_graph=True)
    (d2,) = tm.grad(d1, [x])
    return [y.item(), d1.item(), d2.item()]


AWKWARD = [
    (tm.relu, 0, [0, 0, 0]), (tm.relu, 1e-300, [1e-300, 1, 0]), (tm.relu, -1e4, [0, 0, 0]), (tm.relu, 1e4, [1e4, 1, 0]),
    (tm.abs, 0, [0, 0, 0]), (tm.abs, -1e4, [1e4, -1, 0]), (tm.sign, 0, [0, 0, 0]),
    (tm.softplus, 0, [np.log(2), 0.5, 0.25]), (tm.softplus, 1e4, [1e4, 1, 0]), (tm.softplus, -1e4, [0, 0, 0]),
    (tm.sigmoid, 0, [0.5, 0.25, 0]), (tm.sigmoid, 1e4, [1, 0, 0]), (tm.sigmoid, -1e4, [0, 0, 0]),
    (tm.sigmoid, -50, [np.exp(-50)] * 3), (tm.tanh, 1e4, [1, 0, 0]), (tm.tanh, 0, [0, 1, 0]),
    (lambda x: x**2, 0, [0, 0, 2]), (lambda x: x**1, 0, [0, 1, 0]), (lambda x: x**0, 0, [1, 0, 0]),
    (lambda x: x ** tm.Tensor(2.0), 0, [0, 0, 2]), (lambda y: tm.Tensor(0.0) ** y, 2, [0, 0, 0]), (lambda x: x**3.0, 0, [0, 0, 0]),
    (lambda x: tm.logsumexp(tm.stack([x, x])), 1e4, [1e4 + np.log(2), 1, 0]),
    (lambda x: tm.logsumexp(tm.stack([x, -np.inf * tm.exp(0 * x).data])), 1, [1, 1, 0]),
    (lambda x: tm.log_softmax(tm.stack([x, x - 1000]))[1], 0, [-1000, 0, 0]),
    (lambda x: tm.max(tm.stack([x, 3 * x, 3 * x])), 1, [3, 3, 0]), (lambda x: tm.max(tm.stack([x, 3 * x, 5 * x])), 0, [0, 3, 0]),
    (lambda x: tm.where(x > 0, tm.sqrt(tm.where(x > 0, x, 1)), 0), 0, [0, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize("f, x, expected", AWKWARD)
def test_awkward_points(f, x, expected):
    np.testing.assert_allclose(orders(f, x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("two", [2, tm.Tensor(2.0)], ids=str)
def test_a_square_ends_after_its_second_derivative(two):
    x = tm.Tensor(0.0)
    y = x**two
    for expected in (0, 2, 0, 0):
        (y,) = tm.grad(y, [x], create_graph=True)
        assert y.item() == expected


def test_logsumexp_of_nothing_but_minus_infinity():
    with np.errstate(divide="ignore"):
        assert tm.logsumexp(np.full(3, -np.inf)).item() == -np.inf


def test_ties_of_max_share():
    x = tm.Tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    (g,) = tm.vjp(tm.max(x, axis=1), [x], [1.0, 1.0])
    np.testing.assert_allclose(g.data, [[0, 0.5, 0.5], [1 / 3] * 3])
    (g,) = tm.vjp(tm.min(x, axis=1), [x], [1.0, 1.0])
    np.testing.assert_allclose(g.data, [[1, 0, 0], [1 / 3] * 3])


def test_where_selects_the_very_bits():
    """Of every type, also −0, ∞ and NaN, of strided and broadcast arrays, and into a buffer."""
    special = np.array([[0.0, -0.0, np.inf, -np.inf], [np.nan, 1.5, -2.0, 5e-324]])
    mask = np.array([[True, False, True, False], [False, True, False, True]])
    for dtype in ("f4", "f8", "i8", "i4", "u1", "?"):
        with np.errstate(invalid="ignore", over="ignore"):
            x, other = special.astype(dtype), special[::-1, ::-1].astype(dtype)
        for y in (x, x.T.copy().T, other, other[:1], np.array(0, dtype), np.array(-0.0).astype(dtype), x[1, 2, ...]):
            for pair in ((x, y), (y, x)):
                z, buffer = tm.where(mask, *pair), np.ones(mask.shape, dtype)
                expected = np.where(mask, *pair)
                assert z.data.tobytes() == expected.tobytes() and z.dtype == expected.dtype
                assert z.kernel(mask, *pair, out=buffer) is buffer and buffer.tobytes() == expected.tobytes()


def test_nan_is_not_hidden():
    with np.errstate(invalid="ignore"):
        for op in (tm.relu, tm.abs, tm.max, tm.softplus, tm.softmax):
            assert np.isnan(op(np.array([np.nan, 1.0])).data).any(), op.__name__


# ---- types -----------------------------------------------------------------------------------------------------------


@each_row
def test_float32_stays_float32(name, op, xs):
    xs = [tm.Tensor(x.astype(np.float32)) for x in xs]
    y = op(*xs)
    g = tm.vjp(y, xs, np.ones(y.shape), create_graph=True)
    gg = tm.vjp(g, xs, [np.ones(x.shape) for x in g])
    assert {t.dtype for t in [y, *g, *gg]} == {np.dtype(np.float32)}


FLOATING = [tm.abs, tm.cos, tm.exp, tm.log, tm.log1p, tm.log_softmax, tm.logsumexp, tm.mean, tm.relu, tm.sigmoid, tm.sin,
            tm.softmax, tm.softplus, tm.sqrt, tm.tanh, lambda x: tm.power(x, -1)]  # fmt: skip


@pytest.mark.parametrize("op", FLOATING, ids=lambda op: op.__name__)
def test_integers_become_float64(op):
    """Where NumPy would take float16 for the short ones."""
    expected = op(np.array([2.0])).data
    for x in ([2], np.array([2], np.uint8), tm.Tensor(np.array([2], np.int16))):
        y = op(x)
        assert (y.data == expected).all() and y.dtype == np.float64


def test_numbers_take_the_type_of_the_tensor():
    x = tm.Tensor(np.float32(2))
    for y in (
        x * 2,
        2.5 - x,
        x / np.float64(3),
        x**2,
        2.0**x,
        x**-0.5,
        tm.where(x > 0, x, 0),
        x * np.int64(2),
        x + True,
    ):
        assert y.dtype == np.float32
    i = tm.Tensor(np.arange(3))
    assert (i + 1).dtype == np.int64 and (i + 0.5).dtype == np.float64 and (i / 2).dtype == np.float64
    assert (i**i).dtype == (2**i).dtype == np.float64 and (x**i).dtype == np.float32
    np.testing.assert_array_equal(((i > 0) + 1).data, [1, 2, 2])
    np.testing.assert_array_equal((1 - (i > 0)).data, [1, 0, 0])
    assert (tm.Tensor(np.uint8(44)) + np.int64(300)).item() == 344 and not ((i > 0) == 2).data.any()
    assert (i * x).dtype == np.float32 and tm.exp(i).dtype == np.float64 and tm.where(i > 0, x, 0).dtype == np.float32


def test_astype():
    """Linear between the floats, to any order; from and to integers it is constant."""
    x = tm.Tensor(np.array([1.5, -2.5], np.float32))
    y = x.astype(np.float64)
    (g,) = tm.vjp(y * y * y, [x], np.array([1.0, 2.0]), create_graph=True)
    (gg,) = tm.vjp(g, [x], np.ones(2, np.float32))
    assert (y.dtype, g.dtype, gg.dtype) == (np.float64, np.float32, np.float32)
    np.testing.assert_array_equal(g.data, [6.75, 37.5])
    np.testing.assert_array_equal(gg.data, [9, -30])
    (g,) = tm.grad(tm.sum(x.astype(np.int64).astype(np.float32)), [x])
    np.testing.assert_array_equal(g.data, [0, 0])
    for dtype in (np.float16, complex, object, str):
        with pytest.raises(TypeError, match="dtype must be float32"):
            x.astype(dtype)
    assert (tm.astype([1.5, -2.5], "float32") == x).data.all() and tm.astype([1.5], int).data.tolist() == [1]
    compiled = tm.compile(lambda x: x.astype(np.int64))
    assert compiled(x).data.tolist() == [1, -2]


@pytest.mark.parametrize(
    "shape, new",
    [((0, 3), (0, -1)), ((0, 3), (-1, 0)), ((2, 3), (-1, -1)), ((2, 2), (-2, -2)), ((2, 3), (3,)), ((2, 3), (-1, 4))],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(shape, new):
    with pytest.raises(ValueError, match="which don't make"):
        tm.reshape(np.ones(shape), new)


@pytest.mark.parametrize("width", [-1, 0.5, (1, 2, 3), ((1, 1),) * 3, ((1,),) * 3], ids=str)
def test_widths_that_do_not_fit_are_refused(width):
    with pytest.raises(ValueError, match="pad: widths are 0 or more"):
        tm.pad(np.ones((2, 3)), width)


@pytest.mark.parametrize("axis", [2, 5, -3, -7, (0, 0), (0, -2), (0, 2), 1.0])
def test_axes_that_do_not_exist_are_refused(axis):
    with pytest.raises((ValueError, TypeError)):
        tm.sum(np.ones((2, 3)), axis)


def test_matmul_and_min_keep_types():
    w = tm.Tensor(np.ones((2, 2), np.float32))
    for pair in [(w, 2), (2, w), (w, tm.Tensor(np.float32(2)))]:
        with pytest.raises(ValueError, match="a 0-d Tensor is no matrix"):
            tm.matmul(*pair)
    assert (np.arange(4).reshape(2, 2) @ w).dtype == np.float32
    with pytest.raises(TypeError, match="matmul of float32 and float64"):
        np.ones((2, 2)) @ w
    assert tm.min(np.array([3, 1, 2], np.uint8)).item() == 1 and tm.min(np.array([True, False])).item() is False


def test_an_index_that_changes_later_changes_nothing():
    x, index = tm.Tensor([1.0, 2.0, 3.0]), [0, 1]
    y = tm.sum(x[index])
    index[0] = 2
    np.testing.assert_array_equal(tm.grad(y, [x])[0].data, [1, 1, 0])


def test_integers_and_masks_are_data():
    x = tm.Tensor([1.0, -2.0])
    (g,) = tm.grad(tm.sum((x > 0) * x + np.array([1, 2]) * x), [x])
    np.testing.assert_array_equal(g.data, [2, 2])
    x = tm.Tensor(np.array([1.5, 2.5], np.float32))
    (g,) = tm.grad(tm.sum(x.astype(np.float64) ** 2), [x])
    np.testing.assert_array_equal(g.data, np.array([3, 5], np.float32))
    assert g.dtype == np.float32


@pytest.mark.parametrize("op", CONSTANT.values(), ids=str)
def test_piecewise_constant_ops_have_gradient_zero(op):
    x = tm.Tensor(apart(3))
    y = op(x) if op is tm.sign else op(x, 0.05)
    (g,) = tm.grad(tm.sum(y.astype(np.float64)), [x])
    np.testing.assert_array_equal(g.data, np.zeros(3))


# ---- sabotage: the table's own checks must be able to fail -----------------------------------------------------------


@pytest.fixture
def sabotage(monkeypatch):
    """Changes every pullback that the forward ops record, and leaves those made by pullbacks alone."""

    def install(change):
        def apply(kernel, *inputs, pullbacks=()):
            if tensor.state.origin is None:
                pullbacks = tuple(p and (lambda z, z_bar, p=p: change(p(z, z_bar))) for p in pullbacks)
            return tensor.apply(kernel, *inputs, pullbacks=pullbacks)

        monkeypatch.setattr(ops, "apply", apply)

    return install


@each_row
def test_sabotage_of_the_first_order_is_caught(name, op, xs, sabotage):
    if any(x.size == 0 for x in xs):
        return  # nothing there that could be wrong
    sabotage(lambda x_bar: x_bar * 1.001)
    with pytest.raises(tm.GradientError, match="order 1"):
        tm.check_grads(op, xs)


@each_row
def test_sabotage_of_the_second_order_is_caught(name, op, xs, sabotage):
    """A pullback that is right, but cut off from its cotangent and inputs."""
    if any(x.size == 0 for x in xs):
        return
    sabotage(tm.stop_gradient)
    with pytest.raises(tm.GradientError, match="order 2"):
        tm.check_grads(op, xs)
