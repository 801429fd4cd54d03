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
        lambda x, y: tm.compile(lambda x, y: [scalar(x, y) / len(x)], tasks=("x", "y"), shards=2)(x, y),
        {"x": X, "y": T(Y)},
    ),
    # nn
    "nn.init_mlp": (tm.nn.init_mlp, {"rng": generator(), "sizes": (1, 3, 1), "dtype": np.float64, "scale": 1.0}),
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
    "draw": (tm.draw, {"y": tm.sum(T(X) * T(Y)), "names": None, "format": "svg", "limit": 9}),
    # solvers
    "solvers.clip": (tm.solvers.clip, {"grads": STACK, "norm": 0.5, "stacked": True}),
    "solvers.clipped": (
        tm.solvers.clipped,
        {"params": STACK, "grads": GRADS, "state": None, "lr": 0.1, "norm": 0.5, "rule": tm.solvers.sgd},
    ),
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
    "meta.init_meta_sgd": (tm.meta.init_meta_sgd, {"w": THETA, "alpha": 0.1}),
    "meta.split": (tm.meta.split, {"theta": THETA}),
    "meta.maml_plus_plus": (
        tm.meta.maml_plus_plus,
        {"loss": linear, "theta": tm.meta.init_lslr(THETA, 0.1, STEPS), **DATA, "steps": STEPS,
         "weights": np.array([0.5, 0.5]), "first_order": False, "batch": all_of_it},
    ),
    "meta.init_lslr": (tm.meta.init_lslr, {"w": THETA, "alpha": 0.1, "steps": STEPS}),
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
            warnings.filterwarnings("ignore", "compile: the shards run one after the other", RuntimeWarning)
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


def told(value, message):
    """Does the message show the number, text or None that came, or the shape () of what it has been made?"""
    short = value is None or isinstance(value, str) or isinstance(value, (int, float, complex)) and abs(value) < 100
    return not short or any(text in message for text in (f"{value!s:.8}", "()", "<U"))


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
    if not told(value, str(error)) and not isinstance(arguments[argument], bool):
        return f"doesn't say what came: {what}"
    return None


@pytest.mark.parametrize("name", CALLS)
def test_each_argument_is_met(name, tmp_path, long):
    """The short form tries what must work, and a third of the rest."""
    mapped.folder = tmp_path
    f, arguments = CALLS[name]
    expected, error = outcome(f, fresh(arguments))
    assert error is None, error
    faults = []
    for argument in arguments:
        for i, (label, value) in enumerate(replacements(argument, fresh(arguments)[argument])):
            if not (long or label.startswith(("same", "once", "data")) or i % 3 == 0):
                continue
            found = fault(name, label, f, fresh(arguments), argument, value, expected)
            if found:
                faults.append(f"{argument}: {label}: {found}")
    assert not faults, f"{len(faults)} of {name}:\n" + "\n".join(faults)


# ---- nothing is left out ---------------------------------------------------------------------------------------------

INTERNAL = "called by others in its file, on what they have checked"
LEFT_OUT = {
    "GradientError": "an exception",
    "KinkError": "an exception",
    "solvers.Solution": "a record",
    "meta.require_finite": "asks for what an algorithm has been called with just before: test_finite.py",
    "tasks.episodes.Characters": "a record",
    **dict.fromkeys(("nn.init_blocks", "nn.blocks_of", "nn.row"), INTERNAL),
    **{
        f"solvers.{name}": INTERNAL
        for name in "step parameters alongside with_momentum like step_sizes update of_tasks checked"
        " solution_of largest size".split()
    },
    **{
        f"tasks.episodes.{name}": INTERNAL
        for name in "choose distinct gather check_sizes require_characters shrink".split()
    },
    **{f"tasks.glyphs.{name}": INTERNAL for name in "draw_alphabet invent walk hang frame ink".split()},
    **{f"tasks.sinusoid.{name}": INTERNAL for name in "check_range require_waves".split()},
}


def public():
    modules = {"": tm, "nn.": tm.nn, "solvers.": tm.solvers, "meta.": tm.meta}
    modules |= {f"tasks.{m.__name__.rpartition('.')[2]}.": m for m in (
        tm.tasks.sinusoid, tm.tasks.episodes, tm.tasks.glyphs)}  # fmt: skip
    for prefix, module in modules.items():
        for name, f in vars(module).items():
            own = getattr(f, "__module__", None) == module.__name__ or module in (tm, tm.meta)
            if callable(f) and own and not name.startswith("_"):
                yield prefix + name, f


