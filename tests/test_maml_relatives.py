"""Truncated back-propagation, Meta-SGD, MAML++, ANIL and gradient dropout: whole meta-gradients, and how they relate."""

import numpy as np
import pytest

import tinymeta as tm
from regression import assert_close, finite_difference, flat, loss, problem, task
from test_maml import ALPHA, CENTRE, THETA, C, by_hand, memory, quadratic

COUPLED = np.array([[1.0, 0.3, -0.2], [0.3, 2.0, 0.4], [-0.2, 0.4, -0.5]])  # instead of the diagonal A
STEPS = 3  # of noise and step sizes, unless said otherwise
MODES = [pytest.param(False, id="second order"), pytest.param(True, id="first order")]


def step_sizes(shapes, seed=1):
    """All different, some negative: nothing that only works for equal ones would be found."""
    rng = np.random.default_rng(seed)
    return [tm.Tensor(ALPHA * rng.uniform(-0.5, 1.5, shape)) for shape in shapes]


def with_meta_sgd(theta):
    return theta + step_sizes([t.shape for t in theta])


def with_lslr(theta, steps=STEPS):
    return theta + step_sizes([(steps,)] * len(theta))


def path(theta, support, steps, alpha=None, move=None, frozen=None, batch=None):
    """The definition, written out: φ_0, ..., φ_K and the gradients on the way, or the same with `frozen` gradients.

    move(g, k): what is subtracted in step k for a list of gradients.
    """
    move = move or (lambda g, k: [alpha * g_i for g_i in g])
    phi = [np.broadcast_to(t.data, (3, *t.shape)) for t in theta]
    phis, gradients = [phi], []
    for k in range(steps):
        leaves = [tm.Tensor(p) for p in phi]
        data = batch(support, k) if batch else support
        g = frozen[k] if frozen else [g.data for g in tm.grad(tm.sum(loss(leaves, data)), leaves)]
        phi = [p - d for p, d in zip(phi, move(g, k), strict=True)]
        phis.append(phi)
        gradients.append(g)
    return phis, gradients


def query_loss_at(phi, query):
    return loss([tm.Tensor(p) for p in phi], query).data.mean()


def check_against_definition(result, objective, theta, first_order, value=None):
    """meta_grad is the finite difference of objective(theta, gradients); first order: with gradients kept as at theta."""
    at_theta, gradients = objective(theta, None)
    frozen = gradients if first_order else None
    query_loss, meta_grad = result
    assert query_loss.item() == pytest.approx(at_theta if value is None else value, rel=1e-12)
    assert_close(meta_grad, finite_difference(lambda theta: objective(theta, frozen)[0], theta), rtol=1e-6)


# ---- truncated back-propagation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("steps, last", [(1, 1), (3, 1), (3, 2), (5, 2), (5, 5), (4, 0), (0, 0)])
def test_truncated_is_the_finite_difference_from_the_cut_on(steps, last, rule):
    """F(d): all tasks' φ at the cut are moved by d, and the rest of the inner loop goes on from there."""
    theta, support, query = problem()
    rule, batch = getattr(tm.solvers, rule), lambda data, step: tuple(a[:, step % 2 :] for a in data)

    def go_on(phi, state, ks):
        for k in ks:
            g = tm.grad(tm.sum(loss(phi, batch(support, k))), phi)
            phi, state = tm.stop_gradient(rule(phi, g, state, lr=0.02))
        return phi, state

    phi = tm.meta.adapt(loss, theta, support, alpha=0.02, steps=0)
    start, state = go_on(phi, None, range(steps - last))

    def rest(d):
        phi, _ = go_on([s + d_i for s, d_i in zip(start, d)], state, range(steps - last, steps))
        return loss(phi, query).data.mean()

    options = {"alpha": 0.02, "steps": steps, "last": last, "batch": batch, "rule": rule}
    query_loss, meta_grad = tm.meta.truncated(loss, theta, support, query, **options)
    zero = [tm.Tensor(np.zeros(t.shape)) for t in theta]
    assert query_loss.item() == pytest.approx(rest(zero), rel=1e-12)
    assert_close(meta_grad, finite_difference(rest, zero), rtol=1e-6)


@pytest.mark.parametrize("last", range(5))
def test_truncated_on_a_quadratic_has_as_many_hessian_factors_as_last_steps(last):
    theta, (_, zero), query = by_hand(tasks=2)
    factor = np.eye(3) - 0.1 * COUPLED
    phi = np.linalg.matrix_power(factor, 4) @ THETA
    expected = np.linalg.matrix_power(factor, last) @ C @ (phi - CENTRE)
    support = np.stack([COUPLED] * 2), zero
    _, (meta_grad,) = tm.meta.truncated(quadratic, theta, support, query, alpha=0.1, steps=4, last=last)
    np.testing.assert_allclose(meta_grad.data, expected, rtol=1e-12)


