"""tinymeta: eager, compiled, and compiled with the tasks split over two threads."""

import contextlib

import tinymeta as tm


def contestants(w):
    return {"tinymeta-eager": (1, 2), "tinymeta-compiled": (1, 2), "tinymeta-sharded": (2,)}


def loss(network):
    if network == "mlp":
        return lambda phi, data: tm.nn.mse(tm.nn.mlp(phi, data[0]), data[1])
    return lambda phi, data: tm.nn.cross_entropy(tm.nn.convnet(phi, data[0]), data[1])


def meta_step(w):
    """The eager function (theta, support, query) -> (query loss, meta_grad) of a workload."""
    algorithm, options = getattr(tm.meta, w.algorithm), dict(alpha=w.alpha, steps=w.steps)
    if w.algorithm == "imaml":
        options |= dict(lam=w.lam, damping=w.damping, cg_steps=w.cg_steps)
    f = loss(w.network)

    def step(theta, support, query):
        return algorithm(f, theta, support, query, **options)

    return step


def compiled(w, shards=1):
    return tm.compile(meta_step(w), tasks=["support", "query"], shards=shards)


def build(name, w):
    f = {
        "tinymeta-eager": meta_step,
        "tinymeta-compiled": compiled,
        "tinymeta-sharded": lambda w: compiled(w, shards=2),
    }[name](w)

    def bind(theta, support, query):
        theta = [tm.Tensor(t) for t in theta]
        return lambda: f(theta, support, query)

    return bind


def to_numpy(name, w, result):
    query_loss, meta_grad = result
    return query_loss.data, [g.data for g in meta_grad]


def threads(n):
    """NumPy's BLAS on n threads; the shards keep it on one by themselves."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return contextlib.nullcontext()
    return ThreadpoolController().limit(limits=n, user_api="blas")
