"""Sine waves from 5, 10 or 20 points, by MAML and all its relatives, after Finn et al. 2017, section 5.1.

A task is a wave y = A sin(x − b), A ~ U[0.1, 5], b ~ U[0, π]. An MLP 1-40-40-1 sees K of its points, x ~ U[−5, 5], and
takes gradient steps on their squared error. All methods train with K = 10 on fresh tasks, 25 an iteration; two
baselines adapt in the same way, one from random weights, one from weights fitted to all waves at once.

Prints the mean squared error over 600 held-out waves (on 100 points each) after 0 to 10 steps, ± 1.96 standard errors,
beside the published figures, and draws fits and learning curves.
"""

import sys
import time
from collections import deque
from functools import partial

import numpy as np

import tinymeta as tm
from benchmarks import report
from benchmarks.report import at_least, positive
from benchmarks.sinusoid_methods import (
    ALPHAS,
    BASELINES,
    CLASSIC,
    METHODS,
    TASKS,
    TEST_STEPS,
    TRAINING_SHOTS,
    loss,
    method,
)
from tinymeta.tasks import sinusoid

SIZES = (1, 40, 40, 1)
TEST_TASKS, TEST_SHOTS = 600, (5, 10, 20)
GRID = np.linspace(sinusoid.LOW, sinusoid.HIGH, 100, dtype=np.float32)[:, None]
TEST_SEED, VALIDATION_SEED = 1, 2

PICTURES = "sinusoid_steps.png", "sinusoid_fits.png"

CG_TROUBLE = "negative_curvature", "unconverged"

COLUMNS = (0, 1, 5, 10)  # the numbers of steps that the table shows

PUBLISHED = {  # Finn et al. 2017, Table 2: K = 5, after 1, 5 and 10 steps
    "maml": {1: 0.67, 5: 0.38, 10: 0.35},
    "pretrained": {1: 2.41, 5: 2.23, 10: 2.19},
}


# ---- training --------------------------------------------------------------------------------------------------------


def train(name, iterations, first_beta, seed, eager=False, clip=None, inner_clip=None):
    """(θ after that many meta-batches, {trouble that conjugate gradients met, if there were any: its share of tasks}).

    Weights ~ N(0, 1 / inputs). clip, inner_clip: the norms to clip the meta-gradient and each task's inner ones to.
    """
    m = method(name, inner_clip)
    rng = np.random.default_rng([seed, 0])
    theta, state = m.start(tm.nn.init_mlp(rng, SIZES, scale=1.0)), None
    options = m.inner | ({"report": True} if "cg_steps" in m.inner else {})

    def iteration(theta, state, support, query, drawn, beta):
        query_loss, meta_grad, *cg = m.algorithm(loss, theta, support, query, **options, **drawn)
        direction = tm.solvers.clip(meta_grad, clip) if clip else meta_grad
        theta, state = tm.stop_gradient(m.outer(theta, direction, state, lr=beta))
        shares = [tm.mean(getattr(s, what).astype(query_loss.dtype)) for s in cg for what in CG_TROUBLE]
        return theta, state, query_loss, meta_grad, shares

    if not eager:
        iteration = tm.compile(iteration)
    recent, shares = deque(maxlen=200), []  # query losses of the last iterations; shares of tasks in all of them
    beta = first_beta

    def note():
        trouble = "".join(f", {what.replace('_', ' ')} in {x:.1%}" for what, x in summary(shares[-200:]).items())
        trouble += " of tasks" if trouble else ""
        return f"query loss {np.mean(recent):.3f}, outer step {beta:.2g}{trouble}"

    for i in report.progress(m.title, iterations, note):
        support, query = sinusoid.training_batch(rng, TASKS, TRAINING_SHOTS)
        beta = np.array(first_beta * schedule(m.outer, i / iterations), np.float32)
        drawn = m.draw(rng, theta, i / iterations) if m.draw else {}
        updated, state, *result, troubled = iteration(theta, state, support, query, drawn, beta)
        again = m.algorithm, loss, theta, support, query
        tm.meta.require_finite(f"{m.title}, iteration {i}", result, *again, updated=updated, **options, **drawn)
        theta = updated
        recent.append(result[0].item())
        shares.append([x.item() for x in troubled])
    return theta, summary(shares)


def summary(shares):
    return dict(zip(CG_TROUBLE, np.mean(shares, axis=0).tolist())) if any(shares) else {}


def schedule(outer, done):
    return (1 + np.cos(np.pi * done)) / 2 if outer is tm.solvers.adam else 1 - done


# ---- evaluation ------------------------------------------------------------------------------------------------------


def adapted(name, theta, support, steps, alpha, inner_clip=None):
    """φ of every task, found as the method finds it in training."""
    m = method(name, inner_clip)
    objective, weights, options = m.at_test(theta, alpha, m.inner)
    return tm.meta.adapt(objective, weights, support, steps=steps, **options)


