"""Multi-shot Omniglot: learning an alphabet by many gradient steps, after Flennerhag et al. 2019 (Leap).

A task is an alphabet: 20 of its characters are the classes, 15 drawings of each are there to learn from and 5 to be
judged on. Every image is turned, moved and scaled at random. A convnet learns by SGD on batches of 20 images, drawn
without regard to classes. Leap, Reptile, FO-MAML and MAML find the weights to begin with, from 1 to 25 alphabets;
"none" begins with random ones. 10 other alphabets are the test.

Prints, for each number of training alphabets, the accuracy on held-out drawings after the last step and the area under
the learning curve (AUC: its mean over the steps, by trapezoids), ± one standard deviation over the seeds, beside the
published accuracies, and draws both.

--full is the published protocol, as their workshop paper on WarpGrad (2019) repeats it: turned by any angle, moved by
up to 0.2 of the side, scaled by 0.8 to 1.2; 28 × 28 pixels, four blocks of 64 filters with max pooling; 100 steps of
size 0.1 (in training 5 for MAML), meta-batches of 20 tasks, 1,000 meta-steps of size 0.1 (0.5 for MAML and FO-MAML);
1, 3, 5, 10, 15, 20 and 25 alphabets; 10 seeds.
The default takes minutes, and its figures can be compared with one another only: turned by up to 15 degrees, moved by
up to 0.1; 14 × 14 pixels, 16 filters, stride 2 and no pooling; 25 steps of size 0.5; meta-batches of 5, 150 meta-steps
of sizes chosen on the alphabets that seed 0 leaves over; 1, 5 and 25 alphabets; 3 seeds.

What differs from the paper in both: batch norm takes its statistics from the batch at hand, at test from the 100
held-out drawings of a task, where the authors' keeps running ones; pooling comes last in a block; images are resized
by area averaging; the last θ is tested, not the best on validation alphabets; the query of MAML and FO-MAML is one more
batch. Every seed has its own alphabets, classes and weights.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path

import numpy as np

import tinymeta as tm
from benchmarks import report
from benchmarks.omniglot import load_data
from benchmarks.report import at_least
from tinymeta.tasks import glyphs, omniglot

WAYS, TRAIN_DRAWINGS, BATCH = 20, 15, 20
TEST_ALPHABETS = 10
MOST_ALPHABETS = sum(half.alphabets for half in omniglot.HALVES) - TEST_ALPHABETS
TITLES = {"leap": "Leap", "reptile": "Reptile", "fomaml": "FO-MAML", "maml": "MAML", "none": "random weights"}


@dataclasses.dataclass(frozen=True, eq=False)  # hashed as an object: what is compiled is kept by Settings
class Settings:
    turn: float  # an image by ± this angle, in degrees
    move: float  # by ± this share of its side
    scale: tuple  # by a factor between these
    half: bool  # images of 14 × 14: the mean of every four pixels
    filters: int
    pool: bool  # max pooling, or convolutions with stride 2
    tasks: int  # of a meta-batch
    iterations: int
    steps: int  # of the inner loop, in training and at test
    maml_steps: int
    points: int  # of the learning curve, after the first
    alphabets: tuple
    seeds: int
    alpha: float
    beta: dict  # the outer step of every method, SGD's
    shards: int = 2


FULL = Settings(
    turn=180, move=0.2, scale=(0.8, 1.2), half=False, filters=64, pool=True, tasks=20, iterations=1000, steps=100,
    maml_steps=5, points=100, alphabets=(1, 3, 5, 10, 15, 20, 25), seeds=10, alpha=0.1,
    beta=dict(leap=0.1, reptile=0.1, fomaml=0.5, maml=0.5),
)  # fmt: skip
QUICK = Settings(
    turn=15, move=0.1, scale=(0.8, 1.2), half=True, filters=16, pool=False, tasks=5, iterations=150, steps=25,
    maml_steps=5, points=25, alphabets=(1, 5, 25), seeds=3, alpha=0.5,
    beta=dict(leap=0.3, reptile=1.0, fomaml=0.1, maml=2.0),
)  # fmt: skip

PUBLISHED = {  # accuracy after 100 steps, % and ±, by the number of training alphabets: WarpGrad (2019), Table 2
    "leap": {1: (37.6, 4.8), 3: (53.4, 3.1), 5: (59.5, 3.7), 10: (67.4, 2.4), 15: (70.0, 2.4), 20: (73.3, 2.3),
             25: (74.8, 2.7)},
    "reptile": {1: (40.4, 4.0), 3: (53.1, 4.2), 5: (58.3, 3.3), 10: (65.0, 2.1), 15: (66.6, 2.9), 20: (69.4, 3.4),
                25: (70.8, 1.9)},
    "maml": {1: (40.0, 2.6), 3: (48.6, 2.5), 5: (51.6, 3.8), 10: (54.1, 2.8), 15: (54.8, 3.4), 20: (56.6, 2.0),
             25: (56.7, 2.1)},
    "multi-head tuning": {1: (53.8, 5.0), 3: (64.6, 3.3), 5: (67.7, 2.8), 10: (71.3, 2.0), 15: (73.5, 2.4),
                          20: (75.4, 3.2), 25: (76.4, 2.2)},
}  # fmt: skip

# ---- tasks -----------------------------------------------------------------------------------------------------------


def alphabets(characters, rng):
    """(alphabets, 20, 20, 28, 28) uint8, in random order: 20 random characters of each that has so many."""
    names = characters.alphabets
    sets = [np.flatnonzero(names == name) for name in np.unique(names)]
    chosen = [rng.choice(s, WAYS, replace=False) for s in sets if len(s) >= WAYS]
    return characters.images[np.array(chosen).reshape(-1, WAYS)[rng.permutation(len(chosen))]]


def affine(rng, s, images):
    """Each image turned, moved and scaled at random: (..., 28, 28) uint8 -> (..., 28, 28, 1) float32, ink = 1.

    Every pixel takes the nearest one of the place that it comes from, and paper from beyond the border.
    """
    *stack, side, _ = images.shape
    n = int(np.prod(stack))
    angle = np.deg2rad(rng.uniform(-s.turn, s.turn, n)).astype(np.float32)
    moved = rng.uniform(-s.move * side, s.move * side, (n, 2, 1, 1)).astype(np.float32)
    scale = rng.uniform(*s.scale, n).astype(np.float32)
    down, across = np.cos(angle) / scale, np.sin(angle) / scale
    centred = np.arange(side, dtype=np.float32) - (side - 1) / 2
    y, x = centred[:, None] - moved[:, 0], centred - moved[:, 1]
    down, across = down[:, None, None], across[:, None, None]
    bordered = np.pad(images.reshape(n, side, side), ((0, 0), (1, 1), (1, 1)))
    source = [np.clip(np.rint(v + (side + 1) / 2), 0, side + 1).astype(np.intp)
              for v in (down * y + across * x, down * x - across * y)]  # fmt: skip
    result = bordered[np.arange(n)[:, None, None], source[0], source[1]].astype(np.float32) / 255
    return result.reshape(*stack, side, side, 1)


def batches(rng, s, images, *shape):
    """(images (tasks, *shape, 28, 28, 1), labels (tasks, *shape)): random ones of the training drawings, transformed.

    images: (tasks, 20, 20, 28, 28) uint8.
    """
    tasks = len(images)
    labels = rng.integers(WAYS, size=(tasks, *shape))
    drawings = rng.integers(TRAIN_DRAWINGS, size=labels.shape)
    task = np.arange(tasks).reshape(-1, *[1] * len(shape))
    return affine(rng, s, images[task, labels, drawings]), labels


def held_out(rng, s, images):
    """The other drawings of all classes, transformed: (tasks, 100, 28, 28, 1), labels (tasks, 100)."""
    x = affine(rng, s, images[:, :, TRAIN_DRAWINGS:])
    labels = np.repeat(np.arange(WAYS), x.shape[2])
    return x.reshape(len(x), -1, *x.shape[3:]), np.broadcast_to(labels, (len(x), len(labels)))


def meta_batch(rng, images, tasks):
    """The alphabets of a meta-batch: each as often as the others, give or take once."""
    return images[np.resize(rng.permutation(len(images)), tasks)]


# ---- training --------------------------------------------------------------------------------------------------------


def logits(s, phi, images):
    return tm.nn.convnet(phi, tm.average_pool(images) if s.half else images, pool=s.pool)


def loss_of(s):
    def cross_entropy(phi, data):
        images, labels = data
        return tm.nn.cross_entropy(logits(s, phi, images), labels)

    return cross_entropy


def at_step(support, step):
    return tuple(a[:, step] for a in support)


def inner_steps(s, method):
    return s.maml_steps if method == "maml" else s.steps


def inner(s, method):
    return dict(alpha=s.alpha, steps=inner_steps(s, method), batch=at_step)


@functools.cache
def meta_step(s, method):
    """(θ, support, query) ↦ (query loss, meta-gradient). support: (tasks, steps, 20, ...), a batch for every step."""
    algorithm = getattr(tm.meta, method)

    def step(theta, support, query):
        return algorithm(loss_of(s), theta, support, query, **inner(s, method))

    return tm.compile(step, tasks=["support", "query"], shards=s.shards)


def train(s, method, images, seed):
    """θ, learned from alphabets (n, 20, 20, 28, 28)."""
    theta = tm.nn.init_convnet(np.random.default_rng([seed, 1]), WAYS, s.filters)
    if method == "none":
        return theta
    rng, recent = np.random.default_rng([seed, 2]), []
    note = lambda: f"query loss {np.mean(recent[-20:]):.3f}"
    for i in report.progress(f"{TITLES[method]}, {len(images)} alphabets, seed {seed}", s.iterations, note):
        chosen = meta_batch(rng, images, s.tasks)
        support, query = batches(rng, s, chosen, inner_steps(s, method), BATCH), batches(rng, s, chosen, BATCH)
        result = meta_step(s, method)(theta, support, query)
        updated, _ = tm.stop_gradient(tm.solvers.sgd(theta, result[1], lr=s.beta[method]))
        iteration = getattr(tm.meta, method), loss_of(s), theta, support, query
        tm.meta.require_finite(
            f"{TITLES[method]}, iteration {i}", result, *iteration, updated=updated, **inner(s, method)
        )
        theta = updated
        recent.append(result[0].item())
    return theta


# ---- evaluation ------------------------------------------------------------------------------------------------------


@functools.cache
def learn(s):
    """(φ of every task, batches, images) ↦ (φ some steps later, logits)."""
    loss, steps = loss_of(s), s.steps // s.points

    def some_steps(phi, support, images):
        later = tm.solvers.gradient_descent(lambda phi, k: loss(phi, at_step(support, k)), phi, lr=s.alpha, steps=steps)
        return later, tm.stop_gradient(logits(s, later, images))

    return tm.compile(some_steps, tasks=["phi", "support", "images"], stacked=[0, 1], shards=s.shards)


def learning_curve(s, theta, images, seed):
    """Mean accuracy on held-out drawings of alphabets (n, 20, 20, 28, 28), in %, at points + 1 steps, 0 the first."""
    rng = np.random.default_rng([seed, 3])
    x, labels = held_out(rng, s, images)
    phi = [np.broadcast_to(t.data, (len(images), *t.shape)) for t in theta]
    curve = [logits(s, [tm.Tensor(p) for p in phi], x)]
    for _ in range(s.points):
        phi, y = learn(s)(phi, batches(rng, s, images, s.steps // s.points, BATCH), x)
        curve.append(y)
    return [100 * float((y.data.argmax(axis=-1) == labels).mean()) for y in curve]


def area(curve):
    """The mean of a curve over its steps, by trapezoids."""
    return float((np.sum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1))


def test_and_training(s, characters, seed):
    """Alphabets to test on and to learn from, both (n, 20, 20, 28, 28)."""
    images = alphabets(characters, np.random.default_rng([seed, 0]))
    need = TEST_ALPHABETS + max(s.alphabets)
    if len(images) < need:
        raise ValueError(
            f"{characters.name} has {len(images)} alphabets of {WAYS} characters or more, but {need} are needed:"
            f" {TEST_ALPHABETS} for the test and {max(s.alphabets)} to learn from; lower --alphabets"
        )
    return images[:TEST_ALPHABETS], images[TEST_ALPHABETS:]


def run(s, methods, seeds):
    """{method: {number of training alphabets: [a learning curve for every seed]}}, seeds: (seed, its alphabets).

    A method whose numbers cease to be finite is left out, and said to be; the others' results still count.
    """
    curves = {method: {n: [] for n in s.alphabets} for method in methods}
    for seed, (test, training) in seeds:
        for method in list(curves):
            try:
                for n in s.alphabets:
                    if method == "none" and n > s.alphabets[0]:  # the same, whatever there is to learn from
                        curve = curves[method][s.alphabets[0]][-1]
                    else:
                        curve = learning_curve(s, train(s, method, training[:n], seed), test, seed)
                    curves[method][n].append(curve)
            except FloatingPointError as error:
                print(f"stopped: {error}", file=sys.stderr)
                del curves[method]
    return curves


def summary(curves):
    """Of the curves of all seeds: their mean, and mean and spread of the last accuracy and of the area."""
    last, areas = np.array(curves)[:, -1], np.array([area(c) for c in curves])
    spread = lambda x: float(x.std(ddof=1)) if len(x) > 1 else None
    return {
        "curve": np.mean(curves, axis=0).tolist(),
        "accuracy": {"mean": float(last.mean()), "spread": spread(last), "seeds": last.tolist()},
        "auc": {"mean": float(areas.mean()), "spread": spread(areas), "seeds": areas.tolist()},
    }


# ---- what is shown ---------------------------------------------------------------------------------------------------


def table(s, figures):
    """The figures as text: a line a method, a column a number of training alphabets."""
    for key, title in (("accuracy", f"accuracy after {s.steps} steps, %"), ("auc", "area under the curve, %")):
        yield f"\n{title}, mean ± standard deviation, {s.seeds} seeds, {TEST_ALPHABETS} test alphabets"
        yield f"{'training alphabets':>20}" + "".join(f"{n:>14}" for n in s.alphabets)
        for method, by_number in figures.items():
            cells = [shown(by_number[n][key]["mean"], by_number[n][key]["spread"]) for n in s.alphabets]
            yield f"{TITLES[method]:>20}" + "".join(f"{cell:>14}" for cell in cells)
    yield f"\npublished accuracy after {FULL.steps} steps, % (WarpGrad, 2019, Table 2)"
    for method, values in PUBLISHED.items():
        cells = [shown(*values[n]) if n in values else "" for n in s.alphabets]
        yield f"{TITLES.get(method, method):>20}" + "".join(f"{cell:>14}" for cell in cells)


def shown(mean, spread):
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ±{spread:5.1f}"


def draw(plt, s, figures, data, path):
    """Learning curves from the most training alphabets, and the area under them against the number of alphabets."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    steps = np.linspace(0, s.steps, s.points + 1)
    for method, by_number in figures.items():
        style = dict(label=TITLES[method], **(dict(color="tab:gray", ls=":") if method == "none" else {}))
        left.plot(steps, by_number[s.alphabets[-1]]["curve"], **style)
        areas = [by_number[n]["auc"] for n in s.alphabets]
        spreads = [area["spread"] or 0 for area in areas]
        right.errorbar(s.alphabets, [area["mean"] for area in areas], spreads, marker=".", capsize=3, **style)
    left.set(xlabel="gradient steps", ylabel="accuracy, %")
    left.set_title(f"{data}, {s.alphabets[-1]} training alphabets, mean of {s.seeds} seeds")
    right.set(xlabel="training alphabets", ylabel="area under the curve, %")
    right.set_title(f"mean ± 1 s.d. over {s.seeds} seeds")
    left.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    report.write_picture(path, figure)
    plt.close(figure)


