"""compile: random programs and every algorithm, compiled and eager, bit for bit; and what it refuses."""

import copy
import os
import pickle
import signal
import sys
import threading
import types
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given

import tinymeta as tm
from programs import programs
from regression import loss, problem
from tinymeta import program as p

SUBSETS = [(), *[(one,) for one in p.PASSES], *[p.PASSES[:n] for n in range(2, len(p.PASSES) + 1)]]
SUBSETS += [tuple(q for q in p.PASSES if q is not one) for one in p.PASSES]


def leaves(x):
    return p.flatten(x, results=True)[1]


def assert_same(compiled, eager, exact=True):
    xs, ys = leaves(compiled), leaves(eager)
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys):
        assert (x.shape, x.dtype, x.inputs) == (y.shape, y.dtype, ())
        if exact:
            np.testing.assert_array_equal(x.data, y.data)
        else:  # BLAS adds up x @ x.T differently if it sees that both are one array
            np.testing.assert_allclose(x.data, y.data, rtol=1e-10, atol=1e-10)


def poisoned(compiled):
    """Every array of its plans full of garbage: what a call needs, it must compute."""
    for _, plans in compiled.programs.values():
        for plan in plans.values():
            for buffer in plan.buffers:
                buffer.fill(0x7F)


def memory(plan):
    return sum(buffer.nbytes for buffer in plan.buffers)


@given(programs())
def test_random_programs_and_their_derivatives(program):
    def all_orders(*xs):
        ys = program(*xs)
        g = tm.vjp(ys, xs, [np.ones(y.shape) for y in ys], create_graph=True)
        gg = tm.vjp(g, xs, [np.ones(x.shape) for x in xs], create_graph=True)
        ggg = tm.vjp(gg, xs, [np.ones(x.shape) for x in xs])
        return tm.stop_gradient([ys, g, gg, ggg])

    compiled = tm.compile(all_orders)
    with np.errstate(all="ignore"):
        for xs in (program.xs, [0.7 - x for x in program.xs], program.xs):
            assert_same(compiled(*xs), all_orders(*map(tm.Tensor, xs)), exact=False)


def network(theta, x):
    """Shared values, transposes, slices, views of views, masks."""
    h = tm.relu(x @ theta[0] + theta[1])
    h = tm.concatenate([h[:, ::-1], h.T.reshape(h.shape)], axis=1)
    return tm.logsumexp(h * 2 + h * 2, axis=1).sum() + tm.max(h) + tm.sum(tm.where(h > 0.5, h, -h) ** 3)


@pytest.mark.parametrize("passes", SUBSETS, ids=lambda passes: "-".join(f.__name__ for f in passes) or "none")
def test_any_passes_give_the_same_results(passes):
    def f(theta, x):
        g = tm.grad(network(theta, x), theta, create_graph=True)
        return tm.grad(sum(tm.sum(a * a) for a in g), theta), g[0], x.T

    rng = np.random.default_rng(0)
    compiled = tm.compile(lambda theta, x: tm.stop_gradient(f(theta, x)), passes=passes)
    for _ in range(3):
        theta, x = [rng.standard_normal((3, 4)), rng.standard_normal((1, 4))], rng.standard_normal((5, 3))
        assert_same(compiled(theta, x), tm.stop_gradient(f([tm.Tensor(t) for t in theta], tm.Tensor(x))))
        poisoned(compiled)


def test_the_passes_do_what_they_say():
    def f(x, y):
        z = tm.exp(tm.Tensor(np.ones(3)) * 2) + x  # a constant
        tm.sin(z)  # dead
        return tm.stop_gradient((z * y) + (y * z)) * 3 - tm.reshape(x, (3, 1)).T.reshape(
            3
        )  # z y twice; views; all in place

    args = np.arange(3.0), np.ones(3)
    count = [len(tm.compile(f, passes=p.PASSES[:n]).program(*args).nodes) for n in range(4)]
    assert count[0] == count[1] > count[2] > count[3], count
    program = tm.compile(f).program(*args)
    text = str(program)
    assert "sin" not in text and "exp" not in text and text.count("multiply") == 2 and text.count("view") == 4
    places = {n.place for n in program.nodes if n.computed}
    assert places == {0} and len(str(program).splitlines()) == len(program.nodes) + 1
    assert memory(p.Plan(program)) == 24 and memory(p.Plan(tm.compile(f, passes=()).program(*args))) > 24 * 8