def errors(name, theta, waves, support, alpha, steps=range(TEST_STEPS + 1), inner_clip=None):
    """Squared error on the grid of every task after each number of steps: (len(steps), tasks)."""
    x = np.broadcast_to(GRID, (len(waves.amplitude), *GRID.shape))
    phis = (adapted(name, theta, support, k, alpha, inner_clip) for k in steps)
    return np.array([loss(phi, (x, waves(x))).data for phi in phis], np.float64)


def tuned_alpha(name, theta, inner_clip=None):
    """The inner step of a baseline: the best mean error at K = 5 after 10 steps on validation tasks."""
    tasks = sinusoid.test_tasks(VALIDATION_SEED, 200, 5)
    with np.errstate(over="ignore", invalid="ignore"):  # steps that are too large diverge
        last = {"steps": [TEST_STEPS], "inner_clip": inner_clip}
        scores = [errors(name, theta, *tasks, alpha, **last).mean() for alpha in ALPHAS]
    return ALPHAS[int(np.argmin(np.nan_to_num(scores, nan=np.inf)))]


def evaluate(name, theta, alpha, tasks=TEST_TASKS, inner_clip=None):
    """By K: mean, ±, median and largest error after 0 ... 10 steps; share of tasks that end worse than they began."""
    result = {}
    for shots in TEST_SHOTS:
        e = errors(name, theta, *sinusoid.test_tasks(TEST_SEED, tasks, shots), alpha, inner_clip=inner_clip)
        result[shots] = {
            "mean": e.mean(1).tolist(),
            "half_width": (1.96 * e.std(1) / np.sqrt(tasks)).tolist(),
            "median": np.median(e, 1).tolist(),
            "largest": e.max(1).tolist(),
            "worse": float((e[-1] > e[0]).mean()),
            "tasks": tasks,
        }
    return result


def table(results):
    """The figures as text, with the published ones beside K = 5."""
    lines = []
    for shots in TEST_SHOTS:
        tasks = next(iter(results.values()))[shots]["tasks"]
        columns = "".join(f"{f'after {k}':>15}" for k in COLUMNS)
        lines.append(f"\nK = {shots}: mean squared error ± 95 %, {tasks} test tasks")
        lines.append(f"{'gradient steps':>14} {columns}   median@10  largest@10  worse")
        for name, result in results.items():
            r = result[shots]
            cells = "".join(f"{r['mean'][k]:8.3f} ±{r['half_width'][k]:5.3f}" for k in COLUMNS)
            last = f"{r['median'][10]:9.3f}  {r['largest'][10]:10.2f}  {r['worse']:5.1%}"
            lines.append(f"{METHODS[name].title:>14} {cells}   {last}")
            if shots == 5 and name in PUBLISHED:
                cells = "".join(f"{PUBLISHED[name].get(k, ''):>15}" for k in COLUMNS)
                lines.append(f"{'published':>14} {cells}")
    lines.append("\nworse: share of tasks whose error after 10 steps is larger than before the first")
    return "\n".join(lines)


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw_fits(plt, thetas, alphas, path, inner_clip=None):
    """Truth, the K points, and the fit before and after 1 and 10 steps: a column a method, a row a kind of support."""
    fits = [
        (0, "before", dict(color="tab:gray", ls=":")),
        (1, "after 1 step", dict(color="tab:orange", ls="--")),
        (10, "after 10 steps", dict(color="tab:blue")),
    ]
    rows = [("K = 5", 5, sinusoid.HIGH), ("K = 10", 10, sinusoid.HIGH), ("K = 10, left half only", 10, 0.0)]
    size = 2.6 * len(thetas), 6.4
    figure, axes = plt.subplots(len(rows), len(thetas), figsize=size, sharex=True, sharey=True, squeeze=False)
    for row, (title, shots, high) in zip(axes, rows):
        waves, support = sinusoid.test_tasks(4, 1, shots, high=high)
        for axis, (name, theta) in zip(row, thetas.items()):
            axis.plot(GRID, waves(GRID)[0], color="black", lw=1, label="truth")
            for steps, label, style in fits:
                phi = adapted(name, theta, support, steps, alphas[name], inner_clip)
                axis.plot(GRID, tm.nn.mlp(phi, GRID[None]).data[0], lw=1.4, label=label, **style)
            axis.plot(support[0][0], support[1][0], "^", color="tab:red", ms=5, label="the K points")
            axis.set_ylim(-5.6, 5.6)
        row[0].set_ylabel(title)
    for axis, name in zip(axes[0], thetas):
        axis.set_title(METHODS[name].title)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    report.write_picture(path, figure)
    plt.close(figure)