# ---- the command -----------------------------------------------------------------------------------------------------

EXAMPLES = """\
examples, with their time on 2 cores:
  python -m benchmarks.leap                                             all methods, 10 to 20 minutes
  python -m benchmarks.leap --methods leap reptile --alphabets 25       2 minutes
  python -m benchmarks.leap --full --methods leap --seeds 1             the published protocol: days
"""


def main(argv=None):
    parser = report.parser(__doc__, EXAMPLES)
    names = dict(nargs="+", choices=TITLES, default=list(TITLES), metavar="NAME")
    parser.add_argument("--methods", **names, help="some of: " + " ".join(TITLES) + " (default: all)")
    parser.add_argument("--full", action="store_true", help="the published protocol")
    for name, what in (("iterations", "meta-steps"), ("seeds", "from --seed on"), ("steps", "of the inner loop")):
        parser.add_argument(f"--{name}", type=at_least(1), metavar="N", help=f"{what}, instead of the protocol's")
    parser.add_argument("--alphabets", type=at_least(1), nargs="+", metavar="N", help="numbers of training alphabets")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", type=Path, metavar="PATH", help="folder with Omniglot's two zips, or one of the zips")
    data.add_argument("--glyphs", action="store_true", help="the generated characters, even where Omniglot is found")
    parser.add_argument("--download", action="store_true", help="fetch the zips into --data, or else the cache")
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    given = {key: value for key in ("iterations", "seeds", "steps") if (value := getattr(args, key))}
    if args.alphabets:
        given["alphabets"] = tuple(sorted(set(args.alphabets)))
    s = dataclasses.replace(FULL if args.full else QUICK, **given)
    s = dataclasses.replace(s, points=min(s.points, s.steps))
    start = time.perf_counter()
    try:
        if args.seed < 0 or s.steps % s.points:
            raise ValueError(f"--seed must be 0 or more, and --steps a multiple of {s.points}")
        if s.alphabets[-1] > MOST_ALPHABETS:
            raise ValueError(f"--alphabets must be {MOST_ALPHABETS} at most, Omniglot's without {TEST_ALPHABETS}")
        report.require_writable(args.json, args.out / "leap.png")
        characters = load_data(args)
        need = glyphs.ALPHABET * (TEST_ALPHABETS + s.alphabets[-1])
        if characters.name == "glyphs" and len(characters.images) < need:
            characters = glyphs.load(characters=need)
        test_and_training(s, characters, args.seed)  # raises where there are too few alphabets, for any seed
    except (OSError, ValueError, ImportError) as error:
        parser.error(error)
    try:
        seeds = range(args.seed, args.seed + s.seeds)
        curves = run(s, args.methods, ((seed, test_and_training(s, characters, seed)) for seed in seeds))
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")
    if not curves:
        sys.exit(1)
    figures = {method: {n: summary(c) for n, c in by_number.items()} for method, by_number in curves.items()}
    print(f"data: {characters.name}", *table(s, figures), sep="\n")
    seconds = time.perf_counter() - start
    if args.json:
        settings = {"seed": args.seed, "data": characters.name, **dataclasses.asdict(s)}
        report.write_json(args.json, figures, settings, {"total": round(seconds)})
    if plt := report.pyplot():
        draw(plt, s, figures, characters.name, args.out / "leap.png")
        print(f"picture: {args.out / 'leap.png'}")
    print(f"{seconds:.0f} s")
    if len(curves) < len(args.methods):
        sys.exit(1)


if __name__ == "__main__":
    report.command(main)
