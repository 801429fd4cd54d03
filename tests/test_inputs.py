"""Bad input: every public callable, each of its arguments replaced by what somebody will pass some day.

Each try either works, or is refused by one of our own `raise` statements, in words that name what is wrong and what
came. What works gives what the plain input gives, where the two mean the same; no input array is ever changed.
"""

import copy
import itertools
import linecache
import pathlib
import re
import warnings
from functools import partial

import numpy as np
import pytest

import tinymeta as tm

T = tm.Tensor
HOME = str(pathlib.Path(tm.__file__).parent)
tried = {"works": 0, "refused": 0}


# ---- what is called, and valid arguments of it -----------------------------------------------------------------------


def some(*shape, low=-1.5, high=1.5, seed=0):
    return np.random.default_rng([seed, *shape]).uniform(low, high, shape)


def linear(phi, data):
    x, y = data
    return tm.nn.mse(x @ phi[0] + phi[1], y)


def curved(phi, data):  # its Hessian is positive definite
    return linear(phi, data) + tm.sum(phi[0] * phi[0], axis=(1, 2)) + tm.sum(phi[1] * phi[1], axis=(1, 2))


def pulled(w, hyper):
    return tm.sum((w[0] - hyper[0]) ** 2, axis=1) + tm.sum(w[0] ** 2, axis=1)


def identity(v):
    return list(v)


def bowl(phi, step):
    return tm.sum(phi[0] ** 2, axis=1) + tm.sum(phi[1] ** 2, axis=1)


def scalar(x, y):
    return tm.sum(tm.sin(x) * y)


def all_of_it(support, step):
    return support


def generator():
    return np.random.default_rng(3)


TASKS, STEPS = 2, 2
X, Y, M = some(2, 3), some(2, 3, seed=1), some(2, 3, seed=1) > 0
THETA = [T(some(1, 1)), T(some(1, 1, seed=1))]
STACK = [T(some(2, 3)), T(some(2, 2))]
GRADS = [T(some(2, 3, seed=4)), T(some(2, 2, seed=4))]
DATA = {"support": (some(2, 4, 1), some(2, 4, 1, seed=1)), "query": (some(2, 3, 1, seed=2), some(2, 3, 1, seed=3))}
LEARN = {"loss": linear, "theta": THETA, **DATA, "alpha": 0.1, "steps": STEPS, "batch": all_of_it}
RULED = {**LEARN, "rule": tm.solvers.momentum}
IMPLICIT = {"lam": 2.0, "cg_steps": 2, "damping": 0.5, "linear_solver": tm.solvers.cg, "report": False}
CHARACTERS = tm.tasks.glyphs.load(0, 17)
IMAGES, KERNELS = some(2, 4, 4, 2), some(3, 3, 2, 2, seed=1)
CONVNET = tm.nn.init_convnet(generator(), 2, filters=2, blocks=1, dtype=np.float64)
DENSE = tm.nn.init_dense(generator(), 2, (3,), 4, dtype=np.float64)

UNARY = "abs cos exp log log1p negative relu sigmoid sign sin softplus sqrt tanh".split()
BINARY = "add subtract multiply divide power equal not_equal greater greater_equal less less_equal".split()
POSITIVE = {"log", "log1p", "sqrt", "power"}
AXIS = {"x": X, "axis": 1, "keepdims": True}

