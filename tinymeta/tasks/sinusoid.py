"""Sine waves to regress (Finn et al. 2017, section 5.1): y = A sin(x − b), A ~ U[0.1, 5], b ~ U[0, π], x ~ U[−5, 5].

Only the wave differs between tasks; the network has to recognise it from a handful of points.
"""

from typing import NamedTuple

import numpy as np

from ..arguments import FLOATS, describe, finite, generator, type_of, whole

LOW, HIGH = -5.0, 5.0  # the range of x


class Waves(NamedTuple):
    """A stack of waves, called as waves(x) with x (tasks, n, 1) or (n, 1)."""

    amplitude: np.ndarray  # (tasks, 1, 1)
    phase: np.ndarray  # (tasks, 1, 1), radians

    def __call__(self, x):
        require_waves(self)
        if not isinstance(x, np.ndarray) or x.dtype not in FLOATS:
            raise TypeError(f"x must be an array of floats (tasks, n, 1) or (n, 1), got {describe(x)}")
        if x.shape[-1:] != (1,) or x.shape[:-2] not in ((), (len(self.phase),)):
            raise ValueError(f"x of shape {x.shape} for {len(self.phase)} waves: (tasks, n, 1) or (n, 1) is expected")
        return (self.amplitude * np.sin(x - self.phase)).astype(x.dtype)


def draw_waves(rng, tasks):
    """Waves for `tasks` tasks, drawn from rng, a np.random.Generator."""
    generator(rng)
    whole(tasks=tasks)
    return Waves(rng.uniform(0.1, 5.0, (tasks, 1, 1)), rng.uniform(0.0, np.pi, (tasks, 1, 1)))


def draw_points(rng, waves, n, low=LOW, high=HIGH, dtype=np.float32):
    """(x, y), both (tasks, n, 1): n points of every wave at uniform x."""
    generator(rng)
    whole(n=n)
    dtype = check_range(low, high, dtype)
    require_waves(waves)
    x = rng.uniform(low, high, (len(waves.amplitude), n, 1)).astype(dtype)
    return x, waves(x)


def training_batch(rng, tasks, shots, queries=None, dtype=np.float32):
    """(support, query) of fresh tasks: (x, y) pairs of `shots` and of `queries` (default: as many) points."""
    queries = shots if queries is None else queries
    whole(shots=shots, queries=queries)
    waves = draw_waves(rng, tasks)
    x, y = draw_points(rng, waves, shots + queries, dtype=dtype)
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])


def test_tasks(seed, tasks, shots, low=LOW, high=HIGH, dtype=np.float32):
    """(waves, support) of held-out tasks: task i depends on (seed, i) alone, and its first points not on `shots`.

    `low`, `high` bound the x of the support only: a half-range gives the paper's test of extrapolation.
    """
    whole(seed=seed, shots=shots)
    whole(1, tasks=tasks)
    dtype = check_range(low, high, dtype)
    waves, xs = [], []
    for i in range(tasks):
        rng = np.random.default_rng([seed, i])
        waves.append(draw_waves(rng, 1))
        xs.append(rng.uniform(low, high, (shots, 1)))
    waves = Waves(*(np.concatenate(parts) for parts in zip(*waves)))
    x = np.stack(xs).astype(dtype)
    return waves, (x, waves(x))


def require_waves(waves):
    if not isinstance(waves, Waves):
        raise TypeError(f"waves must be Waves, as draw_waves returns them, got {describe(waves)}")
    for name, a in waves._asdict().items():
        if not isinstance(a, np.ndarray) or a.dtype not in FLOATS or a.shape != (*waves.amplitude.shape[:1], 1, 1):
            raise TypeError(f"{name} must be an array of floats (tasks, 1, 1), got {describe(a)}")


def check_range(low, high, dtype):
    """dtype; all three are checked."""
    finite(low=low, high=high)
    if not low <= high:
        raise ValueError(f"low must not exceed high, got {low} and {high}")
    return type_of(dtype, FLOATS)


test_tasks.__test__ = False  # pytest: this is no test
