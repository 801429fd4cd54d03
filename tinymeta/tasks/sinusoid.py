"""Sine waves to regress (Finn et al. 2017, section 5.1): y = A sin(x − b), A ~ U[0.1, 5], b ~ U[0, π], x ~ U[−5, 5].

Only the wave differs between tasks; the network has to recognise it from a handful of points.
"""

from typing import NamedTuple

import numpy as np

LOW, HIGH = -5.0, 5.0  # the range of x


class Waves(NamedTuple):
    """A stack of waves, called as waves(x) with x (tasks, n, 1) or (n, 1)."""

    amplitude: np.ndarray  # (tasks, 1, 1)
    phase: np.ndarray  # (tasks, 1, 1), radians

    def __call__(self, x):
        return (self.amplitude * np.sin(x - self.phase)).astype(x.dtype)


def draw_waves(rng, tasks):
    """Waves for `tasks` tasks, drawn from rng, a np.random.Generator."""
    return Waves(rng.uniform(0.1, 5.0, (tasks, 1, 1)), rng.uniform(0.0, np.pi, (tasks, 1, 1)))


def draw_points(rng, waves, n, low=LOW, high=HIGH, dtype=np.float32):
    """(x, y), both (tasks, n, 1): n points of every wave at uniform x."""
    x = rng.uniform(low, high, (len(waves.amplitude), n, 1)).astype(dtype)
    return x, waves(x)


def training_batch(rng, tasks, shots, queries=None, dtype=np.float32):
    """(support, query) of fresh tasks: (x, y) pairs of `shots` and of `queries` (default: as many) points."""
    waves = draw_waves(rng, tasks)
    x, y = draw_points(rng, waves, shots + (shots if queries is None else queries), dtype=dtype)
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])


def test_tasks(seed, tasks, shots, low=LOW, high=HIGH, dtype=np.float32):
    """(waves, support) of held-out tasks: task i depends on (seed, i) alone, and its first points not on `shots`.

    `low`, `high` bound the x of the support only: a half-range gives the paper's test of extrapolation.
    """
    waves, xs = [], []
    for i in range(tasks):
        rng = np.random.default_rng([seed, i])
        waves.append(draw_waves(rng, 1))
        xs.append(rng.uniform(low, high, (shots, 1)))
    waves = Waves(*(np.concatenate(parts) for parts in zip(*waves)))
    x = np.stack(xs).astype(dtype)
    return waves, (x, waves(x))


test_tasks.__test__ = False  # pytest: this is no test
