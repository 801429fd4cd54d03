"""What a meta-gradient costs: compute, memory and time against inner steps, after iMAML (Rajeswaran et al. 2019).

Two measurements. The first repeats their Figure 2b: a convnet of four layers of 64 filters, 20-way 5-shot, with images
drawn by a program, since only the cost counts; one task.

    compute   floating-point operations of all matrix products in the graph, over those of one gradient of the loss
    memory    the peak of what an eager call allocates (tracemalloc), and the buffers of the compiled plan, exactly
    time      of an eager call, median over rounds; in each round all have their turn, so that none has the quiet hours

MAML keeps the graph of every step; truncated back-propagation (Shaban et al. 2019) that of the last 4; FO-MAML and
Reptile one; iMAML one and its Hessian-vector products. MAML walks back through each step, iMAML a fixed number of times
through the last point: beyond some number of steps iMAML takes less time too, and the table says from where.

The second is their complexity table, on quadratic inner problems G = L̂ + λ/2 ‖φ − θ‖² of condition number κ, solved to
δ, or in the case of truncation back-propagated to ε:

    algorithm                        gradients and products    memory / Mem(∇L̂)    error of the meta-gradient
    MAML, gradient descent           κ log(D/δ)                κ log(D/δ)           0 for its own φ
    MAML, Nesterov's method          √κ log(D/δ)               √κ log(D/δ)          0 for its own φ
    truncated, gradient descent      κ log(D/δ)                κ log(1/ε)           ε for its own φ
    iMAML, Nesterov's method         √κ log(D/δ)               1                    δ for the solution φ*

D is the distance of θ from the solution. What is measured is the error against the exact ∇F, for all four.

Takes 3 to 5 minutes on 2 idle cores and up to 3 GB; --quick, a small network and no more than a trial, 20 seconds.
"""

import gc
import time
import tracemalloc
from functools import partial
from typing import NamedTuple

import numpy as np

import tinymeta as tm
from benchmarks import report
from benchmarks.report import at_least
from tinymeta.program import PASSES, Plan, Program, flatten
from tinymeta.tasks import episodes, glyphs

LAST = 4  # steps that truncated back-propagation differentiates
ALPHA, LAM = 0.1, 2.0  # cost does not depend on them
METHODS = {  # title, algorithm, options by number of inner steps
    "maml": ("MAML", tm.meta.maml, lambda steps: {}),
    "truncated": (f"last {LAST} steps", tm.meta.truncated, lambda steps: {"last": min(LAST, steps)}),
    "fomaml": ("FO-MAML", tm.meta.fomaml, lambda steps: {}),
    "reptile": ("Reptile", tm.meta.reptile, lambda steps: {}),
} | {
    f"imaml{cg}": (f"iMAML, CG {cg}", tm.meta.imaml, lambda steps, cg=cg: dict(lam=LAM, cg_steps=cg, report=True))
    for cg in (2, 5, 10)
}  # fmt: skip


class Setting(NamedTuple):
    steps: tuple
    filters: int
    ways: int
    shots: int
    kappas: tuple


FIGURE = Setting((1, 2, 5, 8, 10, 12, 16), 64, 20, 5, (10, 30, 100, 300))
QUICK = Setting((1, 2, 5), 8, 5, 1, (10, 100))

# Rajeswaran et al. 2019, Figure 2b, digitised (± 0.01): memory as a share of their GPU's, and seconds an iteration.
PUBLISHED_MEMORY = {
    "maml": {1: 0.11, 2: 0.165, 5: 0.29, 8: 0.47, 10: 0.59, 12: 0.715, 16: 0.965},
    "fomaml": dict.fromkeys(FIGURE.steps, 0.08),
    **{f"imaml{cg}": dict.fromkeys(FIGURE.steps, 0.11) for cg in (2, 5, 10)},
}
PUBLISHED_SECONDS = {
    name: dict(zip((1, 2, 5, 10, 16), seconds))
    for name, seconds in {
        "maml": (0.12, 0.145, 0.22, 0.34, 0.505),
        "fomaml": (0.117, 0.12, 0.133, 0.142, 0.16),
        "imaml2": (0.21, 0.213, 0.227, 0.25, 0.288),
        "imaml5": (0.245, 0.257, 0.275, 0.30, 0.345),
        "imaml10": (0.32, 0.332, 0.338, 0.37, 0.413),
    }.items()
}