def test_truncated_is_maml_at_one_end_and_fomaml_at_the_other():
    theta, support, query = problem()
    for steps in (0, 1, 4):
        for last, algorithm in [(steps, tm.meta.maml), (0, tm.meta.fomaml)]:
            _, expected = algorithm(loss, theta, support, query, alpha=ALPHA, steps=steps)
            _, found = tm.meta.truncated(loss, theta, support, query, alpha=ALPHA, steps=steps, last=last)
            assert_close(found, [e.data for e in expected], rtol=1e-13)


def test_truncated_tends_to_maml_geometrically_where_the_inner_loop_contracts():
    matrix = np.diag([1.0, 2.0, 4.0])
    theta, (_, zero), query = by_hand()
    options = {"alpha": 0.2, "steps": 12}
    support = matrix[None], zero
    _, (exact,) = tm.meta.maml(quadratic, theta, support, query, **options)
    errors = []
    for last in range(13):
        _, (g,) = tm.meta.truncated(quadratic, theta, support, query, last=last, **options)
        errors.append(np.abs(g.data - exact.data).max())
    assert all(b < 0.81 * a for a, b in zip(errors, errors[1:])) and errors[-1] < 1e-14  # 1 − 0.2 · 1 = 0.8


def test_truncated_memory_is_flat_in_steps_and_grows_with_last():
    few, many, all_of_many = (
        memory(tm.meta.truncated, {"last": last}, steps) for steps, last in ((3, 2), (20, 2), (20, 20))
    )
    assert many < 1.2 * few and all_of_many > 4 * many


def test_trajectory_visits_what_adapt_returns():
    theta, support, _ = problem()
    for cut in (0, 2, 4):
        phis = list(tm.meta.trajectory(loss, theta, support, alpha=ALPHA, steps=4, create_graph=True, cut=cut))
        assert [bool(phi[0].inputs) for phi in phis[1:]] == [k >= cut for k in range(4)]
        for steps, phi in enumerate(phis):
            expected = tm.meta.adapt(loss, theta, support, alpha=ALPHA, steps=steps)
            np.testing.assert_array_equal(flat(phi), flat(expected))


def test_a_trajectory_takes_gradients_for_constants_by_default():
    """So that φ moves as θ does."""
    theta, support, _ = problem()
    *_, phi = tm.meta.trajectory(loss, theta, support, alpha=ALPHA, steps=3)
    g = tm.grad(sum(tm.sum(p) for p in phi), theta)
    np.testing.assert_array_equal(flat(g), len(support[0]))


def test_nothing_is_recorded_before_the_cut():
    theta, support, query = problem()
    recorded = []

    def watched(params, grads, state=None, *, lr):
        if state:  # of φ, its gradient and the momentum, from the second step on
            recorded.append([bool(x.inputs) for x in (params[0], grads[0], state[0])])
        return tm.solvers.momentum(params, grads, state, lr=lr)

    tm.meta.truncated(loss, theta, support, query, alpha=0.02, steps=4, last=2, rule=watched)
    assert recorded == [[False, False, False], [False, True, False], [True, True, True]]
    recorded.clear()
    tm.meta.fomaml(loss, theta, support, query, alpha=0.02, steps=3, rule=watched)
    assert recorded == [[False] * 3] * 2


# ---- learned step sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_order", MODES)
@pytest.mark.parametrize("steps", range(6))
def test_meta_sgd_is_the_finite_difference_of_the_adapted_loss(steps, first_order):
    theta, support, query = problem()
    theta = with_meta_sgd(theta)

    def objective(theta, frozen):
        w, a = theta[:4], theta[4:]
        phis, g = path(w, support, steps, move=lambda g, k: [x.data * y for x, y in zip(a, g)], frozen=frozen)
        return query_loss_at(phis[-1], query), g

    result = tm.meta.meta_sgd(loss, theta, support, query, steps=steps, first_order=first_order)
    check_against_definition(result, objective, theta, first_order)


def test_meta_sgd_on_a_quadratic_is_the_recursion_of_its_docstring():
    (w,), (_, zero), query = by_hand()
    a = np.array([0.1, -0.05, 0.3])
    points = [w.data]
    for _ in range(4):
        points.append(points[-1] - a * (COUPLED @ points[-1]))
    v, a_bar = C @ (points[-1] - CENTRE), 0
    for point in points[-2::-1]:
        a_bar, v = a_bar - v * (COUPLED @ point), v - COUPLED @ (a * v)
    _, meta_grad = tm.meta.meta_sgd(quadratic, [w, tm.Tensor(a)], (COUPLED[None], zero), query, steps=4)
    assert_close(meta_grad, [v, a_bar], rtol=1e-13)