CALLS = {
    "Tensor": (T, {"array": X}),
    "Tensor.item": (lambda t: T(t).item(), {"t": T(2.0)}),
    **{name: (getattr(tm, name), {"x": np.abs(X) if name in POSITIVE else X}) for name in UNARY},
    **{name: (getattr(tm, name), {"x": np.abs(X) if name in POSITIVE else X, "y": Y}) for name in BINARY},
    "power of a number": (tm.power, {"x": X, "y": 3}),
    "logical_and": (tm.logical_and, {"x": M, "y": ~M}),
    "logical_or": (tm.logical_or, {"x": M, "y": ~M}),
    "logical_not": (tm.logical_not, {"x": M}),
    "where": (tm.where, {"mask": M, "x": X, "y": Y}),
    "broadcast_to": (tm.broadcast_to, {"x": X, "shape": (2, 2, 3)}),
    "sum_to": (tm.sum_to, {"x": X, "shape": (1, 3)}),
    **{name: (getattr(tm, name), AXIS) for name in ("sum", "mean", "max", "min", "logsumexp")},
    "softmax": (tm.softmax, {"x": X, "axis": 1}),
    "log_softmax": (tm.log_softmax, {"x": X, "axis": 1}),
    "reshape": (lambda x, shape: tm.reshape(x, shape), {"x": X, "shape": (3, 2)}),
    "squeeze": (tm.squeeze, {"x": X[:, :1], "axis": 1}),
    "transpose": (lambda x, axes: tm.transpose(x, axes), {"x": X, "axes": (1, 0)}),
    "swapaxes": (tm.swapaxes, {"x": X, "axis1": 0, "axis2": 1}),
    "astype": (tm.astype, {"x": X, "dtype": np.float32}),
    "gather": (tm.gather, {"x": X, "index": np.array([1, 0])}),
    "gather at a number": (tm.gather, {"x": X, "index": 1}),
    "scatter": (tm.scatter, {"x": X, "index": np.array([1, 0]), "shape": (4, 3)}),
    "pad": (tm.pad, {"x": X, "pad_width": (1, 2)}),
    "concatenate": (tm.concatenate, {"xs": [X, Y], "axis": 1}),
    "stack": (tm.stack, {"xs": [X, Y], "axis": 1}),
    "matmul": (tm.matmul, {"x": X, "y": Y.T.copy()}),
    "patches": (tm.patches, {"x": IMAGES, "size": 2, "stride": 1, "padding": 1}),
    "unpatch": (tm.unpatch, {"y": some(2, 3, 3, 2, 2, 2), "shape": (2, 4, 4, 2), "stride": 1, "padding": "valid"}),
    "conv2d": (tm.conv2d, {"x": IMAGES, "w": KERNELS, "stride": 2, "padding": "same"}),
    "max_pool": (tm.max_pool, {"x": IMAGES, "size": 2, "stride": 2}),
    "average_pool": (tm.average_pool, {"x": IMAGES, "size": 2, "stride": 2}),
    "global_average": (tm.global_average, {"x": IMAGES}),
    "stop_gradient": (tm.stop_gradient, {"x": T(X)}),
    "grad": (lambda y, xs: tm.grad(tm.sum(y), xs), {"y": T(X), "xs": STACK}),
    "grad of y": (lambda y: tm.grad(y, STACK), {"y": T(2.0)}),
    "vjp": (tm.vjp, {"y": STACK[0], "xs": STACK, "y_bar": X}),
    "vjp of a list": (tm.vjp, {"y": STACK, "xs": STACK, "y_bar": [X, STACK[1]]}),
    "jvp": (tm.jvp, {"f": scalar, "xs": [T(X), T(Y)], "tangents": [T(Y), T(X)]}),
    "hvp": (tm.hvp, {"f": scalar, "xs": [T(X), T(Y)], "vs": [T(Y), T(X)]}),
    "hessian": (tm.hessian, {"f": scalar, "xs": [T(X), T(Y)]}),
    "check_grads": (tm.check_grads, {"f": scalar, "xs": [X[0], Y[0]], "order": 1, "tol": 1e-6, "seed": 0}),
    "compile": (tm.compile, {"f": scalar, "tasks": (), "stacked": (), "shards": 1}),
    "a compiled function": (lambda x, y: tm.compile(scalar)(x, y), {"x": X, "y": T(Y)}),
    "a sharded function": (
        lambda x, y: tm.compile(lambda x, y: [scalar(x, y)], tasks=("x", "y"), shards=2)(x, y),
        {"x": X, "y": T(Y)},
    ),
    # nn
    "nn.init_mlp": (tm.nn.init_mlp, {"rng": generator(), "sizes": (1, 3, 1), "dtype": np.float64, "gain": 1.0}),
    "nn.mlp": (tm.nn.mlp, {"params": [T(some(3, 2)), T(some(1, 2)), T(some(2, 1)), T(some(1, 1))], "x": X,
                           "activation": tm.tanh}),
    "nn.batch_norm": (tm.nn.batch_norm, {"x": X, "gain": some(1, 3), "bias": some(1, 3), "eps": 1e-3}),
    "nn.init_convnet": (
        tm.nn.init_convnet,
        {"rng": generator(), "ways": 3, "filters": 2, "blocks": 2, "channels": 1, "head_features": 8, "scale": 0.5,
         "dtype": np.float32},
    ),
    "nn.convnet": (tm.nn.convnet, {"params": CONVNET, "x": some(3, 4, 4, 1), "pool": True, "flatten": False}),
    "nn.init_dense": (
        tm.nn.init_dense,
        {"rng": generator(), "ways": 3, "features": (4, 3), "inputs": 5, "scale": 0.5, "dtype": np.float32},
    ),
    "nn.dense": (tm.nn.dense, {"params": DENSE, "x": some(3, 4)}),
    "nn.mse": (tm.nn.mse, {"prediction": X, "target": Y}),
    "nn.cross_entropy": (tm.nn.cross_entropy, {"logits": some(2, 4, 3), "labels": np.array([[0, 1, 2, 0]] * 2)}),
    # solvers
    "solvers.sgd": (tm.solvers.sgd, {"params": STACK, "grads": GRADS, "state": None, "lr": 0.1}),
    "solvers.momentum": (
        tm.solvers.momentum, {"params": STACK, "grads": GRADS, "state": list(GRADS), "lr": 0.1, "mu": 0.9}),
    "solvers.nesterov": (
        tm.solvers.nesterov, {"params": STACK, "grads": GRADS, "state": list(GRADS), "lr": [0.1, 0.2], "mu": 0.9}),
    "solvers.adam": (
        tm.solvers.adam,
        {"params": STACK, "grads": GRADS, "state": (T(1.0), GRADS, [tm.stop_gradient(g * g) for g in GRADS]),
         "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8},
    ),
    **{f"solvers.{f.__name__}": (
        f, {"loss": bowl, "phi": STACK, "lr": 0.1, "steps": STEPS, "rule": tm.solvers.adam, "create_graph": True})
        for f in (tm.solvers.gradient_descent,)},
    "solvers.trajectory": (
        lambda **options: list(tm.solvers.trajectory(**options)),
        {"loss": bowl, "phi": STACK, "lr": 0.1, "steps": STEPS, "rule": tm.solvers.adam, "create_graph": True,
         "cut": 1},
    ),
    "solvers.hessian_free": (
        tm.solvers.hessian_free, {"loss": bowl, "phi": STACK, "lr": 1.0, "steps": 1, "cg_steps": 2, "halvings": 2}),
    "solvers.cg": (
        tm.solvers.cg, {"matvec": identity, "b": STACK, "steps": STEPS, "x0": GRADS, "tol": 1e-6}),
    "solvers.neumann": (
        tm.solvers.neumann, {"matvec": identity, "b": STACK, "steps": STEPS, "eta": 0.5, "x0": GRADS}),
    "solvers.dot": (tm.solvers.dot, {"xs": STACK, "ys": GRADS}),
    "solvers.per_task": (tm.solvers.per_task, {"a": some(2), "like": STACK[0]}),
    # meta
    "meta.adapt": (
        tm.meta.adapt,
        {"loss": linear, "theta": THETA, "support": DATA["support"], "alpha": [0.1, 0.2], "steps": STEPS,
         "create_graph": True, "batch": all_of_it, "rule": tm.solvers.sgd},
    ),
    "meta.adapt by a solver": (
        tm.meta.adapt,
        {"loss": curved, "theta": THETA, "support": DATA["support"], "alpha": 1.0, "steps": 1,
         "solve": partial(tm.solvers.hessian_free, cg_steps=2)},
    ),
    "meta.trajectory": (
        lambda **options: list(tm.meta.trajectory(**options)),
        {"loss": linear, "theta": THETA, "support": DATA["support"], "alpha": 0.1, "steps": STEPS, "cut": 1,
         "batch": all_of_it, "rule": tm.solvers.sgd},
    ),
    **{f"meta.{f.__name__}": (f, RULED) for f in (tm.meta.maml, tm.meta.fomaml, tm.meta.reptile)},
    "meta.truncated": (tm.meta.truncated, {**RULED, "last": 1}),
    "meta.anil": (tm.meta.anil, {**RULED, "head": 1, "first_order": True}),
    "meta.leap": (tm.meta.leap, {**RULED, "p": 2, "loss_coordinate": True, "stabiliser": True}),
    "meta.meta_sgd": (
        tm.meta.meta_sgd,
        {"loss": linear, "theta": tm.meta.init_meta_sgd(THETA, 0.1), **DATA, "steps": STEPS, "first_order": False,
         "batch": all_of_it, "rule": tm.solvers.sgd},
    ),
    "meta.init_meta_sgd": (tm.meta.init_meta_sgd, {"weights": THETA, "alpha": 0.1}),
    "meta.split": (tm.meta.split, {"theta": THETA}),
    "meta.maml_plus_plus": (
        tm.meta.maml_plus_plus,
        {"loss": linear, "theta": tm.meta.init_lslr(THETA, 0.1, STEPS), **DATA, "steps": STEPS,
         "weights": np.array([0.5, 0.5]), "first_order": False, "batch": all_of_it},
    ),
    "meta.init_lslr": (tm.meta.init_lslr, {"weights": THETA, "alpha": 0.1, "steps": STEPS}),
    "meta.multi_step_weights": (
        tm.meta.multi_step_weights, {"steps": 3, "epoch": 2, "epochs": 10, "dtype": np.float64}),
    "meta.per_step": (
        tm.meta.per_step, {"params": STACK, "grads": GRADS, "step": 1, "lr": [T(some(2)), T(some(2))]}),
    "meta.draw_noise": (
        tm.meta.draw_noise,
        {"rng": generator(), "theta": THETA, "p": 0.2, "tasks": TASKS, "steps": STEPS, "gaussian": False},
    ),
    "meta.dropout": (
        lambda noise, rule: tm.meta.maml(**{**LEARN, "rule": tm.meta.dropout(noise, rule)}),
        {"noise": tm.meta.draw_noise(generator(), THETA, 0.2, tasks=TASKS, steps=STEPS), "rule": tm.solvers.sgd},
    ),
    "meta.imaml": (tm.meta.imaml, {**RULED, "loss": curved, **IMPLICIT}),
    "meta.implicit_gradient": (
        tm.meta.implicit_gradient,
        {"loss": curved, "phi": [T(some(2, 1, 1)), T(some(2, 1, 1))], **DATA, **IMPLICIT, "lam": [2.0, T(3.0)]},
    ),
    "meta.proximal": (
        lambda loss, theta, lam: tm.meta.proximal(loss, theta, lam)(
            [T(some(2, 1, 1)), T(some(2, 1, 1))], DATA["support"]),
        {"loss": linear, "theta": THETA, "lam": 2.0},
    ),
    "meta.shrinkage": (
        tm.meta.shrinkage,
        {**RULED, "loss": curved, "theta": [*THETA, T(0.0), T(0.1)], "modules": [[0], [1]], "cg_steps": 2,
         "damping": 0.5, "linear_solver": tm.solvers.cg, "report": False},
    ),
    "meta.precisions": (tm.meta.precisions, {"theta": [*THETA, T(0.0)], "modules": [[0, 1]]}),
    "meta.hypergradient": (
        tm.meta.hypergradient,
        {"train_loss": pulled, "val_loss": pulled, "w": [T(some(2, 3))], "hyper": [T(some(3))], "steps": STEPS,
         "linear_solver": tm.solvers.cg, "report": False},
    ),
    "meta.draw_es_noise": (
        tm.meta.draw_es_noise,
        {"rng": generator(), "theta": THETA, "tasks": TASKS, "steps": STEPS, "perturbations": 2, "queries": 2},
    ),
    **{f"meta.{f.__name__}": (f, {
        **LEARN, "sigma": 0.1,
        "noise": tm.meta.draw_es_noise(generator(), THETA, TASKS, steps=STEPS, perturbations=2, queries=2)})
        for f in (tm.meta.es_maml, tm.meta.first_order_es_maml)},
    # tasks
    "tasks.sinusoid.Waves": (
        lambda waves, x: waves(x), {"waves": tm.tasks.sinusoid.draw_waves(generator(), 2), "x": some(2, 3, 1)}),
    "tasks.sinusoid.draw_waves": (tm.tasks.sinusoid.draw_waves, {"rng": generator(), "tasks": TASKS}),
    "tasks.sinusoid.draw_points": (
        tm.tasks.sinusoid.draw_points,
        {"rng": generator(), "waves": tm.tasks.sinusoid.draw_waves(generator(), 2), "n": 3, "low": -1.0, "high": 1.0,
         "dtype": np.float64},
    ),
    "tasks.sinusoid.training_batch": (
        tm.tasks.sinusoid.training_batch,
        {"rng": generator(), "tasks": TASKS, "shots": 3, "queries": 2, "dtype": np.float64},
    ),
    "tasks.sinusoid.test_tasks": (
        tm.tasks.sinusoid.test_tasks,
        {"seed": 0, "tasks": TASKS, "shots": 3, "low": -1.0, "high": 1.0, "dtype": np.float64},
    ),
    "tasks.episodes.split": (tm.tasks.episodes.split, {"characters": CHARACTERS, "seed": 0}),
    "tasks.episodes.with_rotations": (tm.tasks.episodes.with_rotations, {"characters": CHARACTERS}),
    "tasks.episodes.draw_episodes": (
        tm.tasks.episodes.draw_episodes,
        {"rng": generator(), "characters": CHARACTERS, "tasks": 1, "ways": 2, "shots": 1, "queries": 1,
         "dtype": np.float64},
    ),
    "tasks.episodes.test_episodes": (
        tm.tasks.episodes.test_episodes,
        {"seed": 0, "characters": CHARACTERS, "start": 1, "stop": 2, "ways": 2, "shots": 1, "queries": 1,
         "dtype": np.float64},
    ),
    "tasks.glyphs.load": (tm.tasks.glyphs.load, {"seed": 0, "characters": 2}),
}  # fmt: skip


# ---- what comes in their place ---------------------------------------------------------------------------------------
# Each is a list of (what it is, the value): "same" first if it must work and give what the plain one gives, "data" if
# it must work.


class Metres(np.ndarray):
    """A subclass of which nobody knows what its operators mean."""


def spread(a):
    """The same numbers, every other one of a larger array, from its end."""
    wide = np.zeros(tuple(2 * n for n in a.shape), a.dtype)
    wide[tuple(slice(None, None, -2) for _ in a.shape)] = a
    return wide[tuple(slice(None, None, -2) for _ in a.shape)]


def frozen(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def mapped(a):
    memory = np.memmap(mapped.folder / f"{next(mapped.numbers)}", a.dtype, "w+", shape=a.shape or (1,))
    memory = memory if a.shape else memory.reshape(())
    memory[...] = a
    return memory


mapped.folder, mapped.numbers = None, itertools.count()


def touched(a, value):
    a = a.copy()
    a[(0,) * a.ndim] = value
    return a


def arrays_for(a):
    """Of an array: the same numbers otherwise in memory, and all that isn't an array like it."""
    yield "same: read-only", frozen(a)
    yield "same: every other one, backwards", spread(a)
    yield "same: transposed", np.array(a.T, order="C").T
    if a.ndim and a.size and mapped.folder:
        yield "same: in a file", mapped(a)
    if a.dtype.kind == "f" and a.size:
        yield "data: a NaN", touched(a, np.nan)
        yield "data: an infinity", touched(a, np.inf)
        yield "data: minus an infinity", touched(a, -np.inf)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for dtype in (np.int64, np.int8, np.uint64, bool, object, np.complex64, np.float16, np.float32, ">f8", ">i4",
                      "U8", "S8", "M8[s]", np.longdouble):  # fmt: skip
            if a.dtype != dtype and not (a.dtype.kind != "f" and dtype in ("M8[s]",)):
                yield f"as {np.dtype(dtype)}", np.asarray(a, np.int64 if dtype == "M8[s]" else None).astype(dtype)
        yield "a masked array", np.ma.masked_array(a, a > 0)
        yield "a subclass", a.copy().view(Metres)
        if a.ndim == 2:
            yield "a matrix", np.matrix(a)
        records = np.zeros(a.shape, [("a", "f8"), ("b", "i4")])
        yield "records", records
    for axis in range(a.ndim):
        yield f"nothing along axis {axis}", np.take(a, [], axis)
        yield f"one more along axis {axis}", np.concatenate([a, np.take(a, [0], axis)], axis)
        yield f"one along axis {axis}", np.take(a, [0], axis)
    yield "an axis more", a[None]
    yield "0-d", a.ravel()[0].reshape(())
    if a.ndim:
        yield "an axis less", a[0]
    if a.dtype.kind == "i":
        yield "too large", a + 2**40
        yield "negative", a - 2**40


def nothing_like_it():
    yield "None", None
    yield "text", "text"
    yield "a number as text", "1"
    yield "an object", object()
    yield "a generator", (x for x in "ab")
    yield "a function", len
    yield "a set", {1.5}
    yield "a complex number", 1j


def arrays(a):
    bare = a.data if isinstance(a, T) else a
    if isinstance(a, np.ndarray):
        yield "same: a Tensor", T(a)
        yield "same: a list", a.tolist()
    for label, b in arrays_for(bare):
        yield label if bare is a else label.replace("same", "bare").replace("data", "bare"), b
        if b.dtype in (*tm.tensor.FLOATS, *tm.tensor.DATA) and type(b) in (np.ndarray, np.memmap):
            yield f"{label}, a Tensor", T(b)
    yield "ragged", [[1.0, 2.0], [3.0]]
    yield "an empty list", []
    yield "a list of Tensors", [T(1.0), T(2.0)]
    yield "a dict", {"a": bare}
    yield "a number", 2
    yield "a huge number", 10**400
    yield from nothing_like_it()


def numbers(x, loops=False):
    """Of a setting; loops: it is a number of steps, and large ones would only take long."""
    if type(x) is int:
        yield "same: np.int64", np.int64(x)
        yield "same: np.int8", np.int8(x)
    else:
        yield "same: np.float64", np.float64(x)
    for value in (np.nan, np.inf, -np.inf, -1, -1.0, -3, 0, 0.0, 1, 1.5, 2.0, True, False, np.True_, 2**70, 10**400):
        if loops and type(value) is int and value > 99:
            continue
        yield f"{value:.10}" if isinstance(value, float) else f"{value}"[:12], value
    yield "Decimal", __import__("decimal").Decimal("0.5")
    yield "np.nan", np.float64(np.nan)
    yield "0-d array", np.array(x)
    yield "0-d NaN", np.array(np.nan)
    yield "0-d Tensor", T(np.array(x))
    yield "0-d Tensor of NaN", T(np.nan)
    yield "an array", np.array([x, x])
    yield "a Tensor", T(np.array([x, x]))
    yield "a list", [x]
    yield "a list of two", [x, x]
    yield "a list with None", [x, None]
    yield "a list with NaN", [x, np.nan]
    yield "an empty tuple", ()
    yield "float16", np.float16(0.5)
    yield from nothing_like_it()


def lists(xs):
    """Of parameters, gradients, noise: Tensors or arrays."""
    xs, tensors = list(xs), isinstance(xs[0], T)
    yield "same: a tuple", tuple(xs)
    yield "once: a generator", (x for x in xs)
    yield "once: a map", map(T, xs) if tensors else map(np.asarray, xs)
    yield "empty", []
    yield "too short", xs[:-1]
    yield "too long", [*xs, xs[-1]]
    yield "reversed", xs[::-1]
    yield "a Tensor", T(xs[0])
    yield "an array", T(xs[0]).data
    yield "a dict", dict(enumerate(xs))
    yield "nested", [xs]
    yield "a number", 2.0
    for i, x in enumerate(xs):
        for label, b in arrays_for(T(x).data):
            if b.dtype in (*tm.tensor.FLOATS, *tm.tensor.DATA) and type(b) in (np.ndarray, np.memmap):
                yield f"{label}, at {i}", [*xs[:i], T(b) if tensors else b, *xs[i + 1 :]]
            if not label.startswith(("same", "data")):
                yield f"{label}, an array at {i}", [*xs[:i], b, *xs[i + 1 :]]
        for label, thing in [("a number", 2.0), *nothing_like_it()]:
            yield f"{label} at {i}", [*xs[:i], thing, *xs[i + 1 :]]
    yield from nothing_like_it()


def nested(data):
    """Of support and query."""
    x, y = data
    yield "same: a list", [x, y]
    for a in (x, y):
        for label, b in arrays_for(a):
            yield f"{label}, in data", (b, y) if a is x else (x, b)
    yield "another number of tasks", (np.concatenate([x, x]), np.concatenate([y, y]))
    yield "no task", (x[:0], y[:0])
    yield "no examples", (x[:, :0], y[:, :0])
    yield "a generator of them", (a for a in data)
    for label, thing in [("empty", ()), ("a number", 2.0), ("a set", {1})]:
        yield label, thing
    for label, thing in nothing_like_it():
        yield label, thing
        yield f"{label} inside", (x, thing)


def functions(f):
    def returning(change):
        def g(*args, **keywords):
            return change(f(*args, **keywords))

        return g

    yield "returns None", lambda *args, **keywords: None
    yield "returns a number", lambda *args, **keywords: 2.0
    yield "returns text", lambda *args, **keywords: "text"
    yield "returns an empty list", lambda *args, **keywords: []
    yield "returns a list of None", lambda *args, **keywords: [None, None]
    yield "returns a pair of None", lambda *args, **keywords: (None, None)
    yield "returns a Tensor", lambda *args, **keywords: T(2.0)
    yield "returns a row", lambda *args, **keywords: T(np.ones((1, 2, 3)))
    yield "returns an array", lambda *args, **keywords: np.ones(2)
    yield "returns integers", returning(lambda y: y.astype(np.int64) if isinstance(y, T) else y)
    yield "returns the bare array", returning(lambda y: y.data if isinstance(y, T) else y)
    yield "returns float32", returning(lambda y: y.astype(np.float32) if isinstance(y, T) else y)
    yield "is detached", returning(lambda y: tm.stop_gradient(y))
    yield "keeps an axis", returning(lambda y: y[..., None] if isinstance(y, T) else y)
    yield "returns a list more", returning(lambda y: [y])
    yield "is no function", 3
    yield "a list", [f, f]
    yield from [(label, thing) for label, thing in nothing_like_it() if label != "a function"]


def shapes(shape):
    """Of sizes, axes, orders."""
    yield "same: a list", list(shape)
    yield "once: a generator", (n for n in shape)
    yield "same: np.int64", tuple(map(np.int64, shape))
    if shape:
        yield "same: an array", np.array(shape)
    for bad in (-1, -5, 0, 7, 1.5, True, None, "1", np.nan, 2**70, 10**30, T(1), (1, 2)):
        yield f"{bad} at the end", (*shape[:-1], bad)
        yield f"{bad} at the start", (bad, *shape[1:])
    yield "empty", ()
    yield "longer", (*shape, 2)
    yield "shorter", shape[:-1]
    yield "a number", 1
    yield "a float", 1.5
    yield "a Tensor", T(np.array(shape))
    yield from nothing_like_it()


def types(dtype):
    for bad in (np.float16, np.complex64, object, "U5", ">f8", "nonsense", int, bool, float, 3, [1, 2], np.longdouble,
                [("a", "f8")]):  # fmt: skip
        yield f"{bad}", bad
    yield "None", None
    yield "an array", np.ones(2)


def generators(rng):
    yield "a seed", 0
    yield "the module", np.random
    yield "the old kind", np.random.RandomState(0)
    yield "the class", np.random.default_rng
    yield "an array", np.ones(2)
    yield from nothing_like_it()


def flags(flag):
    for value in (None, 0, 1, "text", np.True_, np.array(True), np.ones(2), T(1.0), [1]):
        yield f"{value}", value


def words(text):
    for value in ("nonsense", "", -1, 1.5, True, np.nan, (1, 2), [1], 100, np.int64(1), T(1), np.array(1)):
        yield f"{value!r}", value
    yield from nothing_like_it()


def groups(modules):
    for value in ([], [[]], [[0]], [[0, 0], [1]], [[0], [1], [2]], [[0, 1]], [[0.0, 1.0]], [[-1, 0]], [0, 1], 3, [[None]],
                  ((0,), (1,)), [["0"]], "01", (m for m in modules), np.array([[0], [1]])):  # fmt: skip
        yield f"{value}", value
    yield from nothing_like_it()


def drawings(characters):
    for field in characters._fields:
        for label, value in nothing_like_it():
            yield f"{label} for {field}", characters._replace(**{field: value})
    yield "none", characters._replace(images=characters.images[:0], names=characters.names[:0])
    yield "fewer images", characters._replace(images=characters.images[:3])
    yield "one size more", characters._replace(images=characters.images[None])
    yield "floats", characters._replace(images=characters.images / 255)
    yield "one character", characters._replace(images=characters.images[:1], names=characters.names[:1])
    yield "same: read-only", characters._replace(images=frozen(characters.images))
    yield "same: backwards", characters._replace(images=characters.images[::-1].copy()[::-1])
    yield "a tuple", tuple(characters)
    yield "the images", characters.images
    yield from nothing_like_it()


def populations(noise):
    outer, inner = noise
    yield "same: a list", [outer, inner]
    for label, value in lists(outer):
        yield f"outer {label}".replace("outer same", "same: outer").replace("outer data", "data: outer"), (value, inner)
    for label, value in lists(inner):
        yield f"inner {label}".replace("inner same", "same: inner").replace("inner data", "data: inner"), (outer, value)
    yield "the wrong way round", (inner, outer)
    yield "one of them", outer
    yield "three", (outer, inner, inner)
    yield from nothing_like_it()


def waves(x):
    for field in x._fields:
        for label, value in arrays_for(getattr(x, field)):
            yield f"{label} for {field}", x._replace(**{field: value})
        for label, value in nothing_like_it():
            yield f"{label} for {field}", x._replace(**{field: value})
    yield from nothing_like_it()


LOOPS = ("halvings", "order", "blocks", "shards", "tasks", "stop", "characters")


def replacements(name, value):
    """The kind of argument is seen from a valid one."""
    if name in ("support", "query"):
        return nested(value)
    if name == "noise" and isinstance(value, tuple):
        return populations(value)
    if isinstance(value, (T, np.ndarray)):
        return arrays(value)
    if isinstance(value, tm.tasks.episodes.Characters):
        return drawings(value)
    if isinstance(value, tm.tasks.sinusoid.Waves):
        return waves(value)
    if isinstance(value, bool):
        return flags(value)
    if isinstance(value, (int, float)):
        return numbers(value, name.endswith("steps") or name in LOOPS)
    if isinstance(value, str):
        return words(value)
    if isinstance(value, np.random.Generator):
        return generators(value)
    if isinstance(value, type) and issubclass(value, np.generic):
        return types(value)
    if callable(value):
        return functions(value)
    if name == "modules":
        return groups(value)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (T, np.ndarray)) and name != "state":
        return lists(value)
    if isinstance(value, tuple) and all(isinstance(n, int) for n in value):
        return shapes(value)
    several = itertools.chain(numbers(0.5), lists([T(1.0), T(2.0)]))  # lr, alpha, lam, state: of one kind or another
    return (
        (label.replace("same", "other").replace("data", "other").replace("once", "other"), x) for label, x in several
    )


# What is refused although it is "same" or "data", and why.
REFUSES = {
    ("check_grads", "xs"): "finite differences need finite values",
    ("a sharded function", "x"): "nested numbers are fixed values, which can't be split by tasks",
    ("tasks.sinusoid.Waves", "x"): "data is drawn with NumPy, and a Tensor would lose its graph",
    ("meta.shrinkage", "theta"): "a variance that isn't finite is a λ that isn't",
}


# ---- a try -----------------------------------------------------------------------------------------------------------


def fresh(arguments):
    return {
        name: x if isinstance(x, tm.tasks.episodes.Characters) else copy.deepcopy(x) for name, x in arguments.items()
    }


def flat(x):
    """All arrays and numbers in a result, of a NamedTuple, dict or list of them."""
    if isinstance(x, T):
        return [x.data]
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, (list, tuple)):
        return [a for part in x for a in flat(part)]
    return [np.asarray(x)] if isinstance(x, (np.ndarray, np.generic, int, float)) else []


