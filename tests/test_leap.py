"""Leap: the gradient of the pull-forward surrogate, term by term, and Reptile as its special case."""

import functools
import gc
import tracemalloc

import numpy as np
import pytest

import tinymeta as tm
from regression import assert_close, finite_difference, flat, loss, problem, task

ALPHA = 0.05
VARIANTS = {
    "length": dict(stabiliser=False),
    "energy": dict(p=2, stabiliser=False),
    "length, parameters only": dict(loss_coordinate=False),
    "energy, parameters only": dict(p=2, loss_coordinate=False),
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
UPHILL = 0.3  # an inner step so large that some steps climb


def window(data, step):
    return tuple(a[:, step % 3 : step % 3 + 2] for a in data)


def whole(data, step):
    return data


def walk(theta, support, steps, **inner):
    """θ_0, ..., θ_K, stacked over tasks."""
    return [tm.meta.adapt(loss, theta, support, steps=k, **inner) for k in range(steps + 1)]


def surrogate(theta, path, support, p=1, loss_coordinate=True, sign=1, batch=whole, stabiliser=None):
    """Mean over tasks of Σ ‖γ̄_{i+1} − γ_i‖ᵖ: the ends stay where the path has them, the starts move as θ does (J = I).

    sign=−1 turns the sign of (Δf)² where a segment climbs: the stabiliser's μ = −2 (Δf)² added to it.
    """
    shift = [t.data - t_0.data[0] for t, t_0 in zip(theta, path[0])]
    total = 0
    for k, (start, end) in enumerate(zip(path, path[1:])):
        start, data = [tm.Tensor(s.data + d) for s, d in zip(start, shift)], batch(support, k)
        square = np.sum([((e.data - s.data) ** 2).reshape(len(e), -1).sum(1) for s, e in zip(start, end)], axis=0)
        if loss_coordinate:
            climb = loss(end, data).data - loss(start, data).data
            square = square + np.where(climb > 0, sign, 1) * climb**2
        total = total + square ** (p / 2)
    return total.mean()


def climbs(path, support):
    """Δf of every segment and task."""
    return np.array([loss(b, support).data - loss(a, support).data for a, b in zip(path, path[1:])])


@each_variant
@pytest.mark.parametrize("steps", range(6))
def test_it_is_the_finite_difference_of_the_surrogate(options, steps):
    theta, support, query = problem()
    query_loss, meta_grad = tm.meta.leap(loss, theta, support, query, alpha=ALPHA, steps=steps, **options)
    path = walk(theta, support, steps, alpha=ALPHA)
    if steps:
        numeric = finite_difference(lambda theta: surrogate(theta, path, support, **options), theta)
        assert_close(meta_grad, numeric, rtol=1e-7)
    else:
        assert not flat(meta_grad).any()
    assert query_loss.item() == pytest.approx(loss(path[-1], query).data.mean(), rel=1e-13)


@each_variant
@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_on_minibatches_and_on_the_path_of_another_rule(options, rule):
    """Both losses of a segment are of the batch that made the step."""
    theta, support, query = problem()
    inner = dict(alpha=0.02, batch=window, rule=getattr(tm.solvers, rule))
    _, meta_grad = tm.meta.leap(loss, theta, support, query, steps=4, **inner, **options)
    path = walk(theta, support, 4, **inner)
    numeric = finite_difference(lambda theta: surrogate(theta, path, support, batch=window, **options), theta)
    assert_close(meta_grad, numeric, rtol=1e-7)


def test_the_stabiliser_is_a_term_of_its_own_in_the_energy():
    theta, support, query = problem()
    path = walk(theta, support, 5, alpha=UPHILL)
    up = climbs(path, support) > 0
    assert up.any() and not up.all()
    for stabiliser, sign in ((True, -1), (False, 1)):
        options = dict(alpha=UPHILL, steps=5, p=2, stabiliser=stabiliser)
        _, meta_grad = tm.meta.leap(loss, theta, support, query, **options)
        energy = functools.partial(surrogate, path=path, support=support, p=2, sign=sign)
        numeric = finite_difference(energy, theta, step=1e-7)
        assert_close(meta_grad, numeric, rtol=1e-6)


def test_the_stabiliser_of_the_length_turns_the_climb_and_leaves_the_length():
    """−Σ (−|Δf| ∇f + Δθ) / √(‖Δθ‖² + Δf²), task by task, in NumPy."""
    theta, support, query = problem()
    path, expected = walk(theta, support, 5, alpha=UPHILL), 0
    for i in range(3):
        points = [[tm.Tensor(p.data[i : i + 1]) for p in phi] for phi in path]
        for a, b in zip(points, points[1:]):
            f, ahead = loss(a, task(support, i)), loss(b, task(support, i)).item()
            climb, way, g = ahead - f.item(), flat(b) - flat(a), flat(tm.grad(f[0], a))
            expected = expected - (way - abs(climb) * g) / np.sqrt(way @ way + climb**2) / 3
    _, meta_grad = tm.meta.leap(loss, theta, support, query, alpha=UPHILL, steps=5)
    np.testing.assert_allclose(flat(meta_grad), expected, rtol=1e-10)
    _, without = tm.meta.leap(loss, theta, support, query, alpha=UPHILL, steps=5, stabiliser=False)
    assert np.abs(flat(without) - expected).max() > 0.01


@pytest.mark.parametrize("p", [1, 2])
def test_options_that_must_change_nothing(p):
    """Where every step descends there is nothing to stabilise, nor is there without the loss coordinate."""
    theta, support, query = problem()
    assert (climbs(walk(theta, support, 4, alpha=ALPHA), support) < 0).all()
    for alpha, options in ((ALPHA, {}), (UPHILL, {"loss_coordinate": False})):
        on, off = (
            tm.meta.leap(loss, theta, support, query, alpha=alpha, steps=4, p=p, stabiliser=s, **options)
            for s in (True, False)
        )
        np.testing.assert_array_equal(flat(on[1]), flat(off[1]))


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("steps", range(4))
def test_energy_of_the_parameters_alone_is_reptile_twice(rule, steps):
    theta, support, query = problem()
    inner = dict(alpha=ALPHA, steps=steps, batch=window, rule=getattr(tm.solvers, rule))
    query_loss, meta_grad = tm.meta.leap(loss, theta, support, query, p=2, loss_coordinate=False, **inner)
    reptile_loss, reptile = tm.meta.reptile(loss, theta, support, query, **inner)
    np.testing.assert_allclose(flat(meta_grad), 2 * flat(reptile), rtol=1e-12, atol=1e-15)
    assert query_loss.item() == reptile_loss.item()


def test_one_step_of_length_is_the_unit_vector_uphill():
    """One task, one step: both coordinates move along ∇f, so the surrogate's gradient is ∇f stretched to known length."""
    theta, support, query = problem(tasks=1)
    g = flat(tm.grad(loss([t[None] for t in theta], support)[0], theta))
    _, flat_way = tm.meta.leap(loss, theta, support, query, alpha=ALPHA, steps=1, loss_coordinate=False)
    np.testing.assert_allclose(flat(flat_way), g / np.linalg.norm(g), rtol=1e-12)
    climb = climbs(walk(theta, support, 1, alpha=ALPHA), support).item()
    _, way = tm.meta.leap(loss, theta, support, query, alpha=ALPHA, steps=1)
    length = np.sqrt(ALPHA**2 * g @ g + climb**2)
    np.testing.assert_allclose(flat(way), (ALPHA - climb) * g / length, rtol=1e-12)


def test_descending_along_it_shortens_the_paths():
    """Its purpose, on three convex tasks with solutions of their own: the mean length of the ways falls."""
    centres = np.array([[3.0, 0.0], [0.0, 3.0], [2.0, 2.0]])

    def bowl(phi, data):
        d = phi[0][:, 0] - data
        return tm.sum(d * d * np.array([0.5, 1.0]), axis=1)

    def length(theta):
        path = [tm.meta.adapt(bowl, theta, centres, alpha=0.1, steps=k) for k in range(51)]
        points = [np.column_stack([q[0].data[:, 0], bowl(q, centres).data]) for q in path]
        return np.mean([np.linalg.norm(b - a, axis=1) for a, b in zip(points, points[1:])]) * 50

    theta = [tm.Tensor(np.array([[-4.0, -4.0]]))]
    before = length(theta)
    for _ in range(60):
        _, meta_grad = tm.meta.leap(bowl, theta, centres, centres, alpha=0.1, steps=50)
        theta = tm.stop_gradient(tm.solvers.sgd(theta, meta_grad, lr=0.02)[0])
    assert length(theta) < before / 5


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_segment_of_length_zero_adds_nothing(p, dtype):
    """Task 0 starts on its solution and stays: all its Δθ and Δf are 0. The others count as ever."""
    x = np.array([[0.0], [1.0], [-2.0]], dtype)

    def bowl(phi, data):
        d = phi[0] - data
        return tm.sum(d * d, axis=1)

    theta = [tm.Tensor(np.zeros(1, dtype))]
    with np.errstate(all="raise"):
        _, (meta_grad,) = tm.meta.leap(bowl, theta, x, x, alpha=0.1, steps=3, p=p)
    _, (others,) = tm.meta.leap(bowl, theta, x[1:], x[1:], alpha=0.1, steps=3, p=p)
    assert np.isfinite(meta_grad.data).all() and meta_grad.dtype == dtype
    np.testing.assert_allclose(meta_grad.data, others.data * 2 / 3, rtol=1e-6)


def test_a_dead_network_gives_zeros():
    theta, support, query = problem()
    dead = [tm.Tensor(np.zeros(t.shape)) for t in theta]
    silent = support[0], np.zeros_like(support[1])
    _, meta_grad = tm.meta.leap(loss, dead, silent, query, alpha=ALPHA, steps=3)
    assert not flat(meta_grad).any()


@pytest.mark.parametrize("options", [{}, {"p": 2}, {"loss_coordinate": False}, {"stabiliser": False}])
def test_compiled_equals_eager(options):
    def step(theta, support, query, alpha):
        return tm.meta.leap(loss, theta, support, query, alpha=alpha, steps=3, batch=window, **options)

    compiled, sharded = tm.compile(step), tm.compile(step, tasks=["support", "query"], shards=2)
    for seed in (0, 1):
        theta, support, query = problem(seed)
        for alpha in (ALPHA, UPHILL):
            arguments = theta, support, query, np.array(alpha)
            query_loss, meta_grad = step(*arguments)
            for fast in (compiled, sharded):
                again = fast(*arguments)
                assert again[0].item() == pytest.approx(query_loss.item(), rel=1e-12)
                assert_close(again[1], [g.data for g in meta_grad], rtol=1e-12)


# ---- what holds for every algorithm ----------------------------------------------------------------------------------


def test_a_batch_of_tasks_is_the_mean_of_single_tasks():
    theta, support, query = problem()
    together = tm.meta.leap(loss, theta, support, query, alpha=ALPHA, steps=3)
    alone = [tm.meta.leap(loss, theta, task(support, i), task(query, i), alpha=ALPHA, steps=3) for i in range(3)]
    assert together[0].item() == pytest.approx(np.mean([a[0].item() for a in alone]), rel=1e-12)
    assert_close(together[1], [np.mean([g.data for g in gs], axis=0) for gs in zip(*[a[1] for a in alone])], rtol=1e-12)


def test_results_are_leaves_like_theta_and_the_query_is_only_logged():
    for dtype in (np.float32, np.float64):
        theta, support, query = problem()
        theta = [tm.Tensor(t.data.astype(dtype)) for t in theta]
        support, query = (tuple(a.astype(dtype) for a in data) for data in (support, query))
        before = [t.data.tobytes() for t in theta]
        query_loss, meta_grad = tm.meta.leap(loss, theta, support, query, alpha=ALPHA, steps=2)
        assert [t.data.tobytes() for t in theta] == before
        assert (query_loss.shape, query_loss.dtype, query_loss.inputs) == ((), dtype, ())
        assert [(g.shape, g.dtype, g.inputs) for g in meta_grad] == [(t.shape, t.dtype, ()) for t in theta]
        other, same = tm.meta.leap(loss, theta, support, support, alpha=ALPHA, steps=2)
        np.testing.assert_array_equal(flat(same), flat(meta_grad))
        assert other.item() != query_loss.item()


def test_memory_is_flat_in_the_steps():
    def peak(steps):
        theta, support, query = problem(points=2000)
        gc.collect()
        tracemalloc.start()
        tm.meta.leap(loss, theta, support, query, alpha=0.01, steps=steps)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(20) < 1.3 * peak(2)


def test_refusals():
    theta, support, query = problem()

    def mean_loss(phi, data):
        return tm.mean(loss(phi, data))

    for p in (0, 3, 1.5):
        with pytest.raises(ValueError, match=f"p must be 1.*{p}"):
            tm.meta.leap(loss, theta, support, query, alpha=ALPHA, steps=1, p=p)
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        tm.meta.leap(loss, theta, support, query, alpha=ALPHA, steps=-1)
    for steps in (0, 2):
        with pytest.raises(ValueError, match=r"mean_loss returned a Tensor of float64, shape \(\)"):
            tm.meta.leap(mean_loss, theta, support, query, alpha=ALPHA, steps=steps)
    with pytest.raises(ValueError, match=r"theta\[0\] is the result of subtract"):
        tm.meta.leap(loss, tm.solvers.sgd(theta, theta, lr=0.1)[0], support, query, alpha=ALPHA, steps=1)