def test_first_order_step_sizes_learn_from_the_product_of_support_and_query_gradient():
    """One step: ∂F/∂a = −∇L_s(w) ⊙ ∇L_q(φ), averaged over tasks, and the weights have FO-MAML's gradient."""
    theta, support, query = problem()
    theta = with_meta_sgd(theta)
    _, meta_grad = tm.meta.meta_sgd(loss, theta, support, query, steps=1, first_order=True)
    w, a = tm.meta.split(theta)
    phis, (g_support,) = path(w, support, 1, move=lambda g, k: [x.data * y for x, y in zip(a, g)])
    phi = [tm.Tensor(p) for p in phis[-1]]
    g_query = [g.data for g in tm.grad(tm.sum(loss(phi, query)), phi)]
    expected = [g.mean(0) for g in g_query] + [-(s * q).mean(0) for s, q in zip(g_support, g_query)]
    assert_close(meta_grad, expected, rtol=1e-13)
    assert min(np.abs(g.data).max() for g in meta_grad) > 1e-4


def last_only(steps):
    return np.eye(steps)[-1]


@pytest.mark.parametrize("first_order", MODES)
@pytest.mark.parametrize("steps", [1, 3])
def test_equal_step_sizes_are_maml_and_their_gradients_sum_to_that_of_alpha(steps, first_order):
    theta, support, query = problem()
    maml = tm.meta.fomaml if first_order else tm.meta.maml
    expected_loss, expected = maml(loss, theta, support, query, alpha=ALPHA, steps=steps)
    _, frozen = path(theta, support, steps, alpha=ALPHA)

    def adapted_loss(alpha):
        phis, _ = path(theta, support, steps, alpha=alpha, frozen=frozen if first_order else None)
        return query_loss_at(phis[-1], query)

    of_alpha = (adapted_loss(ALPHA + 1e-6) - adapted_loss(ALPHA - 1e-6)) / 2e-6
    options = {"steps": steps, "first_order": first_order}
    for query_loss, meta_grad in [
        tm.meta.meta_sgd(loss, tm.meta.init_meta_sgd(theta, ALPHA), support, query, **options),
        tm.meta.maml_plus_plus(
            loss, tm.meta.init_lslr(theta, ALPHA, steps), support, query, weights=last_only(steps), **options
        ),
    ]:
        assert query_loss.item() == pytest.approx(expected_loss.item(), rel=1e-13)
        assert_close(meta_grad[:4], [e.data for e in expected], rtol=1e-12)
        assert flat(meta_grad[4:]).sum() == pytest.approx(of_alpha, rel=1e-6)


@pytest.mark.parametrize("first_order", MODES)
@pytest.mark.parametrize("steps", range(1, 6))
def test_maml_plus_plus_is_the_finite_difference_of_the_weighted_losses(steps, first_order):
    theta, support, query = problem()
    theta, weights = with_lslr(theta, steps), np.random.default_rng(2).uniform(0.1, 1, steps)

    def losses(theta, frozen=None):
        w, a = theta[:4], theta[4:]
        phis, g = path(w, support, steps, move=lambda g, k: [x.data[k] * y for x, y in zip(a, g)], frozen=frozen)
        return [query_loss_at(phi, query) for phi in phis[1:]], g

    def objective(theta, frozen):
        values, g = losses(theta, frozen)
        return weights @ values, g

    options = {"steps": steps, "weights": weights, "first_order": first_order}
    result = tm.meta.maml_plus_plus(loss, theta, support, query, **options)
    check_against_definition(result, objective, theta, first_order, value=losses(theta)[0][-1])


def test_maml_plus_plus_is_of_second_order_by_default_and_takes_a_single_weight():
    def loss(phi, data):
        return tm.sum(tm.sin(phi[0] * data), axis=1)

    theta, data = tm.meta.init_lslr([tm.Tensor([0.5, 0.7])], 0.1, 2), np.array([[0.3, 1.1], [0.9, 0.4]])
    weights = np.array([0.5, 0.5])
    default, second, first = (
        flat(tm.meta.maml_plus_plus(loss, theta, data, data, steps=2, weights=weights, **o)[1])
        for o in ({}, {"first_order": False}, {"first_order": True})
    )
    assert (default == second).all() and not np.allclose(default, first)
    with pytest.raises(ValueError, match="expected float64, shape"):
        tm.meta.maml_plus_plus(loss, theta, data, data, steps=2, weights=weights.astype(np.float32))


def test_multi_step_weights_follow_the_published_schedule():
    weights = tm.meta.multi_step_weights
    np.testing.assert_allclose(weights(5, 0, dtype=np.float64), [0.2] * 5, rtol=1e-12)
    np.testing.assert_allclose(weights(5, 5, dtype=np.float64), [0.1] * 4 + [0.6], rtol=1e-12)
    np.testing.assert_allclose(weights(5, 9, dtype=np.float64), [0.02] * 4 + [0.92], rtol=1e-12)
    np.testing.assert_allclose(weights(4, 98, epochs=100, dtype=np.float64), [0.0075] * 3 + [0.9775], rtol=1e-12)
    for epoch in (10, 11, 100):
        np.testing.assert_array_equal(weights(5, epoch), [0, 0, 0, 0, 1])
    assert all(weights(3, epoch).sum() == pytest.approx(1) for epoch in range(12))
    assert weights(1, 3).tolist() == [1] and weights(5, 0).dtype == np.float32


