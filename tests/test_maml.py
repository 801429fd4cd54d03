"""MAML and FO-MAML: the whole meta-gradient, not its parts."""

import gc
import tracemalloc

import numpy as np
import pytest

import tinymeta as tm
from regression import assert_close, dense_hessian, finite_difference, flat, loss, problem, task

ALPHA = 0.05
RULES = ["sgd", "momentum", "nesterov", "adam"]

# The case that can be checked by hand: L_s = ½ θᵀAθ, L_q = ½ (θ − c)ᵀC(θ − c).
A, C, CENTRE = np.diag([1, 2, -0.5]), np.diag([0.5, 1, 2]), np.array([1, -1, 0.5])
THETA = np.array([0.3, 0.2, -0.7])


def quadratic(phi, data):
    matrix, centre = data
    d = phi[0] - centre
    return tm.sum(0.5 * tm.matmul(d[:, None, :], matrix)[:, 0] * d, axis=1)


def by_hand(tasks=1):
    support = np.stack([A] * tasks), np.zeros((tasks, 3))
    return [tm.Tensor(THETA)], support, (np.stack([C] * tasks), np.stack([CENTRE] * tasks))


def test_the_case_checked_by_hand():
    for algorithm, expected in [
        (tm.meta.maml, [-0.3285, 0.928, -2.5935]),
        (tm.meta.fomaml, [-0.365, 1.16, -2.47]),
        (tm.meta.reptile, [0.03, 0.04, 0.035]),
    ]:
        query_loss, (meta_grad,) = algorithm(quadratic, *by_hand(tasks=2), alpha=0.1, steps=1)
        np.testing.assert_allclose(meta_grad.data, expected, rtol=1e-12, err_msg=algorithm.__name__)
        phi = THETA - 0.1 * A @ THETA
        assert query_loss.item() == pytest.approx(0.5 * (phi - CENTRE) @ C @ (phi - CENTRE))


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_on_a_quadratic_the_hessian_factors_are_exact(steps):
    """φ = (I − αA)ᴷ θ, so MAML's gradient is (I − αA)ᴷ ∇L_q(φ) and FO-MAML's is ∇L_q(φ)."""
    factor = np.linalg.matrix_power(np.eye(3) - 0.1 * A, steps)
    g = C @ (factor @ THETA - CENTRE)
    for algorithm, expected in [(tm.meta.maml, factor @ g), (tm.meta.fomaml, g)]:
        _, (meta_grad,) = algorithm(quadratic, *by_hand(), alpha=0.1, steps=steps)
        np.testing.assert_allclose(meta_grad.data, expected, rtol=1e-13)


@pytest.mark.parametrize("steps", range(6))
def test_maml_is_the_finite_difference_of_the_adapted_loss(steps):
    theta, support, query = problem()

    def adapted_loss(theta):
        phi = tm.meta.adapt(loss, theta, support, alpha=ALPHA, steps=steps)
        return tm.mean(loss(phi, query)).item()

    query_loss, meta_grad = tm.meta.maml(loss, theta, support, query, alpha=ALPHA, steps=steps)
    assert query_loss.item() == pytest.approx(adapted_loss(theta), rel=1e-13)
    assert_close(meta_grad, finite_difference(adapted_loss, theta), rtol=1e-6)


