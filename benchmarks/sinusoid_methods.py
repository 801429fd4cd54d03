"""What benchmarks/sinusoid trains: every algorithm with its settings, and how its θ adapts to a new wave.

alpha is the inner step, at test too; `budget` is iterations and first outer step, and `full` the same with --full. The
first four were tuned by hand, the relatives little: one to four tries each.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

import tinymeta as tm

TASKS, TRAINING_SHOTS = 25, 10  # an iteration
TEST_STEPS = 10


def loss(phi, data):
    x, y = data
    return tm.nn.mse(tm.nn.mlp(phi, x), y)


# ---- how θ adapts at test: (objective, weights, options of tm.meta.adapt) --------------------------------------------


def plainly(theta, alpha, inner):
    return loss, theta, {"alpha": alpha, "rule": inner.get("rule", tm.solvers.sgd)}


def pulled(theta, alpha, inner):
    """On iMAML's proximal problem, as in training."""
    options = {key: inner[key] for key in ("rule", "solve") if key in inner}
    return tm.meta.proximal(loss, theta, inner["lam"]), theta, {"alpha": alpha, **options}


def shrunk(theta, alpha, inner):
    weights, lam = tm.meta.precisions(theta, inner["modules"])
    return tm.meta.proximal(loss, weights, lam), weights, {"alpha": alpha, "rule": inner["rule"]}


def head_only(theta, alpha, inner):
    head_loss = lambda phi, data: loss([*tm.stop_gradient(phi[: -inner["head"]]), *phi[-inner["head"] :]], data)
    return head_loss, *plainly(theta, alpha, inner)[1:]


def by_learned_steps(theta, alpha, inner):
    weights, a = tm.meta.split(theta)
    return plainly(weights, a, inner)


def by_learned_steps_in_turn(theta, alpha, inner):
    """After the steps that were trained, the last one's size goes on."""
    weights, a = tm.meta.split(theta)
    a = [tm.concatenate([a_i, tm.broadcast_to(a_i[-1:], (TEST_STEPS,))]) for a_i in a]
    return loss, weights, {"alpha": a, "rule": tm.meta.per_step}


# ---- what else an iteration takes: (rng, theta, share of the training that is done) -> arrays ------------------------


def multi_step_weights(rng, theta, done):
    """The published schedule's first tenth."""
    return {"weights": tm.meta.multi_step_weights(5, int(100 * done), epochs=10)}


def dropout_noise(rng, theta, done):
    return {"noise": tm.meta.draw_noise(rng, theta, 0.1, tasks=TASKS, steps=1)}


def es_noise(perturbations, queries):
    def draw(rng, theta, done):
        sizes = {"steps": 1, "perturbations": perturbations, "queries": queries}
        return {"noise": tm.meta.draw_es_noise(rng, theta, TASKS, **sizes)}

    return draw


def maml_with_dropout(loss, theta, support, query, *, noise, rule=tm.solvers.sgd, **inner):
    return tm.meta.maml(loss, theta, support, query, rule=tm.meta.dropout(noise, rule), **inner)


# ---- the methods -----------------------------------------------------------------------------------------------------


@dataclass
class Method:
    title: str
    algorithm: Callable  # (loss, theta, support, query, **inner, **drawn) -> (query loss, meta_grad)
    inner: dict
    budget: tuple  # adam's outer step falls to 0 along a cosine, sgd's along a line
    full: tuple = (70_000, 1e-3)  # the released code's iterations
    outer: Callable = tm.solvers.adam
    start: Callable = list  # weights -> θ
    draw: Callable | None = None
    at_test: Callable = plainly


STEP, FIVE = dict(alpha=0.01, steps=1), dict(alpha=0.01, steps=5)
REPTILE = dict(alpha=0.005, steps=10)  # at .02 θ becomes too steep for its steps, on some seeds
IMAML = dict(alpha=0.001, steps=16, rule=tm.solvers.nesterov, lam=10.0, cg_steps=3)
NEWTON = dict(alpha=1.0, steps=2, solve=partial(tm.solvers.hessian_free, cg_steps=5, halvings=5), lam=10.0, cg_steps=3)
LAYERS = [[0, 1], [2, 3], [4, 5]]
SHRINKAGE = dict(alpha=0.001, steps=16, rule=tm.solvers.nesterov, modules=LAYERS, cg_steps=3)
ES = dict(alpha=0.0005, steps=1, sigma=0.02)
NONE = dict(alpha=0.0, steps=0)  # no inner step: the plain gradient of the error over all waves