def test_a_rule_with_learned_step_sizes_adapts_at_test_as_in_training():
    weights, support, query = problem()
    for theta, algorithm, rule, options in [
        (with_meta_sgd(weights), tm.meta.meta_sgd, tm.solvers.sgd, {}),
        (with_lslr(weights), tm.meta.maml_plus_plus, tm.meta.per_step, {"weights": last_only(STEPS)}),
    ]:
        w, a = tm.meta.split(theta)
        phi = tm.meta.adapt(loss, w, support, alpha=a, steps=STEPS, rule=rule)
        query_loss, _ = algorithm(loss, theta, support, query, steps=STEPS, **options)
        assert loss(phi, query).data.mean() == pytest.approx(query_loss.item(), rel=1e-13)
        assert not any(p.inputs for p in phi)


def test_start_values_of_the_step_sizes():
    theta = [t.astype(np.float32) for t in problem()[0]]
    for init, shapes in [
        (tm.meta.init_meta_sgd(theta, 0.1), [t.shape for t in theta]),
        (tm.meta.init_lslr(theta, 0.1, 7), [(7,)] * 4),
    ]:
        w, a = tm.meta.split(init)
        assert all(x is y for x, y in zip(w, theta, strict=True))
        assert [(x.shape, x.dtype) for x in a] == [(shape, np.float32) for shape in shapes]
        assert (flat(a) == np.float32(0.1)).all()
    assert len(tm.meta.init_meta_sgd(tuple(theta), 0.1)) == len(tm.meta.init_lslr(tuple(theta), 0.1, 7)) == 8


def test_first_order_keeps_the_updates_but_not_the_graphs_of_their_gradients():
    def meta_sgd(loss, theta, *data, alpha, steps, first_order):
        theta = tm.meta.init_meta_sgd(theta, alpha)
        return tm.meta.meta_sgd(loss, theta, *data, steps=steps, first_order=first_order)

    for algorithm, options in [(meta_sgd, {}), (tm.meta.anil, {"head": 2})]:
        second, first = (
            [memory(algorithm, {"first_order": first, **options}, steps) for steps in (2, 20)]
            for first in (False, True)
        )
        assert second[1] > 4 * second[0] and first[1] < 1.3 * first[0]


# ---- ANIL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_order", MODES)
@pytest.mark.parametrize("head", [1, 2, 3])
@pytest.mark.parametrize("steps", range(6))
def test_anil_is_the_finite_difference_of_the_loss_with_adapted_heads(steps, head, first_order):
    theta, support, query = problem()

    def objective(theta, frozen):
        def move(g, k):
            return [(i >= 4 - head) * ALPHA * g_i for i, g_i in enumerate(g)]

        phis, g = path(theta, support, steps, move=move, frozen=frozen)
        return query_loss_at(phis[-1], query), g

    options = {"alpha": ALPHA, "steps": steps, "head": head, "first_order": first_order}
    check_against_definition(tm.meta.anil(loss, theta, support, query, **options), objective, theta, first_order)


def test_anil_on_a_quadratic():
    """φ = Jᴷ θ with J = I − α P A, where P keeps the head; first order leaves J out but for the query's side."""

    def coupled(phi, data):
        return quadratic([tm.concatenate(phi, axis=1)], data)

    (t,), (_, zero), query = by_hand(tasks=2)
    theta, support = [t[:1].reshape(1), tm.stop_gradient(t[1:])], (np.stack([COUPLED] * 2), zero)
    theta = tm.stop_gradient(theta)
    j = np.linalg.matrix_power(np.eye(3) - 0.1 * np.diag([0, 1, 1]) @ COUPLED, 3)
    g = C @ (j @ THETA - CENTRE)
    for first_order, expected in [(False, j.T @ g), (True, g)]:
        options = {"alpha": 0.1, "steps": 3, "head": 1, "first_order": first_order}
        _, meta_grad = tm.meta.anil(coupled, theta, support, query, **options)
        np.testing.assert_allclose(flat(meta_grad), expected, rtol=1e-12)


