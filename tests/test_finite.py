"""Numbers that are not finite, planted: each is named by its task, inner step and parameter, in every algorithm."""

import re
import warnings
from functools import partial

import numpy as np
import pytest

import tinymeta as tm
from tinymeta.meta import require_finite

TASKS = 4
ADAM = tm.solvers.adam


@pytest.fixture(autouse=True)
def no_numpy_warnings():
    with np.errstate(all="ignore"):
        yield


def stopped(loss, theta, support, query, algorithm=tm.meta.maml, **options):
    """The sentence with which this iteration, 7, is stopped; None if all is finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iMAML, on such numbers
        result = algorithm(loss, theta, support, query, **options)
    try:
        with np.errstate(all="raise"):  # of no concern to what is run again
            assert require_finite("iteration 7", result, algorithm, loss, theta, support, query, **options) is None
    except FloatingPointError as error:
        assert str(error).startswith("iteration 7: ") and "\n" not in str(error)
        return str(error).removeprefix("iteration 7: ")


def single(*values):
    """θ of parameters of one element each."""
    return [tm.Tensor(np.array([value], np.float32)) for value in values]


def curved(phi, data):
    """½ Σ_i a_i φ_i² of each task; data: the curvatures (tasks, 1), one for each parameter."""
    return sum(tm.sum(a * p * p, axis=1) / 2 for p, a in zip(phi, data))


def curvatures(*of_parameters):
    return tuple(np.array(a, np.float32)[:, None] for a in of_parameters)


# ---- every algorithm -------------------------------------------------------------------------------------------------

THETA = tm.nn.init_mlp(np.random.default_rng(0), (1, 5, 1))
RNG = np.random.default_rng(1)
ES = {"alpha": 0.01, "steps": 2, "sigma": 0.1}
ES["noise"] = tm.meta.draw_es_noise(RNG, THETA, TASKS, steps=2, perturbations=3, queries=2)
NOISE = tm.meta.draw_noise(RNG, THETA, 0.1, tasks=TASKS, steps=2)
INNER = {"alpha": 0.01, "steps": 2}
IMAML = INNER | {"lam": 9.0, "cg_steps": 2, "report": True}
NEWTON = partial(tm.solvers.hessian_free, cg_steps=2, halvings=2)
ALGORITHMS = {
    "maml": (tm.meta.maml, THETA, INNER),
    "fomaml": (tm.meta.fomaml, THETA, INNER),
    "truncated": (tm.meta.truncated, THETA, INNER | {"last": 1}),
    "maml++": (tm.meta.maml_plus_plus, tm.meta.init_lslr(THETA, 0.01, 2),
               {"steps": 2, "weights": np.array([0.5, 0.5], np.float32)}),
    "meta-sgd": (tm.meta.meta_sgd, tm.meta.init_meta_sgd(THETA, 0.01), {"steps": 2}),
    "anil": (tm.meta.anil, THETA, INNER | {"head": 2}),
    "dropout": (tm.meta.maml, THETA, INNER | {"rule": tm.meta.dropout(NOISE)}),
    "reptile": (tm.meta.reptile, THETA, INNER | {"rule": tm.solvers.nesterov}),
    "leap": (tm.meta.leap, THETA, INNER),
    "imaml": (tm.meta.imaml, THETA, IMAML),
    "newton": (tm.meta.imaml, THETA, IMAML | {"alpha": 1.0, "solve": NEWTON}),
    "shrinkage": (tm.meta.shrinkage, [*THETA, tm.Tensor(np.float32(-2.0)), tm.Tensor(np.float32(-2.0))],
                  {k: v for k, v in IMAML.items() if k != "lam"} | {"modules": [[0, 1], [2, 3]]}),
    "es-maml": (tm.meta.es_maml, THETA, ES),
    "fo-es-maml": (tm.meta.first_order_es_maml, THETA, ES),
}  # fmt: skip


def mlp_loss(phi, data):
    return tm.nn.mse(tm.nn.mlp(phi, data[0]), data[1])


def waves():
    x = np.random.default_rng(2).uniform(-1, 1, (2, TASKS, 3, 1)).astype(np.float32)
    return (x[0], np.sin(x[0])), (x[1], np.sin(x[1]))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_in_every_algorithm(name):
    algorithm, theta, options = ALGORITHMS[name]
    support, query = waves()
    at = partial(stopped, mlp_loss, algorithm=algorithm, **options)
    assert at(theta, support, query) is None

    bad = support[1].copy()
    bad[2, 1, 0] = np.nan
    assert at(theta, (support[0], bad), query) == (
        "support[1] of task 2 is nan at (2, 1, 0): mend it, nothing can be learned from it"
    )
    assert at(theta, support, (bad, query[1])).startswith("query[0] of task 2 is nan at (2, 1, 0)")

    large = support[1].copy()
    large[1:] = 1e25  # whose square is too large for float32
    said = at(theta, (support[0], large), query)
    assert said.startswith("mlp_loss on the support of task 1 is inf at inner step 0, though φ is finite")
    after = "step 0" if name == "maml++" else "step 1"
    said = at(theta, support, (query[0], large))
    assert said.startswith(f"mlp_loss on the query of task 1 is inf after inner {after}, though φ is finite")

    infinite = [*theta[:2], tm.Tensor(np.full(theta[2].shape, -np.inf, np.float32)), *theta[3:]]
    said = at(infinite, support, query)
    assert said.startswith(f"theta[2] of shape {theta[2].shape} holds -inf before the first inner step: go back")


# ---- forward ---------------------------------------------------------------------------------------------------------

CAN_EXPLODE = ("maml", "fomaml", "truncated", "reptile", "leap", "imaml")


@pytest.mark.parametrize("name", CAN_EXPLODE)
def test_an_inner_step_that_explodes_in_one_task(name):
    """φ ← (1 − αa) φ: in task 3 |φ| grows by 10⁹ a step, and ½ a φ², a = 10¹⁰, passes 10³⁸ at step 2."""
    algorithm = getattr(tm.meta, name)
    more = {"truncated": {"last": 4}, "imaml": {"lam": 1.0, "cg_steps": 2, "report": True}}.get(name, {})
    data = curvatures([1, 1, 1, 1], [1, 1, 1, 1e10])
    options = {"alpha": 0.1, "steps": 4, "algorithm": algorithm} | more
    said = stopped(curved, single(1, 1), data, data, **options)
    assert said.startswith("curved on the support of task 3 is inf at inner step 2, though φ is finite: φ has elements")
    assert re.search(r"of 1\.0e\+18, θ of 1\.0e\+00; take a smaller inner step, or clip its gradient", said)
    clipped = {"rule": partial(tm.solvers.clipped, norm=1.0)}
    assert stopped(curved, single(1, 1), data, data, **options, **clipped) is None  # the remedy helps
    data = tuple(a.astype(np.float64) for a in data)
    double = [tm.Tensor(np.ones(1))] * 2
    assert stopped(curved, double, data, data, **options) is None  # 64 bits hold it


def test_the_size_of_parameters_of_which_some_are_empty():
    data, theta = curvatures([1], [1e10]), [*single(0.5, 0.5), tm.Tensor(np.zeros(0, np.float32))]
    assert re.search(
        r"φ has elements of 5\.0e\+17, θ of 5\.0e-01; ", stopped(curved, theta, data, data, alpha=0.1, steps=4)
    )


def test_without_inner_steps():
    support, query = curvatures([1, 1]), curvatures([1, 1e38])
    said = stopped(curved, single(9), support, query, alpha=0.1, steps=0)
    assert said.startswith("curved on the query of task 1 is inf before any inner step, though φ is finite")


def test_the_query_after_every_step():
    data, theta = curvatures([1e10]), tm.meta.init_lslr(single(1), 0.1, 2)
    options = {"algorithm": tm.meta.maml_plus_plus, "steps": 2, "weights": np.array([0.5, 0.5], np.float32)}
    said = stopped(curved, theta, data, curvatures([1e10]), **options)
    assert said.startswith("curved on the query of task 0 is inf after inner step 1, though φ is finite")


def test_a_step_that_overflows_though_its_gradient_is_finite():
    data = curvatures([1, 1, 1, 1e6], [1, 1, 1, 1])
    said = stopped(curved, single(1, 2), data, data, alpha=[0.1, tm.Tensor(np.float32(2e38))], steps=3)
    assert said.startswith(
        "φ of task 0 is -inf in parameter 1 of shape (1,) after inner step 0, though the gradient was finite: the update"
    )


def test_the_gradient_before_the_update():
    """√|φ₁ − y|: no derivative where they are equal, here in task 1 and, with a smaller number, in parameter 1."""

    def rooted(phi, data):
        return tm.sum(phi[0] ** 2 + tm.sqrt(phi[1] - data), axis=1)

    support, query = np.array([[0.0], [0.5], [0.5]], np.float32), np.zeros((3, 1), np.float32)
    said = stopped(rooted, single(1, 0.5), support, query, alpha=0.1, steps=2)
    assert said == (
        "the gradient of rooted on the support of task 1 at inner step 0 is inf in parameter 1 of shape (1,), though"
        " the loss is finite: an op has no derivative there, as sqrt at 0: guard it by tm.where, inside too"
    )
    said = stopped(rooted, single(1, 0.5), query, support, algorithm=tm.meta.reptile, alpha=0.0, steps=1)
    assert said is None  # Reptile does not differentiate the query's
    said = stopped(rooted, single(1, 0.5), query, support, algorithm=tm.meta.fomaml, alpha=0.0, steps=1)
    assert said.startswith("the gradient of rooted on the query of task 1 after inner step 0 is inf in parameter 1")


def test_the_first_task_comes_before_the_first_parameter():
    def rooted(phi, data):
        return sum(tm.sum(tm.sqrt(p - a), axis=1) for p, a in zip(phi, data))

    support, query = curvatures([0, 0, 0, 0.5], [0, 0.5, 0, 0.5]), curvatures([0, 0, 0, 0], [0, 0, 0, 0])
    said = stopped(rooted, single(0.5, 0.5), support, query, alpha=0.1, steps=1)
    assert said.startswith("the gradient of rooted on the support of task 1 at inner step 0 is inf in parameter 1 ")


def test_an_update_rule_that_divides_by_zero():
    data = curvatures([1, 1, 1, 1], [1, 1, 0, 1])  # a gradient of 0 in task 2
    said = stopped(curved, single(1, 1), data, data, alpha=0.1, steps=2, rule=partial(ADAM, eps=0.0))
    assert said.startswith(
        "φ of task 2 is nan in parameter 1 of shape (1,) after inner step 0, though the gradient was"
    )
    assert stopped(curved, single(1, 1), data, data, alpha=0.1, steps=2, rule=ADAM) is None


# ---- backward only ---------------------------------------------------------------------------------------------------


def bent(phi, data):
    """d^1.5 − d has a second derivative but at d = φ₁ − y = 0, where a step leads away to where it has."""
    d = phi[1] - data
    return tm.sum(phi[0] ** 2 + d**1.5 - d, axis=1)


def test_a_second_derivative_that_is_not_finite_where_all_else_is():
    support = np.array([[0.0], [0.25], [0.5], [0.5]], np.float32)
    query = np.full((4, 1), -1.0, np.float32)
    options = {"alpha": 0.1, "steps": 3}
    said = stopped(bent, single(1, 0.5), support, query, **options)
    assert re.fullmatch(
        r"the second derivative H v of bent on the support of task 2 at inner step 0 is -?(inf|nan) in parameter 1 of"
        r" shape \(1,\), though losses and gradients are finite: an op has no derivative there, as sqrt at 0: .*", said
    )  # fmt: skip
    assert stopped(bent, single(1, 0.5), support, query, algorithm=tm.meta.fomaml, **options) is None


def test_backward_the_last_step_comes_first():
    resting = lambda phi, data: tm.sum((phi[0] - data) ** 1.5, axis=1)  # task 1 has a gradient of 0, and stays
    support, query = np.array([[0.0], [0.5]], np.float32), np.full((2, 1), -1.0, np.float32)
    said = stopped(resting, single(0.5), support, query, alpha=0.1, steps=3)
    assert "of task 1 at inner step 2 is" in said


def test_the_hessian_of_the_implicit_gradient():
    support = np.array([[0.0], [0.5]], np.float32)
    query = np.full((2, 1), -1.0, np.float32)
    options = {"algorithm": tm.meta.imaml, "lam": 1.0, "alpha": 0.1, "steps": 0, "cg_steps": 2, "report": True}
    said = stopped(bent, single(1, 0.5), support, query, **options)
    assert said.startswith("the second derivative H v of bent on the support of task 1 at the solution of the inner")


def test_a_support_that_is_also_the_query():
    data, options = np.array([[0.0], [0.5]], np.float32), {"algorithm": tm.meta.imaml, "lam": 1.0, "cg_steps": 2}
    options |= {"alpha": 0.1, "steps": 0, "report": True}
    said = stopped(bent, single(1, 0.5), data, data, **options)
    assert said.startswith("the second derivative H v of bent on the support of task 1 at the solution of the inner")
    said = stopped(bent, single(1, 0.25), data, data, **options)
    assert said.startswith("bent on the query of task 1 is nan before any inner step")


def test_the_product_over_the_steps():
    """Every factor is finite, 10¹⁴ a step and task, and their product not."""
    flat = lambda phi, data: tm.sum(data * tm.cos(phi[0] * 1e7), axis=1)
    data = np.ones((2, 1), np.float32)
    said = stopped(flat, single(0.0), data, data + 0, alpha=1.0, steps=4)
    assert said is None  # at θ = 0 all gradients are 0
    tiny = lambda phi, data: tm.sum(1e-4 * data * tm.cos(phi[0]), axis=1)
    said = stopped(tiny, single(1e-5), np.full((2, 1), 1e14, np.float32), data, alpha=1.0, steps=6)
    assert said.startswith("the meta-gradient is ") and "in parameter 0 of shape (1,)" in said
    assert "their product over the steps, their sum over tasks" in said


# ---- what is looked at, and what is not ------------------------------------------------------------------------------


def never(*args, **options):
    raise AssertionError("run again without need")


def test_nothing_is_run_again_until_something_is_wrong():
    good = tm.Tensor(1.0), single(1, 2)
    assert require_finite("", good, never, never, good[1], None, None, updated=good[1], alpha=1.0) is None
    with pytest.raises(FloatingPointError, match=r"^i 3: theta\[1\] of shape \(1,\) holds inf after the outer update"):
        require_finite("i 3", good, never, never, good[1], None, None, updated=single(1, np.inf))


def test_a_result_that_only_compiled_is_not_finite_is_told_so():
    support, query = waves()
    for result, what in [
        ((tm.Tensor(np.float32(np.inf)), THETA), "the query loss is not finite"),
        ((tm.Tensor(1.0), [*THETA[:3], THETA[3] * np.nan]), r"meta_grad\[3\] is not finite"),
    ]:
        with pytest.raises(FloatingPointError, match=f"i: {what}, but run again eagerly all is: .* float32's range"):
            require_finite("i", result, tm.meta.maml, mlp_loss, THETA, support, query, **INNER)


def test_a_compiled_function_is_as_good():
    data = curvatures([1, 1, 1, 1], [1, 1, 1, 1e10])
    step = partial(tm.meta.maml, alpha=0.1, steps=4)
    compiled = tm.compile(lambda theta, support, query: step(curved, theta, support, query), tasks=["support", "query"],
                          shards=2)  # fmt: skip
    result = compiled(single(1, 1), data, data)
    with pytest.raises(FloatingPointError, match="i: curved on the support of task 3 is inf at inner step 2, "):
        require_finite("i", result, step, curved, single(1, 1), data, data)


def test_options_and_minibatches_are_looked_at_too():
    support, query = waves()
    noise = [[h.copy() for h in part] for part in ES["noise"]]
    noise[1][2][3, 0, 1, 0, 0] = np.inf
    said = stopped(mlp_loss, THETA, support, query, tm.meta.es_maml, **ES | {"noise": noise})
    assert said.startswith("noise[1][2] is inf at (3, 0, 1, 0, 0): mend it")

    def batch(support, step):
        x, y = support
        return x[:, step : step + 1], y[:, step : step + 1] / (0.0 if step == 1 else 1.0)

    for options in (dict(algorithm=partial(tm.meta.maml, batch=batch)), dict(batch=batch)):  # a partial's options too
        said = stopped(mlp_loss, THETA, support, query, alpha=0.1, steps=3, **options)
        assert said.startswith("the data of the support at inner step 1[1] is ") and "mend `batch`" in said


def test_an_algorithm_that_is_itself_an_argument():
    def any_of(algorithm, loss, theta, support, query, **options):
        return algorithm(loss, theta, support, query, **options)

    data = curvatures([1, 1], [1, 1e38])
    said = stopped(curved, single(9, 9), data, data, partial(any_of, tm.meta.maml, alpha=0.1), steps=1)
    assert said.startswith("curved on the support of task 1 is inf at inner step 0")


def test_trial_steps_of_a_line_search_are_not_blamed():
    """Newton's first trials from the flat end of a bowl overflow, and are not taken."""
    seen = []

    def bowl(phi, data):
        losses = tm.sum(tm.exp(phi[0] * data) - phi[0], axis=1)
        seen.append(np.isfinite(losses.data).all())
        return losses

    data = np.ones((2, 1), np.float32)
    options = {"lam": 1e-3, "alpha": 1.0, "steps": 1, "cg_steps": 2, "report": True}
    options["solve"] = partial(tm.solvers.hessian_free, cg_steps=2, halvings=12)
    result = tm.meta.imaml(bowl, single(-8.0), data, data, **options)
    assert not all(seen) and np.isfinite(result[0].data)
    with pytest.raises(FloatingPointError, match="run again eagerly all is"):
        require_finite("i", (tm.Tensor(np.nan), []), tm.meta.imaml, bowl, single(-8.0), data, data, **options)


