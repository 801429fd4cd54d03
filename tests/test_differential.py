"""tinymeta against two independent oracles, torch and JAX, in float64: torch_oracle and jax_oracle.

Random programs, random convnets, whole meta-gradients and trainings of 100 iterations agree to 1e-9, relative to the
largest entry of each array. JAX's compiler takes a second or more for every new graph, so JAX gets fewer of them.
Long form, hours: `pytest --long -s tests/test_differential.py`; -s shows the number of programs.

Kinks: relu, abs, max and comparisons have no derivative where two values tie, and libraries choose differently. A
program whose results differ is discarded, and counted, if any comparison in it is that close; what tinymeta does there
is pinned by tests of its own (test_ops).
"""

import importlib
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, reject, settings

import tinymeta as tm
from programs import BINARY, MATRIX, PRODUCT, STACKS, UNARY, WITH_AXIS, Program, programs

RTOL = 1e-9
pytestmark = [  # of the oracles themselves, not of what they are asked for
    pytest.mark.filterwarnings(f"ignore::{category}:{package}")
    for category in ("DeprecationWarning", "FutureWarning")
    for package in (r"torch(\.|$)", r"jax(\.|$)", r"jaxlib(\.|$)")
]


@pytest.fixture(params=["torch", "jax"])
def oracle(request):
    pytest.importorskip(request.param)
    module = importlib.import_module(f"{request.param}_oracle")
    with module.running():
        yield module


def compiles(oracle):
    return oracle.__name__ == "jax_oracle"