def with_step_sizes(weights):
    return tm.meta.init_meta_sgd(weights, 0.01)


def with_step_sizes_in_turn(weights):
    return tm.meta.init_lslr(weights, 0.01, 5)


def with_variances(weights):
    return [*weights, *[tm.Tensor(np.float32(-np.log(10.0))) for _ in LAYERS]]  # λ = 10, as iMAML


MAMLPP = dict(start=with_step_sizes_in_turn, draw=multi_step_weights, at_test=by_learned_steps_in_turn)
SGD = dict(outer=tm.solvers.sgd)
METHODS = {
    "maml": Method("MAML", tm.meta.maml, STEP, (14_000, 1e-3)),
    "fomaml": Method("FO-MAML", tm.meta.fomaml, STEP, (14_000, 1e-3)),
    "reptile": Method("Reptile", tm.meta.reptile, REPTILE, (9_000, 1.0), full=(70_000, 0.3), **SGD),
    "imaml": Method("iMAML", tm.meta.imaml, IMAML, (2_200, 1e-3), full=(4_000, 1e-3), at_test=pulled),
    "pretrained": Method("pretrained", tm.meta.fomaml, NONE, (6_000, 1e-3)),
    "random": Method("random weights", tm.meta.fomaml, NONE, (0, 0.0), full=(0, 0.0)),
    "maml5": Method("MAML, 5 steps", tm.meta.maml, FIVE, (5_000, 1e-3)),
    "truncated": Method("last 2 of 5 steps", tm.meta.truncated, FIVE | dict(last=2), (5_000, 1e-3)),
    "maml++": Method("MAML++", tm.meta.maml_plus_plus, dict(steps=5), (5_000, 1e-3), **MAMLPP),
    "meta-sgd": Method("Meta-SGD", tm.meta.meta_sgd, dict(steps=1), (5_000, 1e-3), start=with_step_sizes,
                       at_test=by_learned_steps),
    "anil": Method("ANIL", tm.meta.anil, dict(alpha=0.002, steps=5, head=2), (5_000, 1e-3), at_test=head_only),
    "dropout": Method("gradient dropout", maml_with_dropout, STEP, (5_000, 1e-3), draw=dropout_noise),
    "leap": Method("Leap", tm.meta.leap, REPTILE, (5_000, 0.03), full=(70_000, 0.03), **SGD),
    "es-maml": Method("ES-MAML", tm.meta.es_maml, ES, (5_000, 3e-3), draw=es_noise(8, 4)),
    "fo-es-maml": Method("first-order ES", tm.meta.first_order_es_maml, ES, (5_000, 3e-3), draw=es_noise(20, 20)),
    "newton": Method("iMAML, Newton", tm.meta.imaml, NEWTON, (2_000, 1e-3), full=(4_000, 1e-3), at_test=pulled),
    "shrinkage": Method("shrinkage", tm.meta.shrinkage, SHRINKAGE, (2_000, 1e-3), full=(4_000, 1e-3),
                        start=with_variances, at_test=shrunk),
}  # fmt: skip


def method(name, inner_clip=None):
    """Its entry, with inner gradients clipped to that norm, in training and at test; ValueError if it has none."""
    m = METHODS[name]
    if inner_clip is None:
        return m
    if "rule" not in inspect.signature(m.algorithm).parameters or "solve" in m.inner:
        raise ValueError(f"{m.title} takes no update rule in its inner loop: --inner-clip has nothing to clip there")
    rule = partial(tm.solvers.clipped, norm=inner_clip, rule=m.inner.get("rule", tm.solvers.sgd))
    return replace(m, inner=m.inner | {"rule": rule})


CLASSIC = ("maml", "fomaml", "reptile", "imaml", "pretrained", "random")
BASELINES = ("pretrained", "random")  # adapt with the best of ALPHAS on validation tasks
ALPHAS = (0.001, 0.003, 0.01, 0.03, 0.1)
