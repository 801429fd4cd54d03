"""Reptile (Nichol et al. 2018): move θ toward where plain training on each task leads.

    φ = θ after K steps on the task's data,      meta_grad = mean over tasks of (θ − φ)

No query loss is differentiated: θ ← θ − ε (θ − φ) with an outer step ε ≤ 1 is an interpolation. For one step
θ − φ = α ∇L_s(θ), which is joint training; with more, and with minibatches, the differences of the gradients along the
way enter, and with them the second-order term that makes the gradients of a task agree.
"""

from ..ops import mean
from ..solvers import sgd
from ..tensor import stop_gradient
from .adapt import adapt, check, task_losses


def reptile(loss, theta, support, query, *, alpha, steps, batch=None, rule=sgd):
    """(query loss at φ, mean over tasks of θ − φ). The query loss is for the log only: Reptile learns from the support.

    alpha: inner step size. batch, rule: see `adapt`.
    """
    theta = check(theta, support, query)
    phi = adapt(loss, theta, support, alpha=alpha, steps=steps, batch=batch, rule=rule)
    query_loss = mean(task_losses(loss, phi, query))
    return stop_gradient((query_loss, [t - mean(p, axis=0) for t, p in zip(theta, phi)]))