def test_a_population_has_several_rows_for_every_task():
    """The loss has no value for members of the second task that lie left of 0."""

    def half(phi, data):
        return tm.mean(tm.where(data > 0, tm.log(phi[0]), phi[0]), axis=1)

    theta, data = single(0.001), np.array([[0.0], [1.0], [0.0]], np.float32)
    noise = tm.meta.draw_es_noise(np.random.default_rng(0), theta, 3, steps=1, perturbations=4, queries=3)
    options = {"alpha": 0.0, "steps": 1, "sigma": 0.1, "noise": noise}
    for algorithm in (tm.meta.es_maml, tm.meta.first_order_es_maml):
        said = stopped(half, theta, data, data, algorithm, **options)
        assert said.startswith("half on the support of task 1 is nan at inner step 0, though φ is finite: the loss has")


def test_what_evolution_strategies_do_not_differentiate_is_not_blamed():
    """√x² has no derivative at θ = 0, where the inner step asks for the loss; their sum overflows elsewhere."""
    steep = lambda phi, data: 3e38 * tm.mean(tm.sqrt((phi[0] - data) ** 2), axis=1)
    theta, support, query = single(0.0), np.zeros((2, 1), np.float32), np.ones((2, 1), np.float32)
    noise = tm.meta.draw_es_noise(np.random.default_rng(0), theta, 2, steps=1, perturbations=4, queries=3)
    noise = noise[0], [np.zeros_like(h) for h in noise[1]]
    options = {"alpha": 0.0, "steps": 1, "sigma": 1e-3, "noise": noise}
    said = stopped(steep, theta, support, query, tm.meta.first_order_es_maml, **options)
    assert said.startswith("the meta-gradient is ") and "in parameter 0 of shape (1,)" in said