@pytest.mark.parametrize("rule", [tm.solvers.sgd, tm.solvers.momentum])
def test_anil_with_all_parameters_is_maml_and_with_none_the_plain_gradient(rule):
    theta, support, query = problem()
    options = {"alpha": ALPHA, "steps": 3, "rule": rule}
    for head, first_order, (expected_loss, expected) in [
        (4, False, tm.meta.maml(loss, theta, support, query, **options)),
        (4, True, tm.meta.fomaml(loss, theta, support, query, **options)),
        (0, False, tm.meta.maml(loss, theta, support, query, alpha=ALPHA, steps=0)),
    ]:
        found = tm.meta.anil(loss, theta, support, query, head=head, first_order=first_order, **options)
        assert found[0].item() == pytest.approx(expected_loss.item(), rel=1e-13)
        assert_close(found[1], [e.data for e in expected], rtol=1e-12)


@pytest.mark.parametrize("first_order", MODES)
def test_anil_leaves_the_body_where_it_is_and_learns_it_all_the_same(first_order):
    theta, support, query = problem()
    seen = []

    def watched(phi, data):
        seen.append(phi)
        return loss(phi, data)

    options = {"alpha": ALPHA, "steps": 2, "head": 2, "first_order": first_order}
    _, meta_grad = tm.meta.anil(watched, theta, support, query, **options)
    assert len(seen) == 3 and all(len(phi) == 4 for phi in seen)
    for phi in seen:
        assert all(np.shares_memory(p.data, t.data) and p.shape == (3, *t.shape) for p, t in zip(phi[:2], theta))
    assert not any(np.array_equal(seen[0][i].data, seen[2][i].data) for i in (2, 3))
    assert all(np.abs(g.data).max() > 1e-3 for g in meta_grad)


def test_compiled_anil_computes_the_features_of_support_and_query_once():
    theta, support, query = problem()
    for steps in (1, 4):
        for head, count in [(2, 2), (4, steps + 1)]:
            f = tm.compile(lambda *x, h=head, s=steps: tm.meta.anil(loss, *x, alpha=ALPHA, steps=s, head=h))
            assert [n.op for n in f.program(theta, support, query).nodes].count("tanh") == count


# ---- gradient dropout ------------------------------------------------------------------------------------------------


def noise_for(theta, p=0.3, gaussian=False, steps=STEPS, seed=3):
    return tm.meta.draw_noise(np.random.default_rng(seed), theta, p, tasks=3, steps=steps, gaussian=gaussian)


@pytest.mark.parametrize("first_order", MODES)
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("steps", range(6))
def test_dropout_is_the_finite_difference_of_the_noisy_adaptation(steps, gaussian, first_order):
    theta, support, query = problem()
    noise = noise_for(theta, gaussian=gaussian, steps=steps)

    def objective(theta, frozen):
        def move(g, k):
            return [ALPHA * n[:, k] * g_i for n, g_i in zip(noise, g)]

        phis, g = path(theta, support, steps, move=move, frozen=frozen)
        return query_loss_at(phis[-1], query), g

    algorithm = tm.meta.fomaml if first_order else tm.meta.maml
    result = algorithm(loss, theta, support, query, alpha=ALPHA, steps=steps, rule=tm.meta.dropout(noise))
    check_against_definition(result, objective, theta, first_order)


@pytest.mark.parametrize("gaussian", [False, True])
def test_no_dropout_is_the_plain_algorithm_whatever_the_rule(gaussian):
    theta, support, query = problem()
    ones = noise_for(theta, p=0, gaussian=gaussian)
    assert (flat(ones) == 1).all()
    for rule in (tm.solvers.sgd, tm.solvers.adam):
        for algorithm, options in [(tm.meta.maml, {}), (tm.meta.truncated, {"last": 1}), (tm.meta.reptile, {})]:
            options = {"alpha": 0.02, "steps": STEPS, **options}
            _, expected = algorithm(loss, theta, support, query, rule=rule, **options)
            _, found = algorithm(loss, theta, support, query, rule=tm.meta.dropout(ones, rule), **options)
            np.testing.assert_array_equal(flat(found), flat(expected))
            _, found = algorithm(loss, theta, support, query, rule=tm.meta.dropout(noise_for(theta), rule), **options)
            assert not np.allclose(flat(found), flat(expected), rtol=1e-3)