ALGORITHMS = {
    "maml": partial(tm.meta.maml, loss, alpha=0.05, steps=3),
    "fomaml": partial(tm.meta.fomaml, loss, alpha=0.05, steps=3),
    "reptile": partial(tm.meta.reptile, loss, alpha=0.05, steps=3, rule=partial(tm.solvers.adam, beta1=0.0)),
    "imaml": partial(tm.meta.imaml, loss, alpha=0.05, steps=3, lam=3.0, cg_steps=3, report=True),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms(name):
    """A cut derivative is not a cut program: FO-MAML stays first-order, and its inner gradients follow the data."""
    f = lambda theta, support, query: ALGORITHMS[name](theta, support, query)
    compiled = tm.compile(f)
    for seed in range(3):
        theta, support, query = problem(tasks=3, seed=seed)
        assert_same(compiled(theta, support, query), f(theta, support, query))
        poisoned(compiled)
    assert len(compiled.programs) == 1
    if name == "fomaml":
        maml = ALGORITHMS["maml"](theta, support, query)[1]
        assert max(np.abs(a.data - b.data).max() for a, b in zip(maml, compiled(theta, support, query)[1])) > 1e-3


def test_maml_through_a_convnet():
    theta = tm.nn.init_convnet(np.random.default_rng(0), 3, filters=4)
    rng = np.random.default_rng(1)

    def cross_entropy(phi, data):
        return tm.nn.cross_entropy(tm.nn.convnet(phi, data[0]), data[1])

    f = lambda *args: tm.meta.maml(cross_entropy, *args, alpha=0.4, steps=1)
    compiled = tm.compile(f)
    for _ in range(2):
        support, query = (
            (rng.random((2, n, 28, 28, 1), dtype=np.float32), np.tile(np.arange(3), (2, n // 3))) for n in (3, 6)
        )
        assert_same(compiled(theta, support, query), f(theta, support, query))


def test_results_are_never_overwritten_and_arguments_never_changed():
    f = tm.compile(lambda x, y: [x, x + y, (x * y).T])
    x, y = np.arange(6.0).reshape(2, 3), np.ones((2, 3))
    before = [a.copy() for a in (x, y)]
    first = f(x, y)
    kept = [t.data.copy() for t in first]
    f(x + 1, y + 5)
    for t, expected in zip([*first, x, y], [*kept, *before]):
        np.testing.assert_array_equal(getattr(t, "data", t) if isinstance(t, tm.Tensor) else t, expected)
    assert not np.shares_memory(first[0].data, x)


def test_other_shapes_types_nestings_and_fixed_values_make_other_plans_and_the_oldest_goes():
    f = tm.compile(lambda xs, power: sum(x**power for x in xs))
    for xs, power in [([1.0], 2), ([1.0], 3), ([1.0], 2.0), ([np.ones(2)], 2), ([1.0, 2.0], 2), ((np.float32(3),), 2)]:
        xs = type(xs)(np.asarray(x) for x in xs)
        np.testing.assert_allclose(f(xs, power).data, sum(x**power for x in xs))
    assert len(f.programs) == 6
    for n in range(3 * tm.compiled.PROGRAMS):
        f([np.ones(n)], 2)
    assert len(f.programs) == tm.compiled.PROGRAMS == 16


def test_arguments_and_results_are_nested_as_the_function_has_them():
    def f(data, name=None):
        return {"sum": data["x"] + data["y"][0], "none": None, name: (data["y"][1],)}

    x = np.ones(2)
    result = tm.compile(f)({"x": x, "y": (x, 2 * x)}, name="double")
    assert list(result) == ["sum", "none", "double"] and result["none"] is None
    np.testing.assert_array_equal(result["double"][0].data, 2 * x)
    solution = tm.compile(lambda b: tm.solvers.cg(lambda v: [2 * a for a in v], [b], steps=1))(np.ones((2, 3)))
    assert isinstance(solution, tm.solvers.Solution) and solution.iterations.data.tolist() == [1, 1]


def test_a_compiled_function_within_another_one():
    square = tm.compile(lambda x: x * x)
    f = tm.compile(lambda x: tm.grad(square(x).sum(), [x])[0])
    np.testing.assert_array_equal(f(np.arange(3.0)).data, [0, 2, 4])


def test_a_compiled_function_within_another_one_has_tensors_too():
    inner = tm.compile(lambda xs, scale: tm.grad(tm.sum(xs["x"] ** 3) * scale, [xs["x"]])[0])
    f = tm.compile(lambda x: x * inner({"x": np.full(3, 2.0)}, scale=2))
    for _ in range(2):
        assert f(np.arange(3.0)).data.tolist() == [0, 24, 48]


def test_threads_wait_for_each_other():
    f = tm.compile(lambda x: tm.sum(tm.exp(x) * x))
    xs = np.random.default_rng(0).standard_normal((8, 100))
    expected, wrong = [f(x).item() for x in xs], []

    def work(x, y):
        wrong.extend(1 for _ in range(200) if f(x).item() != y)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_recording_goes_on_after_an_exception():
    def breaks(x):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        tm.compile(breaks)(np.ones(2))
    assert tm.tensor.state.tape is None
    x = tm.Tensor(3.0)
    assert tm.stop_gradient(x * x).inputs == ()


# ---- leaves ----------------------------------------------------------------------------------------------------------


def squares(*xs):
    return tm.mean(xs[0] ** 2), [x * x for x in xs]


@pytest.mark.parametrize("shards", [1, 2])
def test_derivatives_of_what_a_compiled_function_returned_are_refused(shards):
    f = tm.compile(squares, tasks=["xs"], stacked=[1], shards=shards)
    x, y, z = (tm.Tensor(np.arange(4.0) + i) for i in range(3))
    mean, (xx, yy) = f(x, y)
    refused = pytest.raises(
        ValueError,
        match="^y comes from a compiled function of xs: call grad inside of it, or stop_gradient its results$",
    )
    for wrong in (
        lambda: tm.grad(mean, [x]),
        lambda: tm.grad(tm.sum(tm.exp(xx) * z), [y]),  # f may use y for any of its results
        lambda: tm.grad(tm.sum(yy), [y, z], create_graph=True),
        lambda: tm.grad(tm.sum(yy * z), [y, z]),  # z has a path, and y has none
        lambda: tm.grad(tm.sum(f(x * 2, y + z)[1][0]), [z]),  # of what the arguments were computed from
        lambda: tm.vjp([z, yy], [x], [z, z]),
        lambda: tm.jvp(lambda x: f(x)[0], [x], [y]),
        lambda: tm.hvp(lambda x: f(x)[0], [x], [y]),
        lambda: tm.hvp(lambda x: f(x * x)[0], [x], [y]),
        lambda: tm.check_grads(lambda x: f(x)[0], [x]),
    ):
        with refused:
            wrong()


def test_derivatives_beside_a_compiled_function_are_what_they_are():
    f, older = tm.compile(lambda xs: [x * x for x in xs]), tm.Tensor(np.ones(3))
    x = tm.Tensor(np.array([2.0, 3.0, 4.0]))
    a, b = f([x, x + 1])
    for y, xs in [
        (b * b, [a]),  # two results of one call, as of a θ of which the loss uses a part
        (a * b, [older]),
        (tm.stop_gradient(a), [x]),
        (copy.copy(a), [x]),
        (f([x.data])[0], [x]),  # not known to be x
    ]:
        (g,) = tm.grad(tm.sum(y), xs)
        assert g.data.tolist() == [0, 0, 0]
    (g,) = tm.grad(tm.sum((x - a) ** 2), [x])  # a target that is held fixed
    np.testing.assert_array_equal(g.data, 2 * (x.data - a.data))


def test_a_compiled_activation_or_rule_in_an_eager_loss_is_refused():
    params, x = tm.nn.init_mlp(np.random.default_rng(0), [3, 4, 1], np.float64), np.ones((5, 3))
    tanh, sgd = tm.compile(tm.tanh), tm.compile(lambda p, g, s, lr: tm.solvers.sgd(p, g, s, lr=lr))
    theta, support, query = problem(tasks=3)
    for wrong in (
        lambda: tm.grad(tm.mean(tm.nn.mlp(params, x, activation=tanh) ** 2), params),  # the last layer has a path
        lambda: tm.meta.maml(loss, theta, support, query, alpha=0.1, steps=1, rule=sgd),
        lambda: tm.meta.maml(loss, theta, support, query, alpha=0.1, steps=2, rule=partial(sgd)),
    ):
        with pytest.raises(ValueError, match="^y comes from a compiled function of xs: |^the rule returned a leaf"):
            wrong()
    plain, fast = (tm.meta.fomaml(loss, theta, support, query, alpha=0.1, steps=2, rule=r) for r in (sgd, sgd.f))
    assert_same(fast, plain)  # where nothing is to flow through it


def test_what_a_result_remembers_does_not_grow():
    f, x = tm.compile(lambda x: 0.9 * x), tm.Tensor(np.ones(3))
    for _ in range(5):
        x = f(x)
        assert len(x.kernel.args) == 1
    y = f(x * x + x)  # x, x * x and their sum
    assert len(y.kernel.args) == 3 and len(f(y).kernel.args) == 1


def test_results_are_leaves_like_any_other():
    theta, support, query = problem(tasks=3)
    f = lambda *args: tm.meta.maml(loss, *args, alpha=0.05, steps=2)
    update = tm.compile(lambda theta, *data: [t - 0.1 * g for t, g in zip(theta, f(theta, *data)[1])])
    theta = update(theta, support, query)
    plain = [tm.Tensor(t.data) for t in theta]
    assert_same(f(theta, support, query), f(plain, support, query))
    one, two = (tm.sum(tm.exp(t) * t) for t in (theta[0], plain[0]))
    for format in ("dot", "svg"):
        assert tm.draw(one, format=format) == tm.draw(two, format=format)
    for twin in (copy.deepcopy(theta[0]), pickle.loads(pickle.dumps(theta[0]))):
        assert (twin.op, twin.inputs) == ("leaf", ()) and twin.data.tobytes() == theta[0].data.tobytes()
    tm.check_grads(lambda t: tm.sum(tm.exp(t) * t), [theta[0]])
    square = tm.compile(lambda x: x * x)
    with pytest.raises(tm.GradientError, match="'multiply'.*it reads an array that changes with the inputs, but is no"):
        tm.check_grads(lambda x: x * square(x), [np.ones(2)])


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_shards(name, tasks):
    """Means over the parts of the tasks, of unequal sizes, are means over all; what is stacked comes back in order."""

    def f(theta, support, query):
        _, grads, *cg = ALGORITHMS[name](theta, support, query)
        phi = tm.meta.adapt(loss, theta, support, alpha=0.1, steps=1)
        return grads, [phi, cg], None

    compiled = tm.compile(f, tasks=["support", "query"], stacked=[1], shards=3)
    for seed in range(2):
        args = problem(tasks=tasks, seed=seed)
        results = compiled(*args)
        assert_same(results, f(*args), exact=False)
        poisoned(compiled)
        assert_same(compiled(args[0], query=args[2], support=args[1]), results)  # to the bit
    assert results[2] is None


def test_shards_run_one_after_the_other_without_threadpoolctl(monkeypatch):
    f = lambda x: (tm.mean(x * x), x + 1)
    make = lambda: tm.compile(f, tasks=["x"], stacked=[1], shards=2)
    x = np.random.default_rng(0).standard_normal(100)
    tm.compiled.one_blas_thread.cache_clear()
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    with pytest.warns(RuntimeWarning, match="one after the other, because threadpoolctl is not installed"):
        alone = make()(x)
    make()(x)  # said once
    tm.compiled.one_blas_thread.cache_clear()
    monkeypatch.undo()
    pytest.importorskip("threadpoolctl")
    assert_same(make()(x), alone)


def test_blas_is_limited_once_for_all_who_are_inside(monkeypatch):
    class Controller:
        def limit(self, **options):
            log.append(options)
            return types.SimpleNamespace(restore_original_limits=lambda: log.append("restore"))

    log, once = [], [{"limits": 1, "user_api": "blas"}, "restore"]
    monkeypatch.setitem(sys.modules, "threadpoolctl", types.SimpleNamespace(ThreadpoolController=Controller))
    tm.compiled.one_blas_thread.cache_clear()
    try:
        limit = tm.compiled.one_blas_thread()
        for _ in range(2):
            log.clear()
            first, second = limit(), limit()
            first.__enter__(), second.__enter__(), first.__exit__(None, None, None)
            assert log == once[:1]
            second.__exit__(None, None, None)
            assert log == once
    finally:
        tm.compiled.one_blas_thread.cache_clear()


def test_arguments_that_have_no_tasks_may_be_fixed_and_those_that_have_may_be_left_out():
    calls = []

    def f(scale, x, noise=None):
        calls.append(1)
        return tm.mean(scale * x), x * (2 if noise is None else noise)

    compiled, x = tm.compile(f, tasks=["x", "noise"], stacked=[1], shards=2), np.arange(8.0).reshape(4, 2)
    for _ in range(2):
        assert_same(compiled(3.0, x), f(3.0, tm.Tensor(x)))
        calls.clear()
        assert_same(compiled(3.0, x + 1), (tm.Tensor(3 * x.mean() + 3), tm.Tensor(2 * x + 2)))
        assert not calls  # f runs as Python at the first call only


def test_shards_are_asked_for_in_terms_of_the_function():
    f = lambda x, y: (tm.sum(x), y)
    x = np.ones((4, 2))
    for options in (dict(shards=2), dict(shards=0), dict(shards=2, tasks=["z"])):
        with pytest.raises(ValueError, match="tasks are names of parameters of f|shards must be 1"):
            tm.compile(f, **options)
    with pytest.raises(ValueError, match="must have the tasks as first axis"):
        tm.compile(f, tasks=["x", "y"], shards=2)(x, x[:3])
    with pytest.raises(TypeError, match="y has tasks and must be arrays, got a dict"):
        tm.compile(f, tasks=["x", "y"], shards=2)(x, {"y": [x, 2.0]})
    for nothing in ({}, [], None, {"y": ()}):  # as the noise of an algorithm without noise
        tm.compile(lambda x, y: (tm.mean(x),), tasks=["x", "y"], shards=2)(x, nothing)
    with pytest.raises(TypeError, match="int64.*no mean over shards"):
        tm.compile(lambda x: (tm.sum(tm.greater(x, 0)),), tasks=["x"], shards=2)(x)
    both = lambda x: (tm.mean(x), [x * 2, tm.sum(x, axis=1)])
    for stacked, said in [((), "result 1 has"), ((0, 1), "result 0 does not have"), ((7,), "result 1 has")]:
        with pytest.raises(ValueError, match=rf"stacked is \[.*\], but {said} an axis of tasks"):
            tm.compile(both, tasks=["x"], stacked=stacked, shards=2)(x)
    for stacked, error in [((-1,), ValueError), (("x",), TypeError)]:
        with pytest.raises(error, match="a position in stacked must be 0 or more"):
            tm.compile(both, tasks=["x"], stacked=stacked, shards=2)
    for n in (0, 1, 4):  # also more shards than tasks, and no tasks
        for shards in (2, 10**10):
            f = tm.compile(lambda w, x: (tm.mean(w * w), x * 2), tasks=["x"], stacked=[1], shards=shards)
            means, stacks = f(x, x[:n])
            assert means.item() == 1 and stacks.shape == x[:n].shape
    with pytest.raises(TypeError, match="a list or a tuple"):
        tm.compile(tm.mean, tasks=["x"], shards=2)(x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_that_are_no_means_over_tasks_are_refused(dtype):
    x = (np.random.default_rng(0).random((5, 3)) * np.array([[1], [10], [1], [1], [1]])).astype(dtype)
    rms, first = lambda x: tm.sqrt(tm.mean(x * x)), lambda x: tm.mean(x[:1], axis=0)
    for f in (tm.sum, tm.max, rms, first, lambda x: tm.mean(x) ** 2):
        compiled = tm.compile(lambda x, f=f: (x * 2, tm.mean(x), f(x)), tasks=["x"], stacked=[0], shards=2)
        for _ in range(2):
            with pytest.raises(ValueError, match="^compile: result 2 is no mean over tasks, .*named in `stacked`$"):
                compiled(x)
    means = lambda x: (tm.mean(x), tm.mean(tm.mean(tm.exp(x), axis=1)), tm.mean(x, axis=0), tm.Tensor(np.ones(2)))
    for values in (x, 0 * x, np.nan * x, x + np.inf):
        for y, z in zip(tm.compile(means, tasks=["x"], shards=3)(values), means(tm.Tensor(values))):
            np.testing.assert_allclose(y.data, z.data, rtol=1e-5, atol=1e-6)


def test_an_argument_with_tasks_that_is_left_at_its_default_is_split():
    weights = np.array([1.0, 3.0])
    f = lambda t, x, w=weights: (tm.mean(t * x * w),)
    compiled, x = tm.compile(f, tasks=["x", "w"], shards=2), np.array([1.0, 10.0])
    assert compiled(1.0, x)[0].item() == compiled(1.0, x, weights)[0].item() == 15.5


# ---- what it refuses -------------------------------------------------------------------------------------------------

GENERATOR = np.random.default_rng(0)


def branches(x):
    return x * 2 if x.data[0] > 0.5 else x + 1


def loops(x):
    y = x
    while y.data.sum() < 10:
        y = y * 2
    return y


def endless(x):  # on negative values
    y = x + 1
    while y.data[0] < 0:
        y = y * 2
    return y


def sign_of_all(x):
    return x + 1 if x.data.max() > 0 else x * 2


def mask_of_all(x):  # the same at all positive values
    return tm.where(x.data > 0, x, 0)


def masks(x):
    return tm.where(x.data > 1, x, 0)


def constants(x):
    return x * x.data.max()


def items(x):
    return x * tm.sum(x).item()


def draws(x):
    return x * GENERATOR.standard_normal(3)


def sizes(x):
    return tm.sum(x[np.flatnonzero(x.data > 1)])


def chooses(x):
    y = [x * 2, x * 3]
    return y[int(x.data[0] > 0.5)]


@pytest.mark.parametrize(
    ("f", "said"),
    [
        (branches, "does something else, multiply of shape (3,) for add of shape (3,)"),
        (loops, "does something else|returns something else|read by|goes on"),
        (endless, "goes on, after 3 nodes, with multiply: branches, loops and sizes must not depend on values"),
        (sign_of_all, "does something else, multiply of shape (3,) for add of shape (3,)"),
        (mask_of_all, "bool, shape (3,), read by where"),
        (masks, "bool, shape (3,), read by where"),
        (constants, "float64, shape (), read by multiply"),
        (items, "float64, shape (), read by multiply"),
        (draws, "float64, shape (3,), read by multiply"),
        (sizes, "shape"),
        (chooses, "returns something else"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_depends_on_values_outside_of_the_graph_is_refused(f, said):
    with pytest.raises(ValueError) as error:
        tm.compile(f)(np.array([0.3, 1.2, 2.5]))
    assert str(error.value).startswith("compile: ") and any(part in str(error.value) for part in said.split("|"))


def picks(x, k):
    return x[k.data]


@pytest.mark.parametrize(
    ("f", "k"),
    [
        (lambda x, k: x * k.item(), np.array(2)),
        (lambda x, k: x * 2 if k.item() else x, np.array(True)),
        (lambda x, k: x * 2 if k.item() else x, np.array(1, np.uint8)),
        (lambda x, k: x * k.data, np.ones(3, bool)),
        (picks, np.array([1])),
        (lambda x, k: sum(x for _ in range(k.item())), np.array(3)),
    ],
)
def test_what_depends_on_integers_and_masks_of_one_value_is_refused(f, k):
    with pytest.raises(ValueError, match="^compile: .*(depends on values|on other values)"):
        tm.compile(f)(np.ones(3), k)


@pytest.mark.parametrize(
    ("f", "k"),
    [
        (lambda x, k: x[k], np.array(0)),
        (lambda x, k: x[k], np.array([2, 2])),
        (lambda x, k: x[:1][k], np.array([0])),  # there is no other index
        (lambda x, k: x * k, np.array(2)),
        (lambda x, k: tm.where(k, x, -x), np.ones(3, bool)),
        (lambda x, k: tm.nn.cross_entropy(x[None, None], k[None]), np.array([2])),
        (lambda x, k: x[np.flatnonzero(x.data < 9)] * k, np.array(False)),
    ],
)
def test_what_reads_integers_and_masks_of_one_value_as_tensors_is_not(f, k):
    compiled, x = tm.compile(f), np.arange(3.0)
    for _ in range(2):
        assert_same(compiled(x, k), tm.stop_gradient(f(tm.Tensor(x), tm.Tensor(k))))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_function_that_asks_for_values_of_one_sign_is_traced_on_such(sign):
    def f(x):
        if (sign * x.data <= 0).any():
            raise ValueError("positive or negative, please")
        return tm.log(sign * x)

    x = sign * np.array([1.0, 2.0])
    assert tm.compile(f)(x).data.tolist() == np.log(sign * x).tolist()
    with pytest.raises(ValueError, match="^compile: .* read by multiply"):
        tm.compile(lambda x: f(x) * x.data.max())(x)


def test_an_error_of_the_function_on_other_values_is_raised():
    def f(x):
        if x.data[0] != 1:
            raise KeyError("on another value")
        return x * 2

    with pytest.raises(KeyError, match="on another value"):
        tm.compile(f)(np.ones(1))


def test_results_that_are_no_tensors_are_refused():
    for f in (lambda x: x.item(), lambda x: [x, 1.0], lambda x: x.data):
        with pytest.raises(TypeError, match="compile: f returned .*: it returns Tensors"):
            tm.compile(f)(np.ones(()))


def test_an_object_that_may_change_is_refused():
    class Model:
        w = 1.0

    for x in (Model(), {"w": 1.0}.values(), np.random.default_rng(0)):
        with pytest.raises(
            TypeError, match="^compile: an? .* would stay as it is now, whatever changes in it: pass what"
        ):
            tm.compile(lambda x, y: y * 2)(x, np.ones(1))
    kept = (
        None,
        ...,
        "text",
        1j,
        frozenset([1]),
        range(3),
        tm.sin,
        partial(tm.sin),
        Model,
        np.dtype("f4"),
        signal.SIGINT,
    )
    for x in kept:
        assert tm.compile(lambda x, y: y * 2)(x, np.ones(1)).item() == 2


def test_a_function_without_a_signature_is_refused():
    with pytest.raises(
        TypeError, match="^compile: Python can't tell the parameters of <built-in function min>: wrap it"
    ):
        tm.compile(min)


def test_what_holds_no_memory_of_the_trace():
    """Without the graph: the plan of 30 products of 1 MB needs two places, not thirty arrays."""
    f = tm.compile(lambda x: tm.sum(x @ x @ x @ x @ x @ x @ x @ x))
    f(np.eye(256))
    ((_, plans),) = f.programs.values()
    assert memory(plans[0]) <= 2 * 8 * 256**2 + 64


def test_a_compiled_function_passes_for_the_function():
    def f(x, scale=1.0):
        """Twice x."""
        return 2 * scale * x

    compiled = tm.compile(f)
    assert (compiled.__name__, compiled.__doc__, compiled.__wrapped__) == ("f", "Twice x.", f)
    assert tm.compile(lambda x: compiled(x, scale=3.0))(np.ones(1)).item() == 6  # also within another one


def test_the_second_look_warns_of_nothing():
    """On values that nobody gave."""

    def f(x):
        warnings.warn("once", UserWarning, stacklevel=1)
        return tm.exp(x)

    with pytest.warns(UserWarning, match="once") as seen, np.errstate(over="raise"):
        tm.compile(f)(np.full(50, 700.0))  # larger ones overflow
    assert len(seen) == 1


def test_shards_without_tasks_and_results_without_names():
    compiled = tm.compile(lambda x: [2 * x], tasks=["x"], stacked=[0], shards=2)
    assert compiled(np.zeros((0, 3)))[0].shape == (0, 3)
    with pytest.raises(ValueError, match="must have the tasks as first axis"):
        compiled(np.float64(1.0))
    with pytest.raises(TypeError, match="returns a list or a tuple"):
        tm.compile(lambda x: {"y": 2 * x}, tasks=["x"], shards=2)(np.zeros((2, 3)))


# what may not be computed in place: x is read elsewhere, or lies in another order than the result
OVER = {
    "a transposed view": lambda x: (lambda y: y + y.T)(tm.exp(x)),
    "only a transposed view": lambda x: tm.sin(tm.exp(x).T),
    "a transposed view, read once more": lambda x: (lambda y: tm.where(y.T > 1, y, y.T))(tm.exp(x)),
    "reversed": lambda x: (lambda y: y[::-1] * y)(tm.exp(x)),
    "a part": lambda x: tm.exp(x)[:1] * 2.0,
    "broadcast": lambda x: (lambda y: y[:1] + tm.broadcast_to(y[1:2], (3, 3)))(tm.exp(x)),
    "a part of two": lambda x: (lambda y: y[:2] * y[1:])(tm.exp(x)),
    "another type": lambda x: tm.exp(x) > 1,
    "of another shape": lambda x: tm.exp(x[0]) * x,
    "in the other order": lambda x: tm.exp(x).T.reshape(9) * tm.sin(x).reshape(9),
}


@pytest.mark.parametrize("f", OVER.values(), ids=OVER)
def test_what_may_not_be_computed_in_place(f):
    x = np.random.default_rng(0).standard_normal((3, 3))
    compiled = tm.compile(f)
    for _ in range(2):
        assert_same(compiled(x), tm.stop_gradient(f(tm.Tensor(x))))
        poisoned(compiled)


def test_a_mask_is_prepared_once_for_all_that_choose_by_it():
    def f(x):
        y = tm.relu(x)
        (g,) = tm.grad(tm.sum(y * y * y), [x], create_graph=True)
        return tm.grad(tm.sum(g * g), [x])

    ops = [n.op for n in tm.compile(f).program(np.linspace(-1, 1, 20)).nodes]
    assert ops.count("bits") == 1 and ops.count("choose") > 2 and "where" not in ops
    without = [n.op for n in tm.compile(f, passes=()).program(np.linspace(-1, 1, 20)).nodes]
    assert "bits" not in without and without.count("where") > 2


def test_passes_run_in_their_order():
    def f(x):
        return x + tm.where(tm.Tensor(np.array([True, False, True])), x, 0)

    compiled = tm.compile(f, passes=(p.masks, p.fold))
    np.testing.assert_array_equal(compiled(np.arange(3.0)).data, [0, 1, 4])


def test_the_op_that_fails_on_later_values_is_named():
    f = tm.compile(lambda x, i: tm.exp(tm.sin(x) * 2)[i] * 3)
    f(np.ones(4), np.array([0, 1]))
    with pytest.raises(IndexError, match="^compile: gather of an array of float64, shape .4,., .*: index 9 is out of"):
        f(np.ones(4), np.array([0, 9]))


def test_a_kernel_that_leaves_its_place_unwritten_is_refused():
    def sinh(x, out=None):
        return np.sinh(x)

    f = tm.compile(lambda x: tm.tensor.apply(sinh, x * 2) + 1)
    for _ in range(2):
        with pytest.raises(
            TypeError, match="^compile: sinh of an array of float64, shape .3,.: the kernel must write into `out`"
        ):
            f(np.ones(3))
    right = tm.compile(lambda x: tm.tensor.apply(lambda x, out=None: np.sinh(x, out=out), x * 2) + 1)
    for x in (np.ones(3), np.zeros(3)):
        np.testing.assert_array_equal(right(x).data, np.sinh(2 * x) + 1)


def scale(by, x, out=None):
    return np.multiply(x, by, out=out)


def gain(x, by, out=None):
    return np.multiply(x, by[0], out=out)


MIDDLES = [np.where(np.arange(3000) == 1500, by, 0.0) for by in (1.0, 2.0)]  # repr shows the ends


@pytest.mark.parametrize(
    "kernels",
    [
        (partial(scale, 2.0), partial(scale, 3.0)),
        tuple(partial(scale, by) for by in MIDDLES),
        tuple(partial(gain, by=(by,)) for by in MIDDLES),
        tuple(partial(gain, by=[tm.Tensor(by).data]) for by in MIDDLES),
    ],
)
def test_kernels_that_differ_in_what_they_hold_are_two(kernels):
    f = lambda x: tm.tensor.apply(kernels[0], x) - tm.tensor.apply(kernels[1], x)
    x = np.ones(3000)
    np.testing.assert_array_equal(tm.compile(f)(x).data, f(tm.Tensor(x)).data)
    assert np.abs(f(tm.Tensor(x)).data).max() == 1
    same = tm.compile(lambda x: tm.tensor.apply(kernels[0], x) * tm.tensor.apply(kernels[0], x)).program(x)
    assert [n.op for n in same.nodes].count(kernels[0].func.__name__) == 1


def test_a_kernel_may_be_an_object():
    class Double:
        def __call__(self, x, out=None):
            return np.multiply(x, 2, out=out)

    f = lambda x: tm.tensor.apply(Double(), x) + 1
    y = tm.tensor.apply(Double(), tm.Tensor(3.0))
    assert y.op == "Double" and tm.compile(f)(np.ones(2)).data.tolist() == [3, 3]


@pytest.mark.parametrize("passes", [(), p.PASSES], ids=["none", "all"])
def test_what_the_function_reads_beside_its_arguments_stays_as_it_was(passes):
    w, wide = np.arange(6.0).reshape(2, 3), np.broadcast_to(np.ones(1), (1000, 1000))
    f = tm.compile(lambda x: x * w + tm.Tensor(w) * 2 + tm.Tensor(w).T.reshape(2, 3), passes=passes)
    before = f(np.ones((2, 3)))
    w[:] = 5
    assert_same(f(np.ones((2, 3))), before)
    constants = [n.array for n in tm.compile(lambda x: x * wide).program(np.ones(())).nodes if n.constant]
    assert constants[0].strides == (0, 0) and constants[0].shape == wide.shape  # and takes no memory


def test_zeros_of_two_signs_are_two_programs():
    f = tm.compile(lambda x, s: 1 / (x * s))
    with np.errstate(divide="ignore"):
        assert f(np.ones(2), 0.0).data.tolist() == [np.inf] * 2 and f(np.ones(2), -0.0).data.tolist() == [-np.inf] * 2


def test_an_empty_argument_that_cannot_be_written():
    assert tm.compile(lambda x: x * 2)(np.broadcast_to(0.0, (0, 3))).shape == (0, 3)


def test_a_call_inside_a_call_of_the_same_thread_is_refused(monkeypatch):
    """As from a signal handler: the plan's arrays are in use."""
    f = tm.compile(lambda x: x * 2)
    f(np.ones(3))
    ((_, plans),) = f.programs.values()
    plans[0].calls.append(lambda: f(np.ones(3)))
    with pytest.raises(RuntimeError, match="was called while it runs in the same thread"):
        f(np.ones(3))
    plans[0].calls.pop()
    assert f(np.ones(3)).data.tolist() == [2, 2, 2]


@pytest.mark.parametrize("shards", [1, 2])
def test_errors_of_numpy_are_the_callers_in_every_shard(shards):
    pytest.importorskip("threadpoolctl")
    f = tm.compile(lambda x: (tm.mean(x), tm.log(x)), tasks=["x"], stacked=[1], shards=shards)
    with np.errstate(divide="ignore"):
        assert (f(np.zeros((4, 3)))[1].data == -np.inf).all()
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        f(np.zeros((4, 3)))


def test_after_an_error_in_one_shard_the_next_call_waits_for_the_others(monkeypatch):
    """Or two calls would write into the same arrays."""
    pytest.importorskip("threadpoolctl")
    f = tm.compile(lambda x: (tm.mean(x), x * 2.0), tasks=["x"], stacked=[1], shards=2)
    f(np.ones((2, 3)))
    running, plans, call = [], [], p.Plan.__call__

    def slow(plan, values):
        plans.append(plan)
        if values[0][0, 0] == 7:
            raise KeyError("one shard")
        running.append(1)
        threading.Event().wait(0.2)
        running.pop()
        return call(plan, values)

    monkeypatch.setattr(p.Plan, "__call__", slow)
    with pytest.raises(KeyError):
        f(np.array([[7.0] * 3, [1.0] * 3]))
    assert not running
    failed, plans[:] = plans[:], []
    assert_same(f(np.ones((2, 3))), (tm.Tensor(1.0), tm.Tensor(np.full((2, 3), 2.0))))
    assert len(plans) == 2 and not set(plans) & set(failed)  # nor if the wait had been cut short


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_waits_for_no_thread_of_its_parent(monkeypatch):
    """Two threads hold all locks there are: one traces a function; one is in a call of f, about to limit BLAS."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    parent, held, inside, go_on = os.getpid(), threading.Event(), threading.Semaphore(0), threading.Event()

    def hold():
        if held.is_set() and os.getpid() == parent:
            inside.release()
            go_on.wait(60)

    class Slow(threadpoolctl.ThreadpoolController):
        def limit(self, **options):
            hold()
            return super().limit(**options)

    def traced(x):
        hold()
        return x * 2.0

    monkeypatch.setattr(threadpoolctl, "ThreadpoolController", Slow)
    tm.compiled.one_blas_thread.cache_clear()
    f, x = tm.compile(lambda x: (tm.mean(x), x * 2.0), tasks=["x"], stacked=[1], shards=2), np.ones((4, 3))
    expected = f(x)  # and there are threads for its shards
    held.set()
    threads = [threading.Thread(target=call, args=(x,)) for call in (f, tm.compile(traced))]
    try:
        for thread in threads:
            thread.start()
            assert inside.acquire(timeout=60)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of a fork beside threads
            child = os.fork()
        if not child:
            try:
                signal.alarm(10)
                assert_same(f(x), expected)
                assert_same(tm.compile(traced)(x), expected[1])
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        go_on.set()
        for thread in threads:
            thread.join()
        tm.compiled.one_blas_thread.cache_clear()
    held.clear()
    assert_same(f(x), expected)
