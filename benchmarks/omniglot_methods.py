"""The algorithms of benchmarks/omniglot: what each is called with, and how its θ adapts to a new task at test.

At test all do as in training: iMAML and shrinkage stay near θ, ANIL moves its head alone, Meta-SGD and MAML++ take the
step sizes that they have learned. Only gradient dropout leaves its noise out. Settings stand in omniglot_protocols.

ES-MAML is missing. Its estimate of a gradient is a sum of random directions, as many as there are draws; with some tens
of draws for 10⁵ parameters, nearly all of it is noise.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

import tinymeta as tm

BLOCKS = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13]]  # of either network: weights, gain, bias; the head
ADAM = functools.partial(tm.solvers.adam, beta1=0.0)  # Reptile's

# ---- arguments of the algorithm --------------------------------------------------------------------------------------


def minibatch(size, support, step):
    """Examples of one inner step: the support in runs of `size`, from its beginning again after its end."""
    images, labels = support
    index = (step * size + np.arange(size)) % labels.shape[1]
    return images[:, index], labels[:, index]


def batches(size):
    return size and functools.partial(minibatch, size)


def clipped(s, rule=tm.solvers.sgd):
    """The rule, with each task's gradient clipped if that is asked for."""
    return functools.partial(tm.solvers.clipped, norm=s.inner_clip, rule=rule) if s.inner_clip else rule


def by_steps_in_turn(s):
    return {"steps": s.steps, "batch": batches(s.batch)}


def by_learned_steps(s):
    return {"rule": clipped(s), **by_steps_in_turn(s)}


def by_steps(s):
    return {"alpha": s.alpha, **by_learned_steps(s)}


def implicitly(s):
    return {**by_steps(s), "cg_steps": s.cg_steps, "damping": s.damping, "report": True}


def newton(s):
    return functools.partial(tm.solvers.hessian_free, cg_steps=s.newton_cg, halvings=5)


def maml_with_dropout(loss, theta, support, query, *, noise, rule, **options):
    return tm.meta.maml(loss, theta, support, query, rule=tm.meta.dropout(noise, rule), **options)


# ---- adaptation: (settings, loss, θ, support, steps) -> φ after 0, .., steps steps -----------------------------------


def plainly(s, loss, theta, support, steps, **options):
    options = {"alpha": s.alpha, "batch": batches(s.test_batch), "rule": clipped(s), **options}
    return tm.meta.trajectory(loss, theta, support, steps=steps, cut=steps, **options)


def by_adam(s, loss, theta, support, steps):
    return plainly(s, loss, theta, support, steps, rule=clipped(s, ADAM))


def head_only(s, loss, theta, support, steps):
    head_loss = lambda phi, data: loss([*tm.stop_gradient(phi[: -s.head]), *phi[-s.head :]], data)
    return plainly(s, head_loss, theta, support, steps)


def learned(s, loss, theta, support, steps):
    weights, a = tm.meta.split(theta)
    return plainly(s, loss, weights, support, steps, alpha=a)


def learned_in_turn(s, loss, theta, support, steps):
    """After the steps that were trained, the last one's size goes on."""
    weights, a = tm.meta.split(theta)
    a = [tm.concatenate([a_i, tm.broadcast_to(a_i[-1:], (steps,))]) for a_i in a]
    return plainly(s, loss, weights, support, steps, alpha=a, rule=tm.meta.per_step)


def pulled(s, loss, theta, support, steps):
    return plainly(s, tm.meta.proximal(loss, theta, s.lam), theta, support, steps)


def pulled_by_newton(s, loss, theta, support, steps):
    objective = tm.meta.proximal(loss, theta, s.lam)
    (phi,) = plainly(s, objective, theta, support, 0)
    yield phi
    for _ in range(steps):
        phi = newton(s)(lambda phi, step: objective(phi, support), phi, lr=s.alpha, steps=1)
        yield phi


def shrunk(s, loss, theta, support, steps):
    weights, lam = tm.meta.precisions(theta, BLOCKS)
    return plainly(s, tm.meta.proximal(loss, weights, lam), weights, support, steps)


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    algorithm: Callable  # (loss, θ, support, query, **options, **noise, **schedule)
    options: Callable = by_steps  # settings -> dict
    at_test: Callable = plainly
    outer: Callable = tm.solvers.adam
    start: Callable = lambda s, weights: weights  # -> θ
    noise: Callable = lambda s, rng, theta: {}  # -> {name: arrays with the tasks first}
    schedule: Callable = lambda s, done: {}  # share of the training -> {name: array for all tasks}


def step_sizes(s, weights):
    return tm.meta.init_meta_sgd(weights, s.alpha)


def step_sizes_in_turn(s, weights):
    return tm.meta.init_lslr(weights, s.alpha, s.steps)


def variances(s, weights):
    return [*weights, *[tm.Tensor(np.float32(-np.log(s.lam))) for _ in BLOCKS]]


def dropout_noise(s, rng, theta):
    return {"noise": tm.meta.draw_noise(rng, theta, s.dropout, tasks=s.tasks, steps=s.steps)}


def multi_step_weights(s, done):
    """The published schedule, which ends after a tenth of the training."""
    return {"weights": tm.meta.multi_step_weights(s.steps, int(100 * done), epochs=10)}


SGD = {"outer": tm.solvers.sgd}
METHODS = {
    "maml": Method(tm.meta.maml),
    "fomaml": Method(tm.meta.fomaml),
    "reptile": Method(tm.meta.reptile, lambda s: {**by_steps(s), "rule": clipped(s, ADAM)}, by_adam, **SGD),
    "imaml": Method(tm.meta.imaml, lambda s: {**implicitly(s), "lam": s.lam}, pulled),
    "truncated": Method(tm.meta.truncated, lambda s: {**by_steps(s), "last": s.last}),
    "maml++": Method(tm.meta.maml_plus_plus, by_steps_in_turn, learned_in_turn, start=step_sizes_in_turn,
                     schedule=multi_step_weights),
    "meta-sgd": Method(tm.meta.meta_sgd, by_learned_steps, learned, start=step_sizes),
    "anil": Method(tm.meta.anil, lambda s: {**by_steps(s), "head": s.head}, head_only),
    "dropout": Method(maml_with_dropout, noise=dropout_noise),
    "leap": Method(tm.meta.leap, **SGD),
    "newton": Method(tm.meta.imaml, lambda s: {**implicitly(s), "lam": s.lam, "solve": newton(s)}, pulled_by_newton),
    "shrinkage": Method(tm.meta.shrinkage, lambda s: {**implicitly(s), "modules": BLOCKS}, shrunk, start=variances),
}  # fmt: skip