def test_dropout_within_meta_sgd():
    theta, support, query = problem()
    theta, noise = with_meta_sgd(theta), noise_for(theta)

    def objective(theta, frozen):
        w, a = theta[:4], theta[4:]

        def move(g, k):
            return [x.data * n[:, k] * y for x, n, y in zip(a, noise, g)]

        phis, g = path(w, support, STEPS, move=move, frozen=frozen)
        return query_loss_at(phis[-1], query), g

    result = tm.meta.meta_sgd(loss, theta, support, query, steps=STEPS, rule=tm.meta.dropout(noise))
    check_against_definition(result, objective, theta, first_order=False)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_moments_of_the_noise(p):
    theta = [tm.Tensor(np.zeros((50, 20))), tm.Tensor(np.zeros((1, 20), np.float32))]
    count = 4 * 5 * 1000
    for gaussian in (False, True):
        noise = tm.meta.draw_noise(np.random.default_rng(0), theta, p, tasks=4, steps=5, gaussian=gaussian)
        assert [n.shape for n in noise] == [(4, 5, 50, 20), (4, 5, 1, 20)]
        assert [n.dtype for n in noise] == [np.float64, np.float32]
        variance = p / (1 - p)
        assert abs(noise[0].mean() - 1) < 5 * (variance / count) ** 0.5
        fourth = np.mean((noise[0] - 1) ** 4)
        assert abs(np.mean((noise[0] - 1) ** 2) - variance) < 5 * ((fourth - variance**2) / count) ** 0.5 + 1e-12
        if gaussian:
            assert fourth == pytest.approx(3 * variance**2, rel=0.1)
        else:
            np.testing.assert_allclose(np.unique(noise[0]), [0, 1 / (1 - p)])
        again = tm.meta.draw_noise(np.random.default_rng(0), theta, p, tasks=4, steps=5, gaussian=gaussian)
        np.testing.assert_array_equal(flat(noise), flat(again))
    binary = tm.meta.draw_noise(np.random.default_rng(0), theta, p, tasks=4, steps=5)
    assert np.unique(binary[0]).size == 2


# ---- what holds for all of them --------------------------------------------------------------------------------------

# name: (f(loss, theta, support, query, noise), theta from that of plain weights)
RELATIVES = {
    "truncated": (lambda *x, **o: tm.meta.truncated(*x[:4], alpha=0.03, steps=STEPS, last=2, **o), list),
    "meta_sgd": (lambda *x, **o: tm.meta.meta_sgd(*x[:4], steps=STEPS, **o), with_meta_sgd),
    "meta_sgd, first order": (
        lambda *x, **o: tm.meta.meta_sgd(*x[:4], steps=STEPS, first_order=True, **o),
        with_meta_sgd,
    ),
    "maml_plus_plus": (
        lambda *x, **o: tm.meta.maml_plus_plus(
            *x[:4], steps=STEPS, weights=np.array([0.2, 0.3, 0.5], x[1][0].dtype), **o
        ),
        with_lslr,
    ),
    "maml_plus_plus, first order": (
        lambda *x, **o: tm.meta.maml_plus_plus(
            *x[:4], steps=STEPS, weights=np.array([0.2, 0.3, 0.5], x[1][0].dtype), first_order=True, **o
        ),
        with_lslr,
    ),
    "anil": (lambda *x, **o: tm.meta.anil(*x[:4], alpha=0.03, steps=STEPS, head=2, **o), list),
    "anil, first order": (
        lambda *x, **o: tm.meta.anil(*x[:4], alpha=0.03, steps=STEPS, head=2, first_order=True, **o),
        list,
    ),
    "dropout": (
        lambda *x, **o: tm.meta.maml(*x[:4], alpha=0.03, steps=STEPS, rule=tm.meta.dropout(x[4]), **o),
        list,
    ),
}
each_relative = pytest.mark.parametrize("algorithm, start", RELATIVES.values(), ids=RELATIVES)


@each_relative
def test_a_batch_of_tasks_is_the_mean_of_single_tasks(algorithm, start):
    weights, support, query = problem()
    theta, noise = start(weights), noise_for(weights)
    together = algorithm(loss, theta, support, query, noise)
    alone = [algorithm(loss, theta, task(support, i), task(query, i), [n[i : i + 1] for n in noise]) for i in range(3)]
    assert together[0].item() == pytest.approx(np.mean([a[0].item() for a in alone]), rel=1e-12)
    assert_close(together[1], [np.mean([g.data for g in gs], axis=0) for gs in zip(*[a[1] for a in alone])], rtol=1e-12)


@each_relative
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_theta_is_unchanged_and_results_are_leaves_like_theta(algorithm, start, dtype):
    weights, support, query = problem()
    theta = [t.data.astype(dtype) for t in start(weights)]
    before, theta = [t.tobytes() for t in theta], [tm.Tensor(t) for t in theta]
    support, query = (tuple(a.astype(dtype) for a in data) for data in (support, query))
    result = algorithm(loss, theta, support, query, noise_for(theta[:4]))
    assert [t.data.tobytes() for t in theta] == before and not any(t.inputs for t in theta)
    assert (result[0].shape, result[0].dtype, result[0].inputs) == ((), dtype, ())
    assert [(g.shape, g.dtype, g.inputs) for g in result[1]] == [(t.shape, t.dtype, ()) for t in theta]


@each_relative
def test_inner_minibatches(algorithm, start):
    weights, support, query = problem()
    theta, noise, seen = start(weights), noise_for(weights), []

    def batch(data, step):
        seen.append(step)
        return tuple(a[:, step : step + 2] for a in data)

    whole = algorithm(loss, theta, support, query, noise)
    parts = algorithm(loss, theta, support, query, noise, batch=batch)
    assert seen == [0, 1, 2] and not np.allclose(flat(whole[1]), flat(parts[1]))