def error(ours, theirs, noise=0.0):
    """The largest |ours − theirs|, less the noise, relative to the largest entry of theirs unless that is 0."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.float64
    assert np.isfinite(theirs).all() and np.isfinite(ours).all()
    largest = np.max(np.abs(theirs), initial=0.0)
    beyond = np.max(np.abs(ours - theirs), initial=0.0) - noise
    return beyond / largest if beyond > 0 and largest else max(beyond, 0.0)


def assert_agree(ours, theirs, what):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        e = error(a, b)
        assert e <= RTOL, f"{what}, array {i} of shape {np.shape(b)}: {e:.1e} off"


# ---- random programs -------------------------------------------------------------------------------------------------

FORMS = UNARY + WITH_AXIS + BINARY + MATRIX + STACKS + PRODUCT
TIE = 1e-7
LARGE = 1e6  # a program with larger numbers is discarded, and counted
NOISE = 1e-14  # of a program's largest number: what is left where two equal terms cancel


def derivatives(program, xs, u, w):
    """(values, (∂y/∂x)ᵀ u, the vjp of that with w with respect to x and u), and the nodes that the first two are of."""
    xs, u = [tm.Tensor(x) for x in xs], [tm.Tensor(a) for a in u]
    ys = program(*xs)
    first = tm.vjp(ys, xs, u, create_graph=True)
    second = tm.vjp(first, xs + u, w)
    return [[t.data for t in group] for group in (ys, first, second)], tm.tensor.graph(*ys, *first)


def tie(nodes):
    """Does any comparison come within TIE of one?"""
    for z in nodes:
        if z.op in ("less", "less_equal", "greater", "greater_equal"):
            x, y = (t.data for t in z.inputs)
            close = np.any(np.abs(x - y) < TIE)
        elif z.op in ("absolute", "sign"):
            close = np.any(np.abs(z.inputs[0].data) < TIE)
        elif z.op in ("max", "min"):
            near = np.abs(z.inputs[0].data - z.data) < TIE
            close = np.any(near.sum(axis=z.kernel.keywords["axis"]) > 1)
        else:
            continue
        if close:
            return True
    return False


@pytest.mark.parametrize("op", [tm.relu, tm.abs, tm.sign, tm.max, tm.min, lambda x: tm.where(x[0] < x[1], x, 0)])
def test_ties_are_seen(op):
    for x, expected in [([1.0, 0.5, 0.2], False), ([1e-9, 0.0, 1e-9], True)]:
        assert tie(tm.tensor.graph(op(tm.Tensor(x)))) is expected


def compare_program(oracle, program):
    """What became of it: "compared", or the reason why not."""
    rng = np.random.default_rng(len(program.lines))
    shapes = [y.shape for y in program(*map(tm.Tensor, program.xs))]
    u, w = ([rng.standard_normal(shape) for shape in some] for some in (shapes, [x.shape for x in program.xs]))
    ours, nodes = derivatives(program, program.xs, u, w)
    floats = [np.abs(z.data) for z in nodes if z.dtype == np.float64]
    largest = max(np.max(a, initial=0, where=np.isfinite(a)) for a in floats)  # ∞ is a constant of logsumexp
    if largest > LARGE:
        return "too large"
    theirs = oracle.derivatives(program, program.xs, u, w)
    worst = 0
    for a, b in zip(ours, theirs):
        assert len(a) == len(b)
        worst = max([worst, *[error(a_i, b_i, noise=NOISE * largest) for a_i, b_i in zip(a, b)]])
    if worst > RTOL and tie(nodes):
        return "differ at a tie"
    assert worst <= RTOL, f"{worst:.1e} off"
    return "compared"


@pytest.mark.parametrize("form", FORMS)
def test_each_form(oracle, form):
    """Random programs leave some out. The axes are such that going back is not going on."""
    shape = (2, 3, 3) if form in STACKS + PRODUCT else (3, 2) if form in MATRIX else (2, 3, 2)
    program = Program([shape, shape], seed=0)
    fields = {"i": 1, "axes": (0, -1), "k": False, "order": (1, 2, 0), "positions": [2, 2], "last": [1, 0, 1]}
    program.lines = ["v0 = " + form.format(a="x", b="y", shape=shape, **fields), "v1 = tm.sin(v0)"]
    assert compare_program(oracle, program) == "compared"


def test_random_programs(oracle):
    """Values, first derivatives in random directions, and second ones, in the inputs and in the cotangents."""
    tally = dict.fromkeys(["compared", "differ at a tie", "too large"], 0)

    @settings(max_examples=settings().max_examples // (10 if compiles(oracle) else 1))
    @given(programs())
    def compare(program):
        outcome = compare_program(oracle, program)
        tally[outcome] += 1
        if outcome != "compared":
            reject()

    try:
        compare()
    finally:
        print(f"\n{oracle.__name__}, random programs: {tally}")
    assert tally["compared"] > 20 * (tally["differ at a tie"] + tally["too large"])


# ---- convnets --------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    size: int
    stride: int
    padding: object
    filters: int
    norm: bool
    activation: str
    pool: str  # "max", "average" or ""
    pool_size: int
    pool_stride: int


class Convnet(NamedTuple):
    blocks: list
    flatten: bool
    standard: str  # for tm.nn.convnet: "stride" or "pool"


def draw_convnet(rng):
    """A random network, its parameters (tasks, ...), images and labels."""
    tasks, n, channels, ways = rng.integers(1, 4), rng.integers(2, 5), rng.integers(1, 3), rng.integers(2, 5)
    standard = rng.choice(["", "", "stride", "pool"])
    depth = rng.integers(1, 3)
    height, width = rng.integers(7, 10, 2) if depth == 1 else rng.integers(22, 25, 2)  # large enough for any blocks
    blocks, params, c = [], [], channels
    images = rng.standard_normal((tasks, n, height, width, channels))
    for _ in range(depth):
        filters = int(rng.integers(1, 4))
        if standard:
            block = Block(
                3, 1 if standard == "pool" else 2, "same", filters, True, "relu", "max" * (standard == "pool"), 2, 2
            )
        else:
            block = Block(
                size=int(rng.integers(1, 4)), stride=int(rng.integers(1, 3)),
                padding=rng.choice(np.array(["same", "valid", 0, 1, 2], object)), filters=filters,
                norm=bool(rng.integers(2)), activation=str(rng.choice(["relu", "tanh", "softplus"])),
                pool=str(rng.choice(["", "max", "average"])), pool_size=2, pool_stride=int(rng.integers(1, 3)),
            )  # fmt: skip
        blocks.append(block)
        params += [
            rng.standard_normal((tasks, block.size, block.size, c, filters)) / np.sqrt(block.size**2 * c),
            rng.uniform(0.5, 1.5, (tasks, 1, filters)),
            0.3 * rng.standard_normal((tasks, 1, filters)),
        ]
        c = filters
    flatten = bool(rng.integers(2))
    spec = Convnet(blocks, flatten, standard)
    x = tm.Tensor(images[0])
    features = np.shape(features_of(spec, [tm.Tensor(p[0]) for p in params], x).data)[-1]
    params += [
        rng.standard_normal((tasks, features, ways)) / np.sqrt(features),
        0.3 * rng.standard_normal((tasks, 1, ways)),
    ]
    return spec, params, (images, rng.integers(0, ways, (tasks, n)))


ACTIVATION = {"relu": tm.relu, "tanh": tm.tanh, "softplus": tm.softplus}


def features_of(spec, params, x):
    """What reaches the head: (..., n, features)."""
    for block, w, gain, bias in zip(spec.blocks, params[::3], params[1::3], params[2::3]):
        y = tm.conv2d(x, w, block.stride, block.padding)
        rows = tm.reshape(y, (*y.shape[:-4], -1, y.shape[-1]))
        rows = tm.nn.batch_norm(rows, gain, bias) if block.norm else rows * gain + bias
        x = ACTIVATION[block.activation](tm.reshape(rows, y.shape))
        if block.pool:
            pool = {"max": tm.max_pool, "average": tm.average_pool}[block.pool]
            x = pool(x, block.pool_size, block.pool_stride)
    return tm.reshape(x, (*x.shape[:-3], -1)) if spec.flatten else tm.global_average(x)


def logits_of(spec, params, x):
    if spec.standard:
        return tm.nn.convnet(params, x, pool=spec.standard == "pool", flatten=spec.flatten)
    return tm.matmul(features_of(spec, params[:-2], x), params[-2]) + params[-1]


def compare_convnet(oracle, seed):
    rng = np.random.default_rng(seed)
    spec, params, (images, labels) = draw_convnet(rng)
    v = [rng.standard_normal(p.shape) for p in [*params, images]]
    xs = [tm.Tensor(p) for p in [*params, images]]

    def losses(*xs):
        return tm.nn.cross_entropy(logits_of(spec, xs[:-1], xs[-1]), labels)

    def total(*xs):
        return tm.sum(losses(*xs))

    values = [logits_of(spec, xs[:-1], xs[-1]), losses(*xs)]
    ours = [values, tm.grad(total(*xs), xs), tm.hvp(total, xs, v)]
    theirs = oracle.network_derivatives(spec, params, (images, labels), v)
    for what, a, b in zip(["logits and loss", "gradient", "Hessian-vector product"], ours, theirs):
        assert_agree([a_i.data for a_i in a], b, f"seed {seed}: {spec}: {what}")


def test_random_convnets(oracle, long):
    """Logits, cross entropy, gradient and Hessian-vector product, in the parameters and in the images."""
    for seed in range((100 if compiles(oracle) else 1000) if long else (2 if compiles(oracle) else 12)):
        compare_convnet(oracle, seed)


# ---- meta-gradients --------------------------------------------------------------------------------------------------


class MLP(NamedTuple):
    sizes: tuple
    activation: str


SGD = ("sgd", {})
MOMENTUM, NESTEROV = ("momentum", {"mu": 0.8}), ("nesterov", {"mu": 0.8})
ADAM = ("adam", {"beta1": 0.8, "beta2": 0.95, "eps": 1e-2})  # an ε large enough to show where it stands
RULES = [SGD, MOMENTUM, NESTEROV, ADAM]

SMALL = MLP((2, 5, 4, 2), "tanh")
KINKED = MLP((2, 6, 2), "relu")
PIXELS = Convnet(2 * [Block(3, 2, "same", 3, True, "relu", "", 2, 2)], False, "stride")


def rule_of(rule):
    name, options = rule
    return partial(getattr(tm.solvers, name), **options)


def loss_of(spec):
    """loss(params, (x, target)) -> (tasks,)"""
    if isinstance(spec, Convnet):
        return lambda params, data: tm.nn.cross_entropy(logits_of(spec, params, data[0]), data[1])
    activation = ACTIVATION[spec.activation]
    return lambda params, data: tm.nn.mse(tm.nn.mlp(params, data[0], activation), data[1])


def draw_problem(rng, spec, tasks=3, n=4):
    """(theta, support, query), all arrays."""

    def data():
        if isinstance(spec, Convnet):
            return rng.standard_normal((tasks, n, 8, 8, 1)), rng.integers(0, 3, (tasks, n))
        x = rng.standard_normal((tasks, n, spec.sizes[0]))
        return x, rng.standard_normal((tasks, n, spec.sizes[-1]))

    if isinstance(spec, Convnet):
        theta = tm.nn.init_convnet(rng, ways=3, filters=3, blocks=2, scale=1.0, dtype=np.float64)
    else:
        theta = tm.nn.init_mlp(rng, spec.sizes, dtype=np.float64, scale=1.0)
    theta = [t.data + 0.1 * rng.standard_normal(t.shape) for t in theta]  # no two biases equal, none at a kink
    return theta, data(), data()


def gradient_cases():
    """(method, options, rule, network); in the short form JAX has those of SMALL with at most 2 steps."""
    cases = [("maml", {"alpha": 0.1, "steps": steps}, SGD, SMALL) for steps in range(6)]
    cases += [("maml", {"alpha": 0.05, "steps": steps}, rule, SMALL) for steps in (2, 4) for rule in RULES[1:]]
    cases += [("maml", {"alpha": 0.1, "steps": 2}, SGD, KINKED), ("maml", {"alpha": 0.1, "steps": 5}, SGD, PIXELS)]
    cases += [("maml", {"alpha": 0.05, "steps": 2}, rule, PIXELS) for rule in (NESTEROV, ADAM)]
    cases += [
        ("fomaml", {"alpha": 0.1, "steps": steps}, rule, SMALL) for steps, rule in [(2, SGD), (3, MOMENTUM), (3, ADAM)]
    ]
    cases += [("fomaml", {"alpha": 0.1, "steps": 2}, SGD, PIXELS)]
    cases += [("truncated", {"alpha": 0.1, "steps": 2, "last": 1}, rule, SMALL) for rule in (SGD, MOMENTUM)]
    cases += [("truncated", {"alpha": 0.1, "steps": 4, "last": last}, SGD, SMALL) for last in (0, 1, 3, 4)]
    cases += [("truncated", {"alpha": 0.05, "steps": 4, "last": 2}, rule, SMALL) for rule in RULES[1:]]
    cases += [("truncated", {"alpha": 0.1, "steps": 3, "last": 1}, SGD, PIXELS)]
    for first_order in (False, True):
        cases += [("meta_sgd", {"steps": steps, "first_order": first_order}, SGD, SMALL) for steps in (0, 1, 2, 4)]
        cases += [("meta_sgd", {"steps": 3, "first_order": first_order}, rule, SMALL) for rule in (NESTEROV, ADAM)]
        cases += [("meta_sgd", {"steps": 2, "first_order": first_order}, SGD, PIXELS)]
        anil = {"alpha": 0.1, "first_order": first_order}
        cases += [
            ("anil", {**anil, "steps": 2, "head": 2}, SGD, SMALL),
            ("anil", {**anil, "steps": 3, "head": 4}, MOMENTUM, SMALL),
        ]
        cases += [
            ("anil", {**anil, "steps": 3, "head": 6}, SGD, SMALL),
            ("anil", {**anil, "steps": 3, "head": 2}, ADAM, PIXELS),
        ]
    cases += [
        ("reptile", {"alpha": 0.1, "steps": steps}, rule, SMALL)
        for steps, rule in [(1, SGD), (5, SGD), (4, ADAM), (4, NESTEROV)]
    ]
    cases += [("reptile", {"alpha": 0.1, "steps": 3}, SGD, PIXELS)]
    proximal = {"lam": 8.0, "alpha": 0.05, "steps": 2}  # H's eigenvalues go down to −4
    for cg_steps in (None, 0, 1, 3):  # None: to the solution
        cases += [("imaml", {**proximal, "cg_steps": cg_steps}, SGD, SMALL)]
    cases += [("imaml", {**proximal, "lam": [6.0, 8.0, 10.0, 7.0, 9.0, 12.0], "cg_steps": None}, SGD, SMALL)]
    cases += [("imaml", {**proximal, "steps": 5, "cg_steps": None}, rule, SMALL) for rule in RULES[1:]]
    stiff = {"lam": 30.0, "alpha": 0.01, "steps": 5}  # batch norm has negative curvature to outweigh
    cases += [("imaml", {**stiff, "cg_steps": cg_steps}, SGD, PIXELS) for cg_steps in (None, 4)]
    return cases


def case_id(case):
    method, options, (rule, _), spec = case
    return " ".join([method, *[f"{k}={v}" for k, v in options.items()], rule, type(spec).__name__])


def ours(method, spec, theta, support, query, rule, **options):
    if method == "imaml" and options["cg_steps"] is None:
        size = sum(t.size for t in theta)
        options = {**options, "cg_steps": size, "linear_solver": partial(tm.solvers.cg, tol=0)}
    theta = [tm.Tensor(t) for t in theta]
    run = getattr(tm.meta, method)
    query_loss, meta_grad = run(loss_of(spec), theta, support, query, rule=rule_of(rule), **options)
    return [query_loss.data, *[g.data for g in meta_grad]]


@pytest.mark.parametrize("case", gradient_cases(), ids=case_id)
def test_meta_gradients(oracle, case, long):
    method, options, rule, spec = case
    if compiles(oracle) and not long and (options["steps"] > 2 or spec is not SMALL):
        pytest.skip("--long: JAX takes seconds to compile this one")
    for seed in range((3 if compiles(oracle) else 20) if long else 1):
        rng = np.random.default_rng(seed)
        theta, support, query = draw_problem(rng, spec)
        if method == "meta_sgd":
            theta = theta + [rng.uniform(0.02, 0.15, t.shape) for t in theta]
        found = ours(method, spec, theta, support, query, rule, **options)
        expected = oracle.meta_gradient(method, spec, theta, support, query, rule, **options)
        assert_agree(found, expected, f"seed {seed}")


def further_cases():
    """(method, options, rule, network), which torch alone is asked for."""
    cases = []
    for first_order in (False, True):
        for steps, weights in [(1, [1.0]), (3, [0.2, 0.3, 0.5]), (5, [0.0, 0.0, 0.1, 0.1, 0.8])]:
            options = {"steps": steps, "weights": np.array(weights), "first_order": first_order}
            cases += [("maml_plus_plus", options, SGD, SMALL)]
    cases += [("maml_plus_plus", {"steps": 2, "weights": np.array([0.4, 0.6]), "first_order": False}, SGD, PIXELS)]
    for p in (1, 2):
        for loss_coordinate, stabiliser in [(True, True), (True, False), (False, False)]:
            options = {"p": p, "loss_coordinate": loss_coordinate, "stabiliser": stabiliser}
            cases += [("leap", {"alpha": 0.1, "steps": 4, **options}, SGD, SMALL)]
            cases += [("leap", {"alpha": 1.5, "steps": 3, **options}, NESTEROV, SMALL)]  # uphill too
    cases += [("leap", {"alpha": 0.1, "steps": steps, "p": 1, "loss_coordinate": True, "stabiliser": True}, SGD, PIXELS)
              for steps in (0, 3)]  # fmt: skip
    cases += [("dropout", {"alpha": 0.1, "steps": steps}, SGD, SMALL) for steps in (0, 1, 4)]
    cases += [("dropout", {"alpha": 0.05, "steps": 3}, rule, SMALL) for rule in (NESTEROV, ADAM)]
    proximal = {"alpha": 0.05, "steps": 3}
    cases += [("shrinkage", {**proximal, "modules": modules}, SGD, SMALL)
              for modules in ([[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3], [4, 5]], [[4, 0], [1, 2, 3, 5]])]  # fmt: skip
    cases += [("shrinkage", {**proximal, "modules": [[0, 1, 2], [3, 4, 5]]}, rule, SMALL) for rule in (NESTEROV, ADAM)]
    es = {"alpha": 0.05, "sigma": 0.1}
    cases += [("es_maml", {**es, "steps": steps}, None, SMALL) for steps in (0, 1, 3)]
    cases += [("first_order_es_maml", {**es, "steps": steps, "hessian": hessian}, None, SMALL)
              for steps in (0, 1, 3) for hessian in (True, False)]  # fmt: skip
    return cases


def further(method, rng, theta, tasks, rule, options):
    """(theta with what the method adds to it, arguments of both sides, our algorithm, arguments of ours alone)."""
    leaves, steps, ours = [tm.Tensor(t) for t in theta], options["steps"], {"rule": rule and rule_of(rule)}
    if method == "maml_plus_plus":
        return theta + [rng.uniform(0.02, 0.15, steps) for _ in theta], {}, tm.meta.maml_plus_plus, {}
    if method == "dropout":
        noise = tm.meta.draw_noise(rng, leaves, 0.3, tasks=tasks, steps=steps)
        return theta, {"noise": noise}, tm.meta.maml, {"rule": tm.meta.dropout(noise, rule_of(rule))}
    if method == "shrinkage":
        theta = theta + [np.array(-np.log(lam)) for lam in rng.uniform(8, 16, len(options["modules"]))]
        ours |= {"cg_steps": sum(t.size for t in leaves), "linear_solver": partial(tm.solvers.cg, tol=0)}
        return theta, {}, tm.meta.shrinkage, ours
    if method == "leap":
        return theta, {}, tm.meta.leap, ours
    noise = tm.meta.draw_es_noise(rng, leaves, tasks, steps=steps, perturbations=3, queries=4)
    return theta, {"noise": noise}, getattr(tm.meta, method), {"noise": noise}


@pytest.mark.parametrize("case", further_cases(), ids=lambda case: f"{case[0]} {case[1]} {case[2] and case[2][0]}")
def test_further_meta_gradients(case, long):
    pytest.importorskip("torch")
    import torch_oracle

    method, options, rule, spec = case
    for seed in range(20 if long else 1):
        rng = np.random.default_rng(seed)
        theta, support, query = draw_problem(rng, spec)
        theta, shared, algorithm, given = further(method, rng, theta, len(support[0]), rule, options)
        start = [tm.Tensor(t) for t in theta]
        query_loss, meta_grad = algorithm(loss_of(spec), start, support, query, **options, **given)
        with torch_oracle.running():
            expected = torch_oracle.meta_gradient(method, spec, theta, support, query, rule or SGD, **options, **shared)
        assert_agree([query_loss.data, *[g.data for g in meta_grad]], expected, f"seed {seed}")


def compare_hypergradient(oracle, seed):
    """λ: the logarithm of a weight decay for each parameter, and a weight for each column of the targets."""
    rng = np.random.default_rng(seed)
    theta, data, val_data = draw_problem(rng, SMALL)
    w = [t + 0.1 * rng.standard_normal((3, *t.shape)) for t in theta]
    hyper = [rng.uniform(2, 2.5, len(w)), rng.uniform(0.5, 1, 2)]

    def weighted(w, hyper, data):
        return tm.mean(hyper[1] * (tm.nn.mlp(w, data[0], tm.tanh) - data[1]) ** 2, axis=(1, 2))

    def train_loss(w, hyper):
        decay = sum(tm.exp(hyper[0][i]) / 2 * tm.solvers.dot([w_i], [w_i]) for i, w_i in enumerate(w))
        return weighted(w, hyper, data) + decay

    value, found = tm.meta.hypergradient(
        train_loss, lambda w, hyper: weighted(w, hyper, val_data), [tm.Tensor(w_i) for w_i in w],
        [tm.Tensor(h) for h in hyper], steps=sum(t.size for t in theta), linear_solver=partial(tm.solvers.cg, tol=0),
    )  # fmt: skip
    expected = oracle.hypergradient(SMALL, w, hyper, data, val_data)
    assert_agree([value.data, *[h.data for h in found]], expected, f"seed {seed}")


def test_hypergradients(long):
    pytest.importorskip("torch")
    import torch_oracle

    with torch_oracle.running():
        for seed in range(100 if long else 2):
            compare_hypergradient(torch_oracle, seed)


# ---- training --------------------------------------------------------------------------------------------------------

ITERATIONS = 100
OUTER = ("adam", {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-30})  # too small for its place to matter
PLAIN = [OUTER, ("momentum", {"lr": 0.02, "mu": 0.9}), ("nesterov", {"lr": 0.02, "mu": 0.9})]
META = [
    ("maml", {"alpha": 0.1, "steps": 2}),
    ("imaml", {"lam": 8.0, "alpha": 0.05, "steps": 3, "cg_steps": 3}),
]  # fmt: skip


def trained(gradient, theta, batches, outer, how):
    """theta after a step of the rule `outer` along gradient(theta, data), a list, on each of the batches."""
    name, options = outer

    def step(theta, state, data):
        return getattr(tm.solvers, name)(theta, gradient(theta, data), state, **options)

    step = tm.compile(step) if how == "compiled" else step
    theta, state = [tm.Tensor(t) for t in theta], None
    for data in batches:
        theta, state = tm.stop_gradient(step(theta, state, data))
    return [t.data for t in theta]


@pytest.mark.parametrize("optimiser", PLAIN, ids=lambda optimiser: optimiser[0])
def test_training(oracle, optimiser, long):
    """From equal starts by equal minibatches to equal parameters."""

    def gradient(theta, data):
        return tm.grad(loss_of(SMALL)(theta, data), theta)

    for seed in range((3 if compiles(oracle) else 10) if long else 1):
        rng = np.random.default_rng(seed)
        theta, (x, y), _ = draw_problem(rng, SMALL, tasks=ITERATIONS, n=8)
        batches = list(zip(x, y))
        expected = oracle.train(SMALL, theta, batches, optimiser)
        for how in ("eager", "compiled"):
            found = trained(gradient, theta, batches, optimiser, how)
            assert_agree(found, expected, f"seed {seed}, {how}")


@pytest.mark.parametrize("method, options", META, ids=lambda x: x if isinstance(x, str) else "")
def test_meta_training(oracle, method, options, long):
    def gradient(theta, data):
        return getattr(tm.meta, method)(loss_of(SMALL), theta, *data, **options)[1]

    for seed in range((3 if compiles(oracle) else 10) if long else 1):
        rng = np.random.default_rng(seed)
        theta, support, query = draw_problem(rng, SMALL, tasks=2 * ITERATIONS)
        batches = list(
            zip(*[zip(*[a.reshape(ITERATIONS, 2, *a.shape[1:]) for a in data]) for data in (support, query)])
        )
        expected = oracle.meta_train(method, SMALL, theta, batches, SGD, OUTER, **options)
        for how in ("eager", "compiled"):
            assert_agree(trained(gradient, theta, batches, OUTER, how), expected, f"seed {seed}, {how}")