def draw_curves(plt, results, path):
    """Error against gradient steps."""
    figure, axes = plt.subplots(1, len(TEST_SHOTS), figsize=(10.5, max(3.6, 0.25 * len(results))), sharey=True)
    for axis, shots in zip(axes, TEST_SHOTS):
        axis.set_prop_cycle(color=plt.get_cmap("tab10" if len(results) <= 10 else "tab20").colors)
        for name, result in results.items():
            mean, half = (np.array(result[shots][key]) for key in ("mean", "half_width"))
            (line,) = axis.plot(mean, marker=".", ms=4, label=METHODS[name].title)
            axis.fill_between(range(len(mean)), mean - half, mean + half, color=line.get_color(), alpha=0.2, lw=0)
            if shots == 5 and name in PUBLISHED:
                label = f"{METHODS[name].title}, published"
                axis.plot(*zip(*PUBLISHED[name].items()), "x", color=line.get_color(), label=label)
        axis.set(title=f"K = {shots}", xlabel="gradient steps", yscale="log", xticks=range(0, TEST_STEPS + 1, 2))
    axes[0].set_ylabel("mean squared error, 600 tasks")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.83, 1))
    report.write_picture(path, figure)
    plt.close(figure)


def describe(value):
    """A function's name, of a partial with the arguments; a number as it is."""
    if isinstance(value, partial):
        return f"{value.func.__name__}({', '.join(f'{key}={describe(v)}' for key, v in value.keywords.items())})"
    return value.__name__ if callable(value) else value


# ---- the command -----------------------------------------------------------------------------------------------------

EXAMPLES = """\
examples, with their time on 2 cores:
  python -m benchmarks.sinusoid                                    four algorithms and baselines, under 2 minutes
  python -m benchmarks.sinusoid --methods maml pretrained          1 minute
  python -m benchmarks.sinusoid --full --json sinusoid.json        the published training, about 10 minutes
  python -m benchmarks.sinusoid --methods all --iterations 5000    the whole family, 5,000 iterations each, 13 minutes
"""


def main(argv=None):
    parser = report.parser(__doc__, EXAMPLES)
    methods = dict(nargs="+", choices=[*METHODS, "all"], default=CLASSIC, metavar="NAME")
    listed = f"all, or some of: {' '.join(METHODS)} (default: {' '.join(CLASSIC)})"
    parser.add_argument("--methods", **methods, help=listed)
    parser.add_argument("--eager", action="store_true", help="without tm.compile: the same numbers, more slowly")
    for option, what in (("clip", "the meta-gradient"), ("inner-clip", "each task's inner gradient")):
        parser.add_argument(f"--{option}", type=positive, metavar="NORM", help=f"clip {what} to this norm")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--full", action="store_true", help="the published 70,000 iterations; 4,000 for iMAML")
    budget.add_argument("--iterations", type=at_least(0), metavar="N", help="N for every method (default: by cost)")
    args = report.parse(parser, argv, *PICTURES)
    args.methods = list(METHODS if "all" in args.methods else dict.fromkeys(args.methods))
    try:
        for name in args.methods:
            method(name, args.inner_clip)
    except ValueError as error:
        parser.error(error)
    start = time.perf_counter()
    thetas, alphas, results, settings = {}, {}, {}, {}
    for name in args.methods:
        m = method(name, args.inner_clip)
        iterations, beta = m.full if args.full else m.budget
        if args.iterations is not None and name != "random":
            iterations = args.iterations
        try:
            theta, shares = train(name, iterations, beta, args.seed, args.eager, args.clip, args.inner_clip)
        except FloatingPointError as error:  # the other methods' results still count
            print(f"stopped: {error}", file=sys.stderr)
            continue
        thetas[name] = theta
        inner_clip = {"inner_clip": args.inner_clip}
        alphas[name] = tuned_alpha(name, theta, **inner_clip) if name in BASELINES else m.inner.get("alpha")
        results[name] = evaluate(name, theta, alphas[name], **inner_clip) | shares
        inner = {key: describe(value) for key, value in m.inner.items()}
        outer = {"outer": m.outer.__name__, "beta": beta, "iterations": iterations, "test_alpha": alphas[name]}
        clips = {key: value for key, value in (("clip", args.clip), ("inner_clip", args.inner_clip)) if value}
        settings[name] = {"algorithm": m.algorithm.__name__, **inner, **outer, **clips}
    if not results:
        sys.exit(1)
    print(table(results))
    seconds = time.perf_counter() - start
    if args.json:
        report.write_json(args.json, results, {"seed": args.seed, **settings}, {"total": round(seconds)})
    plt = report.pyplot()
    if plt:
        draw_curves(plt, results, args.out / PICTURES[0])
        if len(thetas) <= len(CLASSIC):  # no room for more columns
            draw_fits(plt, thetas, alphas, args.out / PICTURES[1], args.inner_clip)
        print(f"pictures: {', '.join(map(str, sorted(args.out.glob('sinusoid_*.png'))))}")
    print(f"{seconds:.0f} s")
    if len(results) < len(args.methods):
        sys.exit(1)


if __name__ == "__main__":
    report.command(main)