@pytest.mark.parametrize("rule", RULES[1:])
def test_maml_through_any_update_rule(rule):
    theta, support, query = problem()
    options = {"alpha": 0.02, "steps": 3, "rule": getattr(tm.solvers, rule)}

    def adapted_loss(theta):
        return tm.mean(loss(tm.meta.adapt(loss, theta, support, **options), query)).item()

    _, meta_grad = tm.meta.maml(loss, theta, support, query, **options)
    assert_close(meta_grad, finite_difference(adapted_loss, theta), rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_fomaml_is_the_query_gradient_at_phi(steps):
    theta, support, query = problem()
    _, meta_grad = tm.meta.fomaml(loss, theta, support, query, alpha=ALPHA, steps=steps)
    phi = tm.meta.adapt(loss, theta, support, alpha=ALPHA, steps=steps)
    single = []
    for i in range(3):
        phi_i = [tm.Tensor(p.data[i : i + 1]) for p in phi]
        single.append(tm.grad(loss(phi_i, task(query, i))[0], phi_i))
    assert_close(meta_grad, [np.mean([g.data[0] for g in gs], axis=0) for gs in zip(*single)], rtol=1e-13)


def test_maml_and_fomaml_differ_by_exactly_the_hessian_factor():
    """One task, one step: g_MAML = (I − αH) g_FOMAML with the support loss's dense Hessian H at θ."""
    theta, support, query = problem(tasks=1)
    hessian = dense_hessian(lambda theta: loss([t[None] for t in theta], support)[0], theta)
    (_, second), (_, first) = (
        f(loss, theta, support, query, alpha=ALPHA, steps=1) for f in (tm.meta.maml, tm.meta.fomaml)
    )
    np.testing.assert_allclose(flat(second), (np.eye(len(hessian)) - ALPHA * hessian) @ flat(first), rtol=1e-10)
    assert np.abs(flat(second) - flat(first)).max() > 1e-3


def test_the_chain_of_hessian_vector_products():
    """The docstring of meta/maml.py, step by step: v ← v − α H(θ_j) v from v = ∇L_q(φ) down to θ."""
    theta, support, query = problem(tasks=1)

    def support_loss(*theta):
        return loss([t[None] for t in theta], support)[0]

    path = [theta]
    for _ in range(3):
        g = tm.grad(support_loss(*path[-1]), path[-1])
        path.append(tm.stop_gradient([t - ALPHA * gi for t, gi in zip(path[-1], g)]))
    v = tm.grad(loss([t[None] for t in path[-1]], query)[0], path[-1])
    for theta_j in reversed(path[:-1]):
        v = [vi - ALPHA * hv for vi, hv in zip(v, tm.hvp(support_loss, theta_j, v))]
    _, meta_grad = tm.meta.maml(loss, theta, support, query, alpha=ALPHA, steps=3)
    assert_close(meta_grad, [x.data for x in v], rtol=1e-12)


# ---- what holds for every algorithm ----------------------------------------------------------------------------------

ALGORITHMS = {
    "maml": (tm.meta.maml, {}),
    "fomaml": (tm.meta.fomaml, {}),
    "reptile": (tm.meta.reptile, {}),
    "imaml": (tm.meta.imaml, {"lam": 2.0, "cg_steps": 3, "report": True}),
}
each_algorithm = pytest.mark.parametrize("algorithm, options", ALGORITHMS.values(), ids=ALGORITHMS)


@each_algorithm
def test_a_batch_of_tasks_is_the_mean_of_single_tasks(algorithm, options):
    theta, support, query = problem()
    together = algorithm(loss, theta, support, query, alpha=ALPHA, steps=2, **options)
    alone = [
        algorithm(loss, theta, task(support, i), task(query, i), alpha=ALPHA, steps=2, **options) for i in range(3)
    ]
    assert together[0].item() == pytest.approx(np.mean([a[0].item() for a in alone]), rel=1e-12)
    assert_close(together[1], [np.mean([g.data for g in gs], axis=0) for gs in zip(*[a[1] for a in alone])], rtol=1e-12)


@each_algorithm
def test_order_and_repetition_of_tasks_change_nothing(algorithm, options):
    theta, support, query = problem()
    _, g, *_ = algorithm(loss, theta, support, query, alpha=ALPHA, steps=2, **options)
    for order in ([2, 0, 1], [0, 0, 1, 1, 2, 2]):
        s, q = (tuple(a[order] for a in data) for data in (support, query))
        _, again, *_ = algorithm(loss, theta, s, q, alpha=ALPHA, steps=2, **options)
        assert_close(again, [x.data for x in g], rtol=1e-12)


@each_algorithm
def test_theta_is_unchanged_and_results_are_leaves_like_theta(algorithm, options):
    for dtype in (np.float32, np.float64):
        theta, support, query = problem()
        theta = [tm.Tensor(t.data.astype(dtype)) for t in theta]
        support, query = (tuple(a.astype(dtype) for a in data) for data in (support, query))
        before = [t.data.tobytes() for t in theta]
        result = algorithm(loss, theta, support, query, alpha=ALPHA, steps=2, **options)
        assert [t.data.tobytes() for t in theta] == before and not any(t.inputs for t in theta)
        assert result[0].shape == () and result[0].inputs == () and result[0].dtype == dtype
        assert [(g.shape, g.dtype, g.inputs) for g in result[1]] == [(t.shape, t.dtype, ()) for t in theta]


@each_algorithm
def test_query_targets_change_the_meta_gradient_but_not_phi(algorithm, options):
    theta, support, query = problem()
    shuffled = query[0], query[1][:, ::-1]
    a, b = (algorithm(loss, theta, support, q, alpha=ALPHA, steps=2, **options) for q in (query, shuffled))
    assert a[0].item() != b[0].item()
    same = np.array_equal(flat(a[1]), flat(b[1]))
    assert same == (algorithm is tm.meta.reptile)  # which never looks at them


@each_algorithm
def test_nested_data_reaches_the_loss_untouched(algorithm, options):
    theta, support, query = problem()

    def nested(phi, data):
        return loss(phi, (data["points"][0], data["points"][1]["y"]))

    def wrap(data):
        return {"points": [data[0], {"y": data[1]}]}

    a = algorithm(loss, theta, support, query, alpha=ALPHA, steps=2, **options)
    b = algorithm(nested, theta, wrap(support), wrap(query), alpha=ALPHA, steps=2, **options)
    np.testing.assert_array_equal(flat(a[1]), flat(b[1]))


@each_algorithm
def test_inner_minibatches(algorithm, options):
    """batch(support, step) is what step sees; the whole support each time is the default."""
    theta, support, query = problem()
    seen = []

    def batch(data, step):
        seen.append(step)
        return tuple(a[:, step : step + 2] for a in data)

    everything = {"batch": lambda data, step: data}
    whole = algorithm(loss, theta, support, query, alpha=ALPHA, steps=3, **options)
    same = algorithm(loss, theta, support, query, alpha=ALPHA, steps=3, **everything, **options)
    parts = algorithm(loss, theta, support, query, alpha=ALPHA, steps=3, batch=batch, **options)
    np.testing.assert_array_equal(flat(whole[1]), flat(same[1]))
    assert seen == [0, 1, 2] and not np.allclose(flat(whole[1]), flat(parts[1]))


@each_algorithm
def test_the_update_rule_is_an_option_that_works(algorithm, options):
    """Another rule leads elsewhere: to the query loss at the φ that `adapt` finds with it."""
    theta, support, query = problem()
    inner = {"alpha": 0.02, "steps": 3, "rule": tm.solvers.adam}
    adam, *_ = algorithm(loss, theta, support, query, **inner, **options)
    sgd, *_ = algorithm(loss, theta, support, query, alpha=0.02, steps=3, **options)
    objective = tm.meta.proximal(loss, theta, options["lam"]) if "lam" in options else loss
    expected = loss(tm.meta.adapt(objective, theta, support, **inner), query).data.mean()
    assert adam.item() == pytest.approx(expected, rel=1e-12) and adam.item() != pytest.approx(sgd.item(), rel=1e-3)


@each_algorithm
def test_theta_may_be_any_iterable_and_hold_a_tensor_twice(algorithm, options):
    theta, support, query = problem()
    _, expected, *_ = algorithm(loss, theta, support, query, alpha=ALPHA, steps=2, **options)
    _, meta_grad, *_ = algorithm(loss, (t for t in theta), support, query, alpha=ALPHA, steps=2, **options)
    np.testing.assert_array_equal(flat(meta_grad), flat(expected))

    def two(phi, data):  # reads two parameters, here the same Tensor given twice
        return tm.nn.mse(data[0] * phi[0] + 2 * phi[1], data[1])

    w = tm.Tensor(np.ones((1, 1)))
    tied = algorithm(two, [w, w], support, query, alpha=ALPHA, steps=1, **options)[1]
    apart = algorithm(two, [w, tm.Tensor(w.data.copy())], support, query, alpha=ALPHA, steps=1, **options)[1]
    np.testing.assert_allclose(flat(tied), flat(apart), rtol=1e-13)


def test_maml_through_adam_with_a_gradient_that_is_exactly_zero():
    """A unit that is dead on the support has a second moment of 0; the meta-gradient is finite and right."""
    theta, support, query = problem()
    dead = [t.data.copy() for t in theta]
    dead[2][0] = 0  # what the first unit says is ignored,
    dead[0][:, 0] = dead[1][:, 0] = 0  # and it says tanh 0 = 0: no gradient reaches its weights
    theta = [tm.Tensor(t) for t in dead]
    options = {"alpha": 0.01, "steps": 2, "rule": lambda *a, **k: tm.solvers.adam(*a, eps=1e-2, **k)}

    def adapted_loss(theta):
        return tm.mean(loss(tm.meta.adapt(loss, theta, support, **options), query)).item()

    _, meta_grad = tm.meta.maml(loss, theta, support, query, **options)
    assert np.isfinite(flat(meta_grad)).all()
    assert_close(meta_grad, finite_difference(adapted_loss, theta), rtol=1e-6)
    _, meta_grad = tm.meta.maml(loss, theta, support, query, alpha=0.01, steps=2, rule=tm.solvers.adam)
    assert np.isfinite(flat(meta_grad)).all()


def memory(algorithm, options, steps):
    theta, support, query = problem(points=2000)
    gc.collect()
    tracemalloc.start()
    algorithm(loss, theta, support, query, alpha=0.01, steps=steps, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@each_algorithm
def test_memory_against_inner_steps(algorithm, options):
    """MAML's is affine in the number of inner steps, that of all others flat."""
    two, eleven, twenty = (memory(algorithm, options, steps) for steps in (2, 11, 20))
    if algorithm is tm.meta.maml:
        assert twenty > 4 * two and eleven == pytest.approx((two + twenty) / 2, rel=0.05)
    else:
        assert twenty < 1.3 * two


def test_duplicating_the_support_changes_nothing():
    theta, support, _ = problem()
    doubled = tuple(np.concatenate([a, a], axis=1) for a in support)
    a, b = (tm.meta.adapt(loss, theta, s, alpha=ALPHA, steps=3) for s in (support, doubled))
    np.testing.assert_allclose(flat(a), flat(b), rtol=1e-12)


def test_adapt_checks_its_loss_and_steps():
    theta, support, _ = problem()
    options = {"alpha": 0.1, "steps": 1}
    with pytest.raises(ValueError, match="expected a Tensor of floats"):
        tm.meta.adapt(lambda phi, data: tm.sum(phi[0], (1, 2)).astype(np.int64), theta, support, **options)
    for solve in (None, lambda objective, phi, *, lr, steps: phi):
        with pytest.raises(ValueError, match="steps must be 0 or more"):
            tm.meta.adapt(loss, theta, support, alpha=0.1, steps=-1, solve=solve)
    for wrong in ({"loss": None}, {"rule": None}):
        with pytest.raises(TypeError, match=[*wrong][0]):
            tm.meta.adapt(**{"loss": loss, "theta": theta, "support": support} | options | wrong)


def test_adapt_starts_as_a_view_and_ends_as_a_leaf():
    theta, support, _ = problem()
    phi = tm.meta.adapt(loss, theta, support, alpha=ALPHA, steps=0)
    assert all(
        np.shares_memory(p.data, t.data) and p.shape == (3, *t.shape) and not p.inputs for p, t in zip(phi, theta)
    )
    assert not any(p.inputs for p in tm.meta.adapt(loss, theta, support, alpha=ALPHA, steps=2))
    assert all(p.inputs for p in tm.meta.adapt(loss, theta, support, alpha=ALPHA, steps=2, create_graph=True))


# ---- refusals --------------------------------------------------------------------------------------------------------


@each_algorithm
def test_wrong_losses_and_data_are_refused_by_name(algorithm, options):
    theta, support, query = problem()

    def mean_loss(phi, data):
        return tm.mean(loss(phi, data))

    def detached_loss(phi, data):
        return tm.stop_gradient(loss(phi, data))

    def array_loss(phi, data):
        return loss(phi, data).data

    for bad, message in [
        (mean_loss, r"mean_loss returned a Tensor of float64, shape \(\), expected a Tensor of floats of shape \(3,\)"),
        (detached_loss, "detached_loss does not depend on any parameter"),
        (array_loss, "array_loss returned an array"),
    ]:
        for steps in (0, 2):
            with pytest.raises(ValueError, match=message):
                algorithm(bad, theta, support, query, alpha=ALPHA, steps=steps, **options)
    with pytest.raises(ValueError, match=r"tasks as their first axis; found .*\(3, 5, 1\).*\(2, 5, 1\)"):
        algorithm(loss, theta, support, tuple(a[:2] for a in query), alpha=ALPHA, steps=1, **options)
    with pytest.raises(ValueError, match="first axis; found.*float"):
        algorithm(loss, theta, (1.0, support[1]), query, alpha=ALPHA, steps=1, **options)
    with pytest.raises(ValueError, match="found nothing"):
        algorithm(loss, theta, (), (), alpha=ALPHA, steps=1, **options)
    with pytest.raises(ValueError, match=r"theta\[0\] is the result of subtract.*theta, state = tm.stop_gradient"):
        algorithm(loss, tm.solvers.sgd(theta, theta, lr=0.1)[0], support, query, alpha=ALPHA, steps=1, **options)
    with pytest.raises(ValueError, match="first axis; found.*0-d|first axis; found an array of float64, shape \\(\\)"):
        algorithm(loss, theta, (np.array(1.0), support[1]), query, alpha=ALPHA, steps=1, **options)
    with pytest.raises(TypeError, match=r"theta\[0\] is an array.*Tensors of floats"):
        algorithm(loss, [t.data for t in theta], support, query, alpha=ALPHA, steps=1, **options)
    with pytest.raises(TypeError, match=r"theta is a list of Tensors, got a Tensor.*write \[theta\]"):
        algorithm(loss, theta[0], support, query, alpha=ALPHA, steps=1, **options)
    with pytest.raises(ValueError, match="theta is empty"):
        algorithm(loss, [], support, query, alpha=ALPHA, steps=1, **options)
    with pytest.raises(ValueError, match="steps must be 0 or more"):
        algorithm(loss, theta, support, query, alpha=ALPHA, steps=-1, **options)