@each_relative
def test_compiled_is_eager_bit_for_bit(algorithm, start):
    def f(theta, support, query, noise):
        return algorithm(loss, theta, support, query, noise)

    compiled = tm.compile(f)
    sharded = tm.compile(f, tasks=("support", "query", "noise"), shards=2)
    for seed in range(3):
        weights, support, query = problem(seed)
        theta, noise = start(weights), noise_for(weights, seed=seed)
        eager = f(theta, support, query, noise)
        found = compiled(theta, support, query, noise)
        np.testing.assert_array_equal(flat([found[0], *found[1]]), flat([eager[0], *eager[1]]))
        parts = sharded(theta, support, query, noise)
        assert_close([parts[0], *parts[1]], [eager[0].data, *[g.data for g in eager[1]]], rtol=1e-12)
    assert len(compiled.programs) == 1


def test_annealed_weights_are_an_argument_of_one_compiled_program():
    theta, support, query = problem()
    theta = with_lslr(theta)

    def f(theta, weights):
        return tm.meta.maml_plus_plus(loss, theta, support, query, steps=STEPS, weights=weights)

    compiled, found = tm.compile(f), []
    for epoch in (0, 5, 10):
        weights = tm.meta.multi_step_weights(STEPS, epoch, dtype=np.float64)
        found.append(flat(compiled(theta, weights)[1]))
        np.testing.assert_array_equal(found[-1], flat(f(theta, weights)[1]))
    assert len(compiled.programs) == 1 and not np.allclose(found[0], found[1]) and not np.allclose(found[1], found[2])


def image_loss(phi, data):
    images, labels = data
    return tm.nn.cross_entropy(tm.nn.convnet(phi, images), labels)