def test_every_public_callable_is_in_the_table():
    """tasks.omniglot has a file of its own: test_omniglot_data.py."""
    known = {name.split()[0] for name in CALLS}
    names = dict(public())
    assert not sorted(set(names) - known - set(LEFT_OUT))
    assert not sorted(set(LEFT_OUT) - set(names)) and not set(LEFT_OUT) & known


def test_methods_of_tensor_are_functions_of_the_package():
    own = "serials shape dtype ndim size op item T data kernel inputs pullbacks serial origin".split()
    for name, f in vars(T).items():
        if not name.startswith("_") and name not in own:
            assert f is getattr(tm, name)


# ---- special cases, with the words that must come --------------------------------------------------------------------


def learn(algorithm=tm.meta.maml, **changes):
    return algorithm(**{**LEARN, **changes})


def raising(phi, data):
    raise KeyError("mine")


def matrix(a):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.matrix(a)


def masked(a):
    return np.ma.masked_array(a, np.isnan(a))


F32, MASK, UINT = T(np.ones(2, np.float32)), T(X > 0), T(np.array([1, 2], np.uint64))
SPECIAL = [
    # arrays
    (lambda: T(masked(X)), TypeError, "plain array.*MaskedArray of float64, shape (2, 3)"),
    (lambda: T(matrix(X)), TypeError, "plain array.*a matrix of float64"),
    (lambda: matrix(np.eye(2)) * T(np.ones((2, 2))), TypeError, "a matrix of float64"),
    (lambda: T(np.ones((2, 2))) @ matrix(np.eye(2)), TypeError, "a matrix of float64"),
    (lambda: masked(X) * T(X), TypeError, "MaskedArray"),
    (lambda: T(np.ones(3, ">f8")), TypeError, "not >f8 (shape (3,)): convert it first"),
    (lambda: T([[1.0], [1.0, 2.0]]), ValueError, "a list with rows that differ"),
    (lambda: T("1"), TypeError, "not <U1 (shape ())"),
    (lambda: T(None), TypeError, "not None: convert"),
    # ops
    (lambda: -MASK, TypeError, "negative of a Tensor of bool, shape (2, 3)"),
    (lambda: tm.max(np.ones((2, 0)), axis=1), ValueError, "max of a Tensor of float64, shape (2, 0)"),
    (lambda: tm.min(np.ones(0)), ValueError, "min of a Tensor of float64, shape (0,)"),
    (lambda: T(X).swapaxes((0, 1), 0), ValueError, "axis (0, 1) of shape (2, 3): one axis is needed"),
    (lambda: tm.concatenate([X, Y], axis=(0, 1)), ValueError, "axis (0, 1) of shape (2, 3): one axis"),
    (lambda: tm.stack([X, Y], axis=3), ValueError, "axis 3 of shape (1, 2, 3)"),
    (lambda: tm.stack(None), TypeError, "xs is a list of Tensors, got None"),
    (lambda: UINT + 1, TypeError, "add of uint64 and integers with a sign"),
    (lambda: UINT * T(np.array([1, 2])), TypeError, "multiply of uint64 and integers with a sign"),
    (lambda: T(np.array([1])) + np.uint64(2**63), ValueError, "the number is too large for int64"),
    (lambda: T(X) + 10**400, ValueError, "the number is too large for float64"),
    (lambda: T(X.astype("f")) * 1e39, ValueError, "multiply of a Tensor of float32, shape (2, 3) and a float, 1e+39: the"),
    (lambda: -(10**39) / T(X.astype("f")), ValueError, "the number is too large for float32"),
    (lambda: tm.solvers.sgd([T(X.astype("f"))], [T(X.astype("f"))], lr=1e300), ValueError, "too large for float32"),
    (lambda: T(X)[2], IndexError, "gather of a Tensor of float64, shape (2, 3): index 2 is out of bounds"),
    (lambda: T(X)[0, 0, 0], IndexError, "gather of a Tensor of float64, shape (2, 3): too many indices"),
    (lambda: tm.scatter(X, np.array([0, 9]), (4, 3)), IndexError, "scatter to shape (4, 3)"),
    (lambda: T(X).astype("nonsense"), TypeError, "dtype must be float32, float64, integers or booleans, got a str"),
    (lambda: T(X).astype(None), TypeError, "dtype must be .*, got None"),
    (lambda: tm.pad(X, 1.5), ValueError, "pad: widths are 0 or more.*got 1.5"),
    (lambda: tm.reshape(X, "6"), TypeError, "whole numbers, got a str, '6'"),
    (lambda: F32 * np.ones(2), TypeError, "multiply of float32 and float64: convert one"),
    # derivatives
    (lambda: tm.grad(None, []), TypeError, "grad needs the Tensor to differentiate, got None"),
    (lambda: tm.vjp(T(X), [T(X)], 1j * X), TypeError, "not complex128 (shape (2, 3))"),
    (lambda: tm.vjp(T(X), [T(X)], "1"), TypeError, "not <U1"),
    (lambda: tm.vjp(None, [T(X)], X), TypeError, "y is a list of Tensors, got None"),
    (lambda: tm.hvp(scalar, [T(X), T(Y)], [X]), ValueError, "vs must be one direction for each x"),
    (lambda: tm.jvp(None, [T(X)], [X]), TypeError, "f must be a function, got None"),
    (lambda: tm.check_grads(tm.sin, [X], tol=np.nan), ValueError, "tol must be positive and finite, got nan"),
    (lambda: tm.check_grads(lambda x: None, [X]), TypeError, "f returns a Tensor or a list of them, got None"),
    (lambda: tm.check_grads(tm.sin, [X.astype(np.float32)]), TypeError, "xs[0] is a Tensor of float32"),
    # settings
    *[(lambda v=v: learn(alpha=v), ValueError, f"alpha must be finite, got {v}") for v in (np.nan, np.inf, -np.inf)],
    (lambda: learn(alpha=[0.1, np.nan]), ValueError, "alpha must be finite, got nan"),
    (lambda: learn(alpha=True), TypeError, "alpha must be a number, got a bool, True"),
    (lambda: learn(alpha="0.1"), TypeError, "alpha must be a number, got a str, '0.1'"),
    (lambda: learn(alpha=[0.1]), ValueError, "2 parameters but 1 step sizes in alpha"),
    (lambda: learn(steps=-1), ValueError, "steps must be 0 or more, got -1"),
    (lambda: learn(steps=1.0), ValueError, "steps must be 0 or more, a whole number, got a float, 1.0"),
    (lambda: learn(steps=True), ValueError, "steps must be 0 or more, a whole number, got a bool, True"),
    (lambda: learn(steps=None), TypeError, "steps must be 0 or more, a whole number, got None"),
    (lambda: tm.solvers.sgd(STACK, GRADS, lr=np.nan), ValueError, "lr must be finite, got nan"),
    (lambda: tm.solvers.adam(STACK, GRADS, 3, lr=0.1), TypeError, "state is what adam has returned.*got an int, 3"),
    (lambda: tm.solvers.adam(STACK, GRADS, lr=0.1, eps=np.inf), ValueError, "eps must be 0 or more and finite, got inf"),
    (lambda: tm.solvers.neumann(identity, STACK, steps=1, eta=np.inf), ValueError, "eta must be positive and finite"),
    (lambda: tm.solvers.cg(identity, STACK, steps=1, tol=np.nan), ValueError, "tol must be 0 or more and finite"),
    (lambda: learn(tm.meta.imaml, lam=np.inf, cg_steps=1), ValueError, "lam must be positive and finite, got inf"),
    (lambda: learn(tm.meta.imaml, lam=[1.0], cg_steps=1), ValueError, "lam has 1 entries for 2 parameters"),
    (lambda: learn(tm.meta.imaml, lam=1.0, cg_steps=1, damping=[1.0]), TypeError, "damping must be a number, got a list"),
    (lambda: learn(tm.meta.imaml, lam=1.0, cg_steps=1, damping=np.inf), ValueError, "damping must be 0 or more and f"),
    (lambda: learn(tm.meta.imaml, lam=1.0, cg_steps=0.5), ValueError, "cg_steps must be 0 or more, a whole number"),
    (lambda: learn(tm.meta.es_maml, sigma=None, noise=None), TypeError, "sigma must be a number, got None"),
    (lambda: learn(tm.meta.es_maml, sigma=np.inf, noise=None), ValueError, "sigma must be positive and finite"),
    (lambda: learn(tm.meta.es_maml, sigma=1.0, noise=None), TypeError, "noise is (outer, inner).*got None"),
    (lambda: tm.meta.dropout(None), TypeError, "noise is a list of Tensors, got None"),
    (lambda: tm.meta.draw_noise(None, THETA, 0.1, tasks=1, steps=1), TypeError, "rng must be a np.random.Generator.*None"),
    (lambda: learn(tm.meta.leap, p=np.nan), ValueError, "p must be 1 or more, a whole number, got a float, nan"),
    (lambda: tm.meta.precisions([*THETA, T(0.0)], [0, 1]), TypeError, "modules is a list of lists"),
    (lambda: tm.nn.init_mlp(None, (1, 1)), TypeError, "rng must be a np.random.Generator"),
    (lambda: tm.nn.init_mlp(0, (1, 1)), TypeError, "rng must be .*got an int, 0"),
    (lambda: tm.nn.init_mlp(generator(), (1, 0)), ValueError, "sizes must be 1 or more, got 0"),
    (lambda: tm.nn.init_mlp(generator(), (1, 1), dtype=int), TypeError, "dtype must be float32, float64, got <class 'int'>"),
    # parameters and data
    (lambda: learn(theta=THETA[0]), TypeError, "theta is a list of Tensors, got a Tensor of float64"),
    (lambda: learn(theta=[1.0]), TypeError, "theta[0] is a float, 1.0: parameters are Tensors of floats"),
    (lambda: learn(theta=[*THETA, None]), TypeError, "theta[2] is None"),
    (lambda: learn(theta=[T(1), T(2)]), TypeError, "theta[0] is a Tensor of int64"),
    (lambda: tm.solvers.sgd(STACK, GRADS[:1], lr=0.1), ValueError, "2 parameters but 1 grads"),
    (lambda: learn(support=()), ValueError, "must have the tasks as their first axis; found nothing"),
    (lambda: learn(support=None), ValueError, "must have the tasks as their first axis; found .*None"),
    (lambda: learn(support=tuple(a[:0] for a in DATA["support"]), query=tuple(a[:0] for a in DATA["query"])),
     ValueError, "support and query have no tasks"),
    (lambda: learn(batch=lambda s, k: None), ValueError, "all arrays of a batch must have the tasks"),
    (lambda: learn(batch=3), TypeError, "batch must be a function, got an int, 3"),
    # functions
    (lambda: learn(loss=None), TypeError, "loss must be a function, got None"),
    (lambda: learn(loss=lambda phi, data: 1.0), ValueError, "returned a float, 1.0, expected a Tensor of floats of shape (2,)"),
    (lambda: learn(loss=lambda phi, data: linear(phi, data)[:1]), ValueError, "returned .*shape (1,), expected .*(2,)"),
    (lambda: learn(loss=lambda phi, data: linear(phi, data).data), ValueError, "returned an array of float64"),
    (lambda: learn(loss=lambda phi, data: tm.stop_gradient(linear(phi, data))), ValueError, "does not depend on any"),
    (lambda: learn(loss=lambda phi, data: T(np.ones(2))), ValueError, "does not depend on any parameter"),
    (lambda: learn(loss=raising), KeyError, "mine"),
    (lambda: learn(rule=lambda *a, lr: a[0]), TypeError, "the rule returned a list, expected a tuple (params, state)"),
    (lambda: learn(rule=lambda *a, lr: (a[0][:1], None)), ValueError, "what the rule returned has shapes"),
    (lambda: learn(rule=lambda params, grads, state, lr: ([p.astype("f") for p in params], None)), TypeError,
     "what the rule returned has a Tensor of float32, shape .* as parameter 0, expected float64"),
    (lambda: learn(rule=lambda params, grads, state, lr: ([T(p.data - lr * g.data) for p, g in zip(params, grads)], None)),
     ValueError, "the rule returned a leaf, from which no gradient gets back"),
    (lambda: learn(rule=tm.compile(lambda params, grads, state, lr: tm.solvers.sgd(params, grads, lr=lr))), ValueError,
     "the rule returned a leaf"),
    (lambda: tm.solvers.adam([T(X)], [T(X)], lr=0.1, beta1=1.0), ValueError, "beta1 and beta2 must be below 1, got 1.0"),
    (lambda: tm.solvers.adam([T(X)], [T(X)], lr=0.1, beta2=2.0), ValueError, "beta1 and beta2 must be below 1"),
    (lambda: tm.nn.batch_norm(X, eps=-1.0), ValueError, "eps must be 0 or more"),
    (lambda: tm.meta.per_step([T(X)], [T(X)], lr=[T(0.1)]), ValueError, "lr has shapes [()], expected (steps,)"),
    (lambda: tm.meta.dropout([np.ones(3)])([T(np.ones(3))], [T(np.ones(3))], lr=0.1), ValueError, "needs noise (tasks,"),
    (lambda: tm.solvers.cg(lambda v: [v[0].astype("f")], [T(X)], steps=1), TypeError, "what matvec returned has a Tensor"),
    (lambda: learn(tm.meta.reptile, rule="sgd"), TypeError, "rule must be a function, got a str, 'sgd'"),
    (lambda: learn(tm.meta.imaml, lam=1.0, cg_steps=1, solve=lambda g, phi, lr, steps: None), TypeError,
     "what solve returned is a list of Tensors, got None"),
    (lambda: learn(tm.meta.imaml, lam=1.0, cg_steps=1, linear_solver=lambda *a, **k: a[1]), TypeError,
     "linear_solver returned a list, expected a tm.solvers.Solution"),
    (lambda: tm.solvers.cg(identity, [STACK[0], STACK[0][:1]], steps=1), ValueError, "cg: b has shapes [(2, 3), (1, 3)], expected (tasks, ...)"),
    (lambda: tm.meta.precisions([*THETA, T(0.0)], [[0, True]]), ValueError, "an index in modules must be 0 or more"),
    (lambda: tm.solvers.cg(lambda v: None, STACK, steps=1), ValueError, "cg: b has shapes .* matvec.* None"),
    (lambda: tm.solvers.gradient_descent(lambda phi, k: tm.sum(phi[0]), STACK, lr=0.1, steps=1), ValueError,
     "the loss returned a Tensor of float64, shape (), expected a Tensor of floats of shape (2,), one loss per task"),
    # compiled
    (lambda: tm.compile(None), TypeError, "f must be a function, got None"),
    (lambda: tm.compile(scalar, tasks="x"), TypeError, "compile: tasks is a tuple, got a str, 'x'"),
    (lambda: tm.compile(scalar)({1.0}, X), TypeError, "compile: a fixed value must be hashable, got a set"),
    (lambda: tm.compile(lambda x: x.data)(X), TypeError, "compile: f returned an array of float64"),
    (lambda: tm.compile(lambda x, y: [tm.sum(x * y)], tasks=["x", "y"], shards=2)([[1.0], [2.0]], X), TypeError,
     "compile: x has tasks and must be arrays, got a list"),
    # tasks
    (lambda: tm.tasks.sinusoid.draw_waves(None, 2), TypeError, "rng must be a np.random.Generator"),
    (lambda: tm.tasks.sinusoid.draw_waves(generator(), 2)(np.ones((2, 1), int)), TypeError, "x must be an array of floats"),
    (lambda: tm.tasks.sinusoid.draw_waves(generator(), 2)(np.ones(2)), ValueError, "x of shape (2,) for 2 waves"),
    (lambda: tm.tasks.sinusoid.test_tasks(0, 2, 3, low=np.nan), ValueError, "low must be finite, got nan"),
    (lambda: tm.tasks.episodes.draw_episodes(generator(), CHARACTERS, 1, 2, 1, 1, dtype=np.uint8), TypeError,
     "dtype must be float32, float64"),
    (lambda: tm.tasks.episodes.split(None, 0), TypeError, "characters must be Characters.*got None"),
    (lambda: tm.tasks.glyphs.load(characters=1.5), ValueError, "characters must be 1 or more, a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(
    "use, error, words", SPECIAL, ids=[f"{i}: {words[:40]}" for i, (*_, words) in enumerate(SPECIAL)]
)
def test_the_words(use, error, words):
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises(error, match=pattern) as caught:
        use()
    assert type(caught.value) is error and len(str(caught.value)) < 400


def test_an_index_out_of_range_in_a_compiled_function_is_named():
    f = tm.compile(lambda x, i: x[i])
    assert f(X[0], np.array([0, 2])).data.tolist() == X[0, [0, 2]].tolist()
    with pytest.raises(IndexError, match="compile: gather of .* index 7 is out of bounds"):
        f(X[0], np.array([0, 7]))
    assert f(X[0], np.array([0, 2])).data.tolist() == X[0, [0, 2]].tolist()


def test_a_fixed_nan_is_one_program():
    calls = []

    def f(x, c):
        calls.append(c)
        return x * c

    compiled = tm.compile(f)
    for _ in range(3):
        assert np.isnan(compiled(X, float("nan")).data).all()
    assert len(calls) == 3  # traced, and traced again on other values of either sign


def test_a_parameter_of_no_elements_takes_part():
    empty = T(np.zeros((2, 0)))
    for solution in (
        tm.solvers.cg(identity, [*STACK, empty], steps=2),
        tm.solvers.cg(identity, [empty], steps=2),
        tm.solvers.neumann(identity, [*STACK, empty], steps=2, eta=1.0),
    ):
        assert solution.x[-1].shape == (2, 0) and np.isfinite(solution.residual.data).all()
    _, meta_grad = learn(tm.meta.imaml, theta=[*THETA, T(np.zeros(0))], lam=1.0, cg_steps=1)
    assert meta_grad[2].shape == (0,)


@pytest.mark.parametrize("algorithm", [tm.meta.maml, tm.meta.truncated])
def test_a_loss_that_pulls_to_theta_is_differentiated_through_theta_too(algorithm):
    """G(φ) = L(φ) + λ/2 ‖φ − θ‖² holds the very θ that is learned: maml(proximal(loss, theta, lam), theta, ...)."""

    def value(arrays):
        theta = [T(a) for a in arrays]
        g = tm.meta.proximal(linear, theta, 2.0)
        phi = tm.meta.adapt(g, theta, DATA["support"], alpha=0.1, steps=2)
        return tm.mean(g(phi, DATA["query"])).item()

    theta = [T(t.data.copy()) for t in THETA]
    pulled_back = {"loss": tm.meta.proximal(linear, theta, 2.0), "theta": theta}
    _, meta_grad = learn(algorithm, **pulled_back, **({"last": 2} if algorithm is tm.meta.truncated else {}))
    for first_order, options in [
        (tm.meta.fomaml, {}),
        (tm.meta.truncated, {"last": 1}),
        (tm.meta.truncated, {"last": 0}),
        (tm.meta.imaml, {"lam": 20.0, "cg_steps": 2}),
    ]:
        with pytest.raises(ValueError, match="objective depends on theta itself, .* use tm.meta.maml"):
            learn(first_order, **pulled_back, **options)
    for i, g in enumerate(meta_grad):
        up, down = ([t.data + sign * 1e-6 * (i == j) for j, t in enumerate(theta)] for sign in (1, -1))
        np.testing.assert_allclose(g.item(), (value(up) - value(down)) / 2e-6, rtol=1e-6)


def test_a_parameter_that_is_given_twice_is_two():
    same = T(np.zeros((1, 1)))
    _, expected = learn(theta=[T(np.zeros((1, 1))), T(np.zeros((1, 1)))])
    _, found = learn(theta=[same, same])
    assert [g.item() for g in found] == [g.item() for g in expected] and found[0].item() != found[1].item()


def test_nan_and_infinity_in_data_come_out_again():
    for bad in (np.nan, np.inf):
        x = touched(DATA["support"][0], bad)
        with np.errstate(all="ignore"):
            value, meta_grad = learn(support=(x, DATA["support"][1]))
        assert np.isnan(value.item()) and all(np.isnan(g.item()) for g in meta_grad)


def test_a_generator_is_used_once_and_whole():
    xs = [T(X), T(Y)]
    for f in (tm.hessian, lambda f, xs: tm.hvp(f, xs, iter([Y, X])), lambda f, xs: tm.jvp(f, xs, iter([Y, X]))):
        for a, b in zip(flat(f(scalar, iter(xs))), flat(f(scalar, xs))):
            np.testing.assert_array_equal(a, b)


def test_how_many_inputs_were_tried():
    """The last test of this file. pytest -s shows the number, and --long tries them all."""
    print(f"\ninputs tried: {sum(tried.values())}, {tried['works']} work, {tried['refused']} are refused")