def outcome(f, arguments):
    """(its result, None), or (None, the exception); a warning counts as one."""
    before = [a.tobytes() for a in flat(arguments)]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".* tasks? (are|is) not finite|.*not positive definite", RuntimeWarning)
            result, error = f(**arguments), None
            flat(result)
    except Exception as caught:  # noqa: BLE001
        result, error = None, caught
    assert before == [a.tobytes() for a in flat(arguments)], "an input was changed"
    return result, error


def where_raised(error):
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    file = frame.tb_frame.f_code.co_filename
    return file, frame.tb_lineno, linecache.getline(file, frame.tb_lineno).strip()


def fault(name, label, f, arguments, argument, value, expected):
    """What is wrong with the way this is met; None if nothing is."""
    result, error = outcome(f, {**arguments, argument: value})
    if error is None:
        tried["works"] += 1
        if label.startswith(("same", "once")) or isinstance(value, (np.ndarray, T)) and "same" in label:
            a, b = flat(result), flat(expected)
            alike = len(a) == len(b) and all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(a, b))
            if not alike or not all(
                np.allclose(x, y, 1e-12, equal_nan=True) for x, y in zip(a, b) if x.dtype.kind in "fiub"
            ):
                return f"gives {a} and not {b}"
        return None
    tried["refused"] += 1
    file, line, source = where_raised(error)
    what = f"{type(error).__name__}: {str(error)[:300]}"
    if re.search(r"(takes|missing) .*positional argument", str(error)):  # of the caller's own function
        return None
    if label.startswith(("same", "data")) and (name, argument) not in REFUSES:
        return f"doesn't work: {what}"
    if not isinstance(error, (TypeError, ValueError, IndexError, tm.GradientError)):
        return f"{what} (from {file}:{line})"
    if file == __file__ and not name.startswith("Tensor"):  # a loss of ours that met what it can't use
        return None
    if isinstance(arguments[argument], bool) and "truth value" in str(error):  # a flag is what Python takes for true
        return None
    if not file.startswith(HOME) or not source.startswith("raise"):
        return f"{what} (from {pathlib.Path(file).name}:{line}, `{source}`)"
    return None


@pytest.mark.parametrize("name", CALLS)
def test_each_argument_is_met(name, tmp_path):
    mapped.folder = tmp_path
    f, arguments = CALLS[name]
    expected, error = outcome(f, fresh(arguments))
    assert error is None, error
    faults = []
    for argument in arguments:
        for label, value in replacements(argument, fresh(arguments)[argument]):
            found = fault(name, label, f, fresh(arguments), argument, value, expected)
            if found:
                faults.append(f"{argument}: {label}: {found}")
    assert not faults, f"{len(faults)} of {name}:\n" + "\n".join(faults)