@each_relative
def test_a_convnet_with_batch_norm(algorithm, start):
    """The derivative along the meta-gradient, of what the algorithm returns or, first order, finite numbers."""
    rng = np.random.default_rng(0)
    weights = tm.nn.init_convnet(rng, ways=3, filters=4, blocks=2, dtype=np.float64)
    labels = np.tile(np.arange(3), (3, 2))
    support, query = ((rng.standard_normal((3, 6, 8, 8, 1)), labels) for _ in range(2))
    theta, noise = start(weights), noise_for(weights)
    _, meta_grad = algorithm(image_loss, theta, support, query, noise)
    assert np.isfinite(flat(meta_grad)).all() and all(np.abs(g.data).max() > 0 for g in meta_grad)
    if algorithm not in (RELATIVES["meta_sgd"][0], RELATIVES["anil"][0], RELATIVES["dropout"][0]):
        return
    direction = [g.data / np.linalg.norm(flat(meta_grad)) for g in meta_grad]
    values = []
    for sign in (1, -1):
        moved = [tm.Tensor(t.data + sign * 1e-6 * d) for t, d in zip(theta, direction)]
        values.append(algorithm(image_loss, moved, support, query, noise)[0].item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(np.linalg.norm(flat(meta_grad)), rel=1e-5)


@each_relative
def test_finite_with_dead_units(algorithm, start):
    """All of relu's units are off, and adam's second moments are 0 where the algorithm has a rule to choose."""

    def relu_loss(phi, data):
        return tm.nn.mse(tm.nn.mlp(phi, data[0]), data[1])

    weights, support, query = problem()
    weights[1] = tm.Tensor(np.full(weights[1].shape, -100.0))
    for options in ({}, {"rule": tm.solvers.adam}):
        if options and (algorithm is RELATIVES["dropout"][0] or start is with_lslr):
            continue
        result = algorithm(relu_loss, start(weights), support, query, noise_for(weights), **options)
        assert np.isfinite(flat([result[0], *result[1]])).all()


@each_relative
def test_wrong_losses_and_data_are_refused_by_name(algorithm, start):
    weights, support, query = problem()
    theta, noise = start(weights), noise_for(weights)

    def mean_loss(phi, data):
        return tm.mean(loss(phi, data))

    with pytest.raises(ValueError, match=r"mean_loss returned a Tensor of float64, shape \(\), expected .* \(3,\)"):
        algorithm(mean_loss, theta, support, query, noise)
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        algorithm(lambda phi, data: tm.stop_gradient(loss(phi, data)), theta, support, query, noise)
    with pytest.raises(ValueError, match="tasks as their first axis"):
        algorithm(loss, theta, support, task(query, 0), noise)
    with pytest.raises(ValueError, match=r"theta\[0\] is the result of"):
        algorithm(loss, [t * 1.0 for t in theta], support, query, noise)


# ---- refusals of their own -------------------------------------------------------------------------------------------


def test_wrong_options_are_refused():
    theta, support, query = problem()
    data = support, query
    for last in (-1, 3):
        with pytest.raises(ValueError, match=f"last .*, got {last}"):
            tm.meta.truncated(loss, theta, *data, alpha=ALPHA, steps=2, last=last)
    for head in (-1, 5):
        with pytest.raises(ValueError, match=f"head .*got {head}"):
            tm.meta.anil(loss, theta, *data, alpha=ALPHA, steps=2, head=head)
    for wrong in (theta[:3], [*theta, *theta, theta[0]]):
        with pytest.raises(ValueError, match=r"theta has \d parameters: it is \[\*weights, \*step sizes\]"):
            tm.meta.meta_sgd(loss, wrong, *data, steps=1)
    with pytest.raises(ValueError, match=r"step sizes.*have shapes \[\(4, 1\), \(1, 1\)\], expected \[\(1, 4\), "):
        tm.meta.meta_sgd(loss, theta, *data, steps=1)
    with pytest.raises(ValueError, match=r"step sizes.*\(2,\)\], expected \[\(3,\)"):
        tm.meta.maml_plus_plus(loss, with_lslr(theta, 2), *data, steps=3, weights=np.ones(3))
    for weights in (np.ones(2), np.ones((3, 1)), 1.0):
        with pytest.raises(
            ValueError, match=r"weights are a Tensor of float64, shape .*expected float64, shape \(3,\)"
        ):
            tm.meta.maml_plus_plus(loss, with_lslr(theta), *data, steps=3, weights=weights)
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        tm.meta.maml_plus_plus(loss, with_lslr(theta, 0), *data, steps=0, weights=np.ones(0))
    for steps, epoch in [(0, 0), (1, -1)]:
        with pytest.raises(ValueError, match="steps must be 1 or more|epoch must be 0 or more"):
            tm.meta.multi_step_weights(steps, epoch)
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        tm.meta.anil(loss, theta, *data, alpha=ALPHA, steps=-1, head=0)
    with pytest.raises(ValueError, match="step sizes for 3 steps, and none for step 3"):
        w, a = tm.meta.split(with_lslr(theta))
        tm.meta.adapt(loss, w, support, alpha=a, steps=4, rule=tm.meta.per_step)
    with pytest.raises(ValueError, match="4 parameters but 3 step sizes in alpha"):
        tm.meta.adapt(loss, theta, support, alpha=[0.1] * 3, steps=1)


def test_wrong_noise_is_refused():
    theta, support, query = problem()

    def noisy(noise, steps=STEPS):
        return tm.meta.maml(loss, theta, support, query, alpha=ALPHA, steps=steps, rule=tm.meta.dropout(noise))

    noise = noise_for(theta)
    with pytest.raises(ValueError, match=r"step 3 of stacked parameters .*more than 3 steps after the tasks, got"):
        noisy(noise, steps=4)
    for wrong in (
        noise[:3],
        [n[:1] for n in noise],
        [n[0] for n in noise],
        noise[::-1],
        [n.swapaxes(0, 1)[:2] for n in noise],
        [1.0] * 4,
    ):
        with pytest.raises(ValueError, match=r"step 0 of stacked parameters \[\(3, 1, 4\), .* needs noise"):
            noisy(wrong)
    for p in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match="0 ≤ p < 1, got|p must be finite"):
            noise_for(theta, p=p)


def test_a_batch_must_have_all_tasks():
    """One task's minibatch would be broadcast to all."""
    theta, data = [tm.Tensor(np.ones((2, 1)))], (np.ones((3, 4, 2)), np.ones((3, 4, 1)))

    def loss(phi, data):
        return tm.nn.mse(data[0] @ phi[0], data[1])

    for algorithm in (tm.meta.maml, tm.meta.fomaml, tm.meta.reptile, tm.meta.leap):
        with pytest.raises(ValueError, match=r"batch\(support, 0\) has 1 tasks, support 3"):
            algorithm(loss, theta, data, data, alpha=0.1, steps=1, batch=lambda d, k: tuple(a[k : k + 1] for a in d))


def test_numbers_of_steps_are_whole():
    theta, data = [tm.Tensor(np.ones((2, 1)))], (np.ones((3, 4, 2)), np.ones((3, 4, 1)))

    def loss(phi, data):
        return tm.nn.mse(data[0] @ phi[0], data[1])

    for options in (dict(steps=2.0, last=1), dict(steps=-1, last=1)):
        with pytest.raises(ValueError, match="steps must be"):
            tm.meta.truncated(loss, theta, data, data, alpha=0.1, **options)
    with pytest.raises(ValueError, match="last must be 0 or more, a whole number"):
        tm.meta.truncated(loss, theta, data, data, alpha=0.1, steps=3, last=1.5)
    with pytest.raises(ValueError, match="solve takes the place"):
        solve = tm.solvers.hessian_free
        tm.meta.adapt(loss, theta, data, alpha=0.1, steps=1, solve=solve, rule=tm.solvers.adam)