# ---- what a call costs -----------------------------------------------------------------------------------------------


def trace(f, *args):
    """(operations of all matrix products that f makes, 2 n k m each; bytes of the buffers of its compiled plan)."""
    tree, xs = flatten((args, {}))
    program = Program(f, tree, [x.data for x in xs])
    operations = sum(2 * n.inputs[0].shape[-1] * int(np.prod(n.shape)) for n in program.nodes if n.op == "matmul")
    for optimise in PASSES:
        optimise(program)
    return operations, sum(buffer.nbytes for buffer in Plan(program).buffers)


def peak(f, *args):
    """Bytes allocated at the worst moment of f(*args), beyond what there was before."""
    gc.collect()  # or it might come in the middle and hide some
    tracemalloc.start()
    try:
        f(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- Figure 2b -------------------------------------------------------------------------------------------------------


def cross_entropy(phi, data):
    images, labels = data
    return tm.nn.cross_entropy(tm.nn.convnet(phi, images), labels)


def measure(setting, rounds, seed):
    """{method: {"compute": [..], "peak": [..], "buffers": [..], "seconds": [..]}}, an entry per number of steps."""
    rng = np.random.default_rng(seed)
    characters = glyphs.load(seed, glyphs.ALPHABET)
    support, query = episodes.draw_episodes(rng, characters, 1, setting.ways, setting.shots, setting.shots)
    theta = tm.nn.init_convnet(rng, setting.ways, setting.filters)
    args = theta, support, query

    def gradient(theta, support, query):
        return tm.grad(tm.sum(cross_entropy(theta, support)), theta)

    def meta_gradient(name, steps):
        _, algorithm, options = METHODS[name]
        return lambda *args: algorithm(cross_entropy, *args, alpha=ALPHA, steps=steps, **options(steps))[:2]

    unit, _ = trace(gradient, *args)
    calls = {(name, steps): meta_gradient(name, steps) for name in METHODS for steps in setting.steps}
    cost = {what: {} for what in ("compute", "peak", "buffers", "seconds")}
    for _, (key, f) in zip(report.progress("compute and memory", len(calls), lambda: "calls"), calls.items()):
        operations, cost["buffers"][key] = trace(f, *args)
        cost["compute"][key], cost["peak"][key] = operations / unit, peak(f, *args)
    for _ in report.progress("time", rounds, lambda: "rounds"):
        for key, f in calls.items():
            start = time.perf_counter()
            f(*args)
            cost["seconds"].setdefault(key, []).append(time.perf_counter() - start)
    cost["seconds"] = {key: float(np.median(seconds)) for key, seconds in cost["seconds"].items()}
    return {name: {w: [c[name, k] for k in setting.steps] for w, c in cost.items()} for name in METHODS}


def crossing(steps, rising, other):
    """Where `rising` overtakes `other` for good, interpolated between the numbers of steps; None if it does not."""
    d = np.subtract(rising, other)
    below = np.flatnonzero(d < 0)
    if not len(below) or below[-1] == len(d) - 1:
        return None
    i = below[-1]
    return float(steps[i] + (steps[i + 1] - steps[i]) * d[i] / (d[i] - d[i + 1]))


def crossings(steps, costs):
    """{iMAML: {"seconds", "compute", "peak", "published": inner steps from which MAML costs more}}"""
    result = {}
    for name in (n for n in costs if n.startswith("imaml")):
        result[name] = {w: crossing(steps, costs["maml"][w], costs[name][w]) for w in ("seconds", "compute", "peak")}
        known = PUBLISHED_SECONDS["maml"]
        result[name]["published"] = crossing(list(known), list(known.values()), list(PUBLISHED_SECONDS[name].values()))
    return result


# ---- the complexity table --------------------------------------------------------------------------------------------

FEATURES = 2000  # enough that arrays, not Python's objects, make up the memory
D_DELTA, ONE_EPS = 1e4, 1e2  # D/δ and 1/ε
TABLE = {  # title, exponents of κ that the table claims: of gradients and products, and of memory
    "gd": ("MAML, GD", 1, 1),
    "nesterov": ("MAML, Nesterov", 0.5, 0.5),
    "truncated": ("truncated, GD", 1, 1),
    "imaml": ("iMAML, Nesterov", 0.5, 0),
}


def quadratic(phi, data):
    """½ Σ a (φ − c)²: one loss per task."""
    a, centre = data
    away = phi[0] - centre
    return 0.5 * tm.sum(a * away * away, axis=1)


def inner_solver(name, kappa):
    """α and rule that contract fastest where the curvature of G lies in [1, κ] (Nesterov 2004, section 2.2)."""
    if name in ("gd", "truncated"):
        return 2 / (kappa + 1), tm.solvers.sgd
    root = np.sqrt(kappa)
    return 1 / kappa, partial(tm.solvers.nesterov, mu=(root - 1) / (root + 1))


def steps_to(name, kappa, g, theta, support, solution, factor):
    """Inner steps until ‖φ − φ*‖ ≤ ‖θ − φ*‖ / factor."""
    alpha, rule = inner_solver(name, kappa)
    phi, state, steps = [t[None] for t in theta], None, 0
    enough = np.linalg.norm(theta[0].data - solution) / factor
    while np.linalg.norm(phi[0].data - solution) > enough:
        phi, state = tm.stop_gradient(rule(phi, tm.grad(tm.sum(g(phi, support)), phi), state, lr=alpha))
        steps += 1
    return steps


def on_quadratic(kappa, seed):
    """{algorithm: {"gradients", "products", "memory" in Mem(∇L̂), "error"}}; error relative to the exact ∇F."""
    rng = np.random.default_rng(seed)
    lam = 1.0
    a = np.geomspace(1, kappa, FEATURES)[None] - lam  # G's curvature a + λ lies in [1, κ]
    support, query = (a, rng.standard_normal(a.shape)), (np.ones_like(a), rng.standard_normal(a.shape))
    theta = [tm.Tensor(rng.standard_normal(FEATURES))]
    g = tm.meta.proximal(quadratic, theta, lam)
    solution = (a * support[1] + lam * theta[0].data) / (a + lam)
    exact = (lam / (a + lam) * (solution - query[1]))[0]

    def unrolled(name, steps, last):
        """∇ of the query loss through the last steps; through all of them, it is MAML's on G."""
        alpha, rule = inner_solver(name, kappa)
        first = dict(alpha=alpha, steps=steps - last, rule=rule, create_graph=last == steps)
        phi = tm.meta.adapt(g, theta, support, **first)
        phi = tm.solvers.gradient_descent(
            lambda phi, step: g(phi, support), phi, lr=alpha, steps=last, rule=rule, create_graph=True
        )
        return tm.grad(tm.mean(quadratic(phi, query)), theta)

    def implicit(steps, cg_steps):
        alpha, rule = inner_solver("imaml", kappa)
        phi = tm.meta.adapt(g, theta, support, alpha=alpha, steps=steps, rule=rule)
        to_delta = partial(tm.solvers.cg, tol=1 / D_DELTA)
        options = dict(lam=lam, cg_steps=cg_steps, linear_solver=to_delta, report=True)
        _, meta_grad, cg = tm.meta.implicit_gradient(quadratic, phi, support, query, **options)
        return meta_grad, cg.iterations.data[0]

    mem_gradient = peak(lambda: tm.grad(tm.sum(quadratic([theta[0][None]], support)), theta))
    result = {}
    for name in TABLE:
        steps = steps_to(name, kappa, g, theta, support, solution, D_DELTA)
        if name == "imaml":
            products = int(implicit(steps, steps)[1]) + 1  # and one for the first residual
            f = lambda steps=steps, products=products: implicit(steps, products - 1)[0]
        else:
            contraction = (kappa - 1) / (kappa + 1)  # of the slowest mode, in a step of gradient descent
            products = int(np.ceil(-np.log(ONE_EPS) / np.log(contraction))) if name == "truncated" else steps
            f = partial(unrolled, name, steps, products)
        error = np.linalg.norm(f()[0].data - exact) / np.linalg.norm(exact)
        memory = peak(f) / mem_gradient
        result[name] = {"gradients": steps, "products": products, "memory": memory, "error": float(error)}
    return result


def exponents(by_kappa):
    """{algorithm: slopes of log(gradients + products) and of log(memory) against log κ}"""
    result = {}
    for name in TABLE:
        rows = [row[name] for row in by_kappa.values()]
        evaluations, memory = [r["gradients"] + r["products"] for r in rows], [r["memory"] for r in rows]
        slope = lambda y: float(np.polyfit(np.log(list(by_kappa)), np.log(y), 1)[0])
        result[name] = slope(evaluations), slope(memory)
    return result


# ---- tables and picture ----------------------------------------------------------------------------------------------


def figure_tables(setting, costs):
    columns = [
        ("compute: matrix products, in gradients of the loss", "compute", "{:.2f}", None),
        ("peak memory of an eager call, MB; published: share of a GPU's", "peak", "{:.1f}", PUBLISHED_MEMORY),
        ("buffers of the compiled plan, MB", "buffers", "{:.1f}", None),
        ("seconds of an eager call; published: an iteration on a GPU", "seconds", "{:.3f}", PUBLISHED_SECONDS),
    ]
    lines = []
    for title, what, cell, published in columns:
        lines += ["", title, f"{'inner steps':>14}" + "".join(f"{k:>9}" for k in setting.steps) + "   slope"]
        for name, cost in costs.items():
            values = np.array(cost[what]) / (1e6 if what in ("peak", "buffers") else 1)
            cells = "".join(f"{cell.format(v):>9}" for v in values)
            slope = cell.format(np.polyfit(setting.steps, values, 1)[0])
            lines.append(f"{METHODS[name][0]:>14}{cells}{slope:>8}")
            if published and name in published and setting is FIGURE:
                cells = "".join(f"{published[name].get(k, ''):>9}" for k in setting.steps)
                lines.append(f"{'published':>14}{cells}")
    lines += ["", "inner steps from which MAML costs more than iMAML"]
    lines.append(f"{'':>14}{'time':>9}{'published':>11}{'compute':>9}{'memory':>9}")
    for name, crossed in crossings(setting.steps, costs).items():
        cells = [f"{crossed[w]:.1f}" if crossed[w] else "-" for w in ("seconds", "published", "compute", "peak")]
        lines.append(f"{METHODS[name][0]:>14}{cells[0]:>9}{cells[1]:>11}{cells[2]:>9}{cells[3]:>9}")
    return "\n".join(lines[1:])


def complexity_table(by_kappa):
    lines = [f"quadratic inner problems solved to D/δ = {D_DELTA:g}, truncated at 1/ε = {ONE_EPS:g}"]
    lines.append(
        "gradients + Hessian-vector products, peak memory in Mem(∇L̂), relative error of ∇F; last: the exponents"
    )
    lines.append(f"{'κ':>7}" + "".join(f"{title:>30}" for title, *_ in TABLE.values()))
    for kappa, row in by_kappa.items():
        cells = [(f"{r['gradients']} + {r['products']}", f"{r['memory']:.0f}", f"{r['error']:.0e}")
                 for r in row.values()]  # fmt: skip
        lines.append(f"{kappa:>7}" + "".join(f"{a:>16}{b:>7}{c:>7}" for a, b, c in cells))
    measured = exponents(by_kappa)
    lines.append(f"{'κ^':>7}" + "".join(f"{e:>16.2f}{m:>7.2f}{'':>7}" for e, m in measured.values()))
    lines.append(f"{'paper':>7}" + "".join(f"{e:>16}{m:>7}{'':>7}" for _, e, m in TABLE.values()))
    return "\n".join(lines)


def draw(plt, setting, costs, path):
    """Memory and time against inner steps; the published curves scaled to MAML's at the largest number of steps."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    megabytes, middle = 1e6, np.mean(setting.steps)
    panels = [
        ("memory grows with the steps gone back through", "peak memory, MB", "peak", megabytes, PUBLISHED_MEMORY),
        (
            "time: back through a step costs two more gradients",
            "seconds a meta-gradient",
            "seconds",
            1,
            PUBLISHED_SECONDS,
        ),
    ]
    colours = dict(zip(METHODS, plt.rcParams["axes.prop_cycle"].by_key()["color"]))
    for axis, (title, label, what, unit, published) in zip(axes, panels):
        for name, cost in costs.items():
            axis.plot(
                setting.steps, np.array(cost[what]) / unit, ".-", ms=6, color=colours[name], label=METHODS[name][0]
            )
        if setting is FIGURE:
            scale = costs["maml"][what][-1] / unit / published["maml"][setting.steps[-1]]
            for name in published:
                known = published[name]
                axis.plot(list(known), np.multiply(list(known.values()), scale), "--", color=colours[name], alpha=0.4)
        axis.set(title=title, xlabel="inner steps", ylabel=label, ylim=(0, None), xticks=setting.steps)
    for name, label, above in [("fomaml", "FO-MAML, Reptile", 2), ("imaml10", "iMAML, CG 2, 5 and 10", 7)]:
        if name in costs:  # curves that lie on one another
            place = middle, costs[name]["peak"][-1] / megabytes
            axes[0].annotate(label, place, (0, above), textcoords="offset points", color=colours[name], fontsize=8)
    if setting is FIGURE:
        axes[0].plot([], [], "--", color="black", alpha=0.4, label="published, scaled to\nMAML at 16 steps")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    report.write_picture(path, figure)
    plt.close(figure)


def main(argv=None):
    parser = report.parser(
        __doc__, "Writes complexity.png. Example: python -m benchmarks.complexity --quick   (20 seconds)"
    )
    parser.add_argument("--rounds", type=at_least(1), default=3, metavar="N", help="of time measurements (default 3)")
    parser.add_argument("--quick", action="store_true", help="a trial: 8 filters, 5-way 1-shot, up to 5 steps")
    args = report.parse(parser, argv, "complexity.png")
    start = time.perf_counter()
    setting = QUICK if args.quick else FIGURE
    costs = measure(setting, args.rounds, args.seed)
    by_kappa = {kappa: on_quadratic(kappa, args.seed) for kappa in setting.kappas}
    print(figure_tables(setting, costs), complexity_table(by_kappa), sep="\n\n")
    seconds = time.perf_counter() - start
    if args.json:
        figures = {"convnet": costs, "crossings": crossings(setting.steps, costs), "quadratic": by_kappa,
                   "exponents": exponents(by_kappa)}  # fmt: skip
        settings = {"seed": args.seed, "rounds": args.rounds, "last": LAST, "tasks": 1, **setting._asdict(),
                    "features": FEATURES, "D/delta": D_DELTA, "1/eps": ONE_EPS}  # fmt: skip
        report.write_json(args.json, figures, settings, {"total": round(seconds)})
    plt = report.pyplot()
    if plt:
        draw(plt, setting, costs, args.out / "complexity.png")
        print(f"picture: {args.out / 'complexity.png'}")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    report.command(main)
