"""Characters from one or a few examples: MAML and its relatives on Omniglot, after Finn et al. 2017, section 5.2.

A task shows N characters that were never seen in training, K drawings of each. A convnet adapts to those by gradient
steps on their cross-entropy and is judged on other drawings. Training draws fresh tasks from the training characters,
each turned by 0, 90, 180 and 270 degrees as four classes; the θ with the best accuracy on validation characters is
kept; then come the test characters, not turned, in 600 tasks.

Prints the accuracy after 0 ... T steps, ± 1.96 standard errors over tasks, beside that of the untrained network and
the published one, and draws the learning curve, the accuracy over steps, and a task with its predictions.

The inner step α acts on the mean cross-entropy over a task's examples. In Finn et al.'s code it acts on N times that
mean, so that their 0.4 for 5 ways and 0.1 for 20 are both 2.0 here, in --preset papers; with the other presets, MAML
and FO-MAML have 0.4. All settings, and what differs from the papers, stand in benchmarks/omniglot_protocols.py.
"""

import dataclasses
import functools
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import tinymeta as tm
from benchmarks import checkpoint, report
from benchmarks.omniglot_methods import METHODS
from benchmarks.omniglot_pictures import draw_curve, draw_steps, draw_task
from benchmarks.omniglot_protocols import NETWORKS, PRESETS, TITLES, Settings, choose, published
from benchmarks.report import at_least, positive
from tinymeta.tasks import episodes, glyphs, omniglot

SPLIT_SEED = 0  # the same test characters for every --seed
TEST_SEED, VALIDATION_SEED, TRAINING_SEED, WEIGHTS_SEED = 1, 2, 3, 4  # first words of the generators' seeds
VALIDATIONS = 20  # in a training
CURVE = 10  # the accuracy is followed at least so many steps
COLUMNS = (0, 1, 2, 3, 5, 10, 16, 25, 50)  # the steps that the table shows
IMAGES = 500  # evaluated at once: bounds the memory, whatever the number of tasks

# ---- data ------------------------------------------------------------------------------------------------------------


def load_data(args, wanted=None):
    """Characters: Omniglot where it is found, or else the generated ones, which is said. wanted: take only that one."""
    if args.download:
        show = lambda done, total: print(f"\r{done >> 10} KiB ", end="", file=sys.stderr, flush=True)
        folder = omniglot.download(args.data, show if sys.stderr.isatty() else None)
        print(f"Omniglot is in {folder}", file=sys.stderr)
    if args.glyphs or wanted == "glyphs":
        return glyphs.load()
    if wanted is None and omniglot.find(args.data) is None:
        print(
            "data: glyphs, drawn by a program, because Omniglot was not found: --download fetches the real images,"
            " --data PATH or $TINYMETA_DATA says where they are"
        )
        return glyphs.load()
    return omniglot.load(args.data)


def blank():
    """As many characters as Omniglot has, drawn in one pixel: enough to check what settings ask for."""
    n = sum(half.characters for half in omniglot.HALVES)
    images = np.zeros((n, episodes.DRAWERS, 1, 1), np.uint8)
    return episodes.Characters("omniglot", images, np.arange(n).astype(str))


def roles(s, characters):
    """{"train", "validation", "test"} of Characters, once it is clear that the tasks can be drawn from them."""
    train, validation, test = episodes.split(characters, SPLIT_SEED)
    parts = {"train": episodes.with_rotations(train), "validation": validation, "test": test}
    episodes.check_sizes(parts["train"], s.tasks, s.ways, s.training_shots, s.queries)
    drawings, of_a_task = int(np.prod(parts["train"].images.shape[:2])), s.ways * (s.training_shots + s.queries)
    if s.tasks * of_a_task > drawings:
        raise ValueError(
            f"{s.tasks} tasks of {of_a_task} drawings are more than all {drawings} that there are to train on: lower"
            f" --tasks, to {drawings // of_a_task} at most"
        )
    for role in ("validation", "test"):
        episodes.check_sizes(parts[role], 1, s.ways, s.shots, s.test_queries)
    return parts


# ---- training --------------------------------------------------------------------------------------------------------


def initial(s):
    """θ before training."""
    rng = np.random.default_rng([WEIGHTS_SEED, s.seed])
    if s.network == "dense":
        weights = tm.nn.init_dense(rng, s.ways, scale=s.scale)
    else:
        head_features = 4 * s.filters if s.flatten else None
        weights = tm.nn.init_convnet(rng, s.ways, s.filters, head_features=head_features, scale=s.scale)
    return METHODS[s.method].start(s, weights)


def logits(s, phi, images):
    if s.network == "dense":
        return tm.nn.dense(phi, tm.reshape(images, (*images.shape[:-3], -1)))
    return tm.nn.convnet(phi, images, flatten=s.flatten)


def loss_of(s):
    def cross_entropy(phi, data):
        images, labels = data
        return tm.nn.cross_entropy(logits(s, phi, images), labels)

    return cross_entropy


@functools.cache
def meta_step(s, eager):
    """(θ, support, query, noise, schedule) ↦ (query loss, meta-gradient), and how conjugate gradients went, if any."""
    m = METHODS[s.method]

    def step(theta, support, query, noise, schedule):
        return m.algorithm(loss_of(s), theta, support, query, **m.options(s), **noise, **schedule)

    if eager:
        return step
    return tm.compile(step, tasks=["support", "query", "noise"], stacked=[2], shards=s.shards)


def outer_step(s, done):
    """β after that share of the training."""
    return s.beta * {"none": 1.0, "linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2}[s.decay]


@dataclasses.dataclass(frozen=True)
class Run:
    """A training after some iterations. Each makes a new one, so that an interrupt at any moment leaves a whole one."""

    iteration: int
    theta: list
    outer: list | None  # the optimiser's state
    best: list  # θ with the best accuracy on validation tasks, the latest among equals
    validations: list  # [iteration, accuracy]
    losses: np.ndarray  # (iterations,): of the query; filled as it goes, as is
    negative: np.ndarray  # (iterations,): iMAML's share of tasks with negative curvature
    unconverged: np.ndarray  # (iterations,): and of those whose system conjugate gradients left unsolved


def begin(s):
    theta = initial(s)
    return Run(0, theta, None, theta, [], *np.zeros((3, s.iterations), np.float32))


def advance(s, run, parts, clock, eager=False):
    """One iteration on. Its tasks and noise depend on (seed, iteration) alone: no generator has a state to be kept."""
    i, m = run.iteration, METHODS[s.method]
    with clock("sampling"):
        rng = np.random.default_rng([TRAINING_SEED, s.seed, i])
        data = episodes.draw_episodes(rng, parts["train"], s.tasks, s.ways, s.training_shots, s.queries)
        noise, schedule = m.noise(s, rng, run.theta), m.schedule(s, i / s.iterations)
    with clock("step"):
        loss, meta_grad, *cg = meta_step(s, eager)(run.theta, *data, noise, schedule)
        direction = tm.solvers.clip(meta_grad, s.clip) if s.clip else meta_grad
        theta, outer = tm.stop_gradient(m.outer(run.theta, direction, run.outer, lr=outer_step(s, i / s.iterations)))
        again = m.algorithm, loss_of(s), run.theta, *data
        options = {**m.options(s), **noise, **schedule}
        when = f"{TITLES[s.method]}, iteration {i}"
        tm.meta.require_finite(when, (loss, meta_grad), *again, updated=theta, **options)
    run.losses[i] = loss.item()
    run.negative[i], run.unconverged[i] = cg_trouble(cg)
    run = dataclasses.replace(run, iteration=i + 1, theta=theta, outer=outer)
    if (i + 1) % -(-s.iterations // VALIDATIONS) and i + 1 < s.iterations:
        return run
    with clock("validation"):
        tasks = parts["validation"], VALIDATION_SEED, s.validation_tasks
        accuracy = evaluate(s, theta, *tasks, steps=[s.test_steps], eager=eager).mean()
    best = theta if all(accuracy >= other for _, other in run.validations) else run.best
    return dataclasses.replace(run, best=best, validations=[*run.validations, [i + 1, accuracy]])


def cg_trouble(cg):
    """The shares of tasks with negative curvature and left unsolved, of [] or [Solution]."""
    return [t.data.mean() for s in cg for t in (s.negative_curvature, s.unconverged)] or (0, 0)


def train(s, run, parts, save, save_every, clock, eager):
    """The finished Run. Saved every `save_every` seconds, at the end, and when interrupted."""

    def note():
        recent = slice(max(0, run.iteration - 100), run.iteration)
        negative, unconverged = run.negative[recent].mean(), run.unconverged[recent].mean()
        cg = f", negative curvature in {negative:.1%}, unconverged in {unconverged:.1%} of tasks" if s.lam else ""
        accuracy = f", accuracy on validation tasks {run.validations[-1][1]:.1%}" if run.validations else ""
        return f"query loss in training {run.losses[recent].mean():.3f}{accuracy}{cg}"

    saved = time.monotonic()
    try:
        for _ in report.progress(TITLES[s.method], s.iterations, note, first=run.iteration):
            run = advance(s, run, parts, clock, eager)
            if time.monotonic() - saved >= save_every:
                save(run)
                saved = time.monotonic()
    finally:  # also after an interrupt, and before an iteration that gave no finite numbers
        save(run)
    return run


# ---- evaluation ------------------------------------------------------------------------------------------------------


def predict(s, phi, support, images, transductive=True):
    """Logits (tasks, queries, ways) of query images (tasks, queries, 28, 28, 1).

    Batch norm takes its statistics over all queries of a task; or, not transductive, over the support and that one
    query: each query then goes through the network in a batch of its own, with the support beside it.
    """
    if transductive:
        return logits(s, phi, images)
    parts, (tasks, n) = [], support[1].shape
    each = max(1, IMAGES // (tasks * (n + 1)))  # queries at once
    for start in range(0, images.shape[1], each):
        query = tm.Tensor(images)[:, start : start + each, None]  # (tasks, each, 1, 28, 28, 1)
        beside = tm.broadcast_to(tm.Tensor(support[0])[:, None], (*query.shape[:2], n, *query.shape[3:]))
        batches = tm.concatenate([beside, query], axis=2)
        parts.append(logits(s, [p[:, None] for p in phi], batches)[:, :, -1])
    return tm.concatenate(parts, axis=1)


@functools.cache
def predictions(s, steps, transductive, eager):
    """(θ, support, query images) ↦ the logits after each number of steps."""

    def adapt_and_predict(theta, support, images):
        path = METHODS[s.method].at_test(s, loss_of(s), theta, support, max(steps))
        wanted = (phi for k, phi in enumerate(path) if k in steps)
        return [tm.stop_gradient(predict(s, phi, support, images, transductive)) for phi in wanted]  # frees its graph

    if eager:
        return adapt_and_predict
    return tm.compile(adapt_and_predict, tasks=["support", "images"], stacked=range(len(steps)), shards=s.shards)


def evaluate(s, theta, characters, seed, tasks, steps, transductive=True, eager=False):
    """Accuracy of tasks 0, .., tasks−1 of that seed after each number of steps: (len(steps), tasks)."""

    def accuracies(start, stop):
        sizes = s.ways, s.shots, s.test_queries
        support, (images, labels) = episodes.test_episodes(seed, characters, start, stop, *sizes)
        curve = predictions(s, tuple(steps), transductive, eager)(theta, support, images)
        return [(y.data.argmax(axis=-1) == labels).mean(axis=-1) for y in curve]

    size = max(1, IMAGES // (s.ways * (s.shots + s.test_queries)))  # tasks at once
    return np.concatenate([accuracies(i, min(i + size, tasks)) for i in range(0, tasks, size)], axis=1)


def predicted_task(s, theta, characters, transductive):
    """Test task 0: (support, query, labels predicted for the query)."""
    support, query = episodes.test_episodes(TEST_SEED, characters, 0, 1, s.ways, s.shots, s.test_queries)
    (y,) = predictions(s, (s.test_steps,), transductive, eager=True)(theta, support, query[0])
    return [a[0] for a in support], [a[0] for a in query], y.data[0].argmax(axis=-1)


def summary(accuracies):
    """Mean and 1.96 standard errors over tasks, in %, after each number of steps."""
    standard_error = accuracies.std(axis=1) / np.sqrt(accuracies.shape[1])
    return {"mean": (100 * accuracies.mean(axis=1)).tolist(), "half_width": (196 * standard_error).tolist()}


def measure(s, run, parts, tasks, transductive, eager):
    """The figures of the record: curves of the trained and the untrained network, and how the training went."""
    steps = range(max(CURVE, s.test_steps) + 1)
    curves = {
        name: summary(evaluate(s, theta, parts["test"], TEST_SEED, tasks, steps, transductive, eager))
        for name, theta in (("trained", run.best), ("untrained", initial(s)))
    }
    return {
        "data": s.data,
        "tasks": tasks,
        "transductive": transductive,
        "score": {"steps": s.test_steps, **{key: value[s.test_steps] for key, value in curves["trained"].items()}},
        **curves,
        "iterations": run.iteration,
        "validations": run.validations,
        "selected": max(run.validations, key=lambda v: (v[1], v[0]))[0],
        "loss": [float(part.mean()) for part in np.array_split(run.losses[: run.iteration], min(200, run.iteration))],
        "negative_curvature": float(run.negative[: run.iteration].mean()) if s.lam else None,
        "unconverged": float(run.unconverged[: run.iteration].mean()) if s.lam else None,
    }


def lines(s, figures):
    """The figures as text: the score first."""
    score, first = figures["score"], {key: value[0] for key, value in figures["trained"].items()}
    how = "transductive" if figures["transductive"] else "not transductive"
    columns = [k for k in COLUMNS if k < len(figures["trained"]["mean"])]
    yield (
        f"{s.title}, {how}: acc@{score['steps']} = {score['mean']:.2f} ± {score['half_width']:.2f} %  (n ="
        f" {figures['tasks']} test tasks, queries a class: {s.test_queries}; θ of iteration {figures['selected']},"
        f" chosen on validation tasks; seed {s.seed})"
    )
    if figures["iterations"] < s.iterations:
        yield f"unfinished: after {figures['iterations']} of {s.iterations} iterations"
    if known := published(s, figures["transductive"]):
        yield f"published, on Omniglot: {known[1]} ± {known[2]} %  ({known[0]})"
    yield "accuracy in % after k steps, ± 95 %\n" + " " * 10 + "".join(f"{f'acc@{k}':>14}" for k in columns)
    for name in ("trained", "untrained"):
        cells = [f"{figures[name]['mean'][k]:.2f} ±{figures[name]['half_width'][k]:5.2f}" for k in columns]
        yield f"{name:10}" + "".join(f"{cell:>14}" for cell in cells)
    chance, band = 100 / s.ways, 4 * first["half_width"] / 1.96
    verdict = "as it must be" if abs(first["mean"] - chance) <= band + 1e-9 else "OUTSIDE THE BAND: do labels leak?"
    yield f"before adaptation {first['mean']:.2f} %; by chance {chance:.2f} ± {band:.2f} (4 standard errors): {verdict}"
    if s.lam:
        yield (
            f"negative curvature met in {figures['negative_curvature']:.1%} of training tasks, conjugate gradients"
            f" unconverged in {figures['unconverged']:.1%}"
        )


# ---- the command -----------------------------------------------------------------------------------------------------

OPTIONS = {
    "iterations": "instead of the preset's",
    "tasks": "of an iteration, instead of the preset's",
    "queries": "of a class in training, instead of the preset's",
    "filters": "of a layer, instead of the preset's",
    "shards": "of the tasks, a thread each (default 2); results differ by rounding",
}
CLIPS = {"clip": "the meta-gradient", "inner_clip": "each task's inner gradients, in training and at test,"}
CHOICES = (
    "method",
    "preset",
    "ways",
    "shots",
    "seed",
    "network",
    *OPTIONS,
    *CLIPS,
)  # what `choose` takes; None: not told

EXAMPLES = """\
examples, with their time on 2 cores:
  python -m benchmarks.omniglot                                    MAML, 5-way 1-shot, 32 filters: 6 minutes
  python -m benchmarks.omniglot --method meta-sgd                  another algorithm, 3 to 10 minutes
  python -m benchmarks.omniglot --preset long --method reptile     half an hour, 64 filters
  python -m benchmarks.omniglot --preset papers --ways 20          the published training: a day and more
  python -m benchmarks.omniglot --evaluate out/glyphs_5way_1shot_maml.npz --not-transductive   a minute
Ctrl-C saves; the same command with --resume goes on and ends with the same bytes as if nothing had happened.
"""


class Clock(defaultdict):
    """Seconds of every call, by what they were spent on."""

    @contextmanager
    def __call__(self, name):
        start = time.perf_counter()
        yield
        self[name].append(time.perf_counter() - start)

    def summary(self):
        return {
            name: {"calls": len(spent), "median": round(float(np.median(spent)), 5), "total": round(sum(spent), 1)}
            for name, spent in self.items()
        }


def arguments():
    p = report.parser(__doc__, EXAMPLES)
    p.set_defaults(seed=None)  # told or not, as all that a checkpoint knows too
    p.add_argument("--method", choices=TITLES, metavar="NAME", help=f"{', '.join(TITLES)} (default: maml)")
    p.add_argument("--ways", type=at_least(2), metavar="N", help="characters of a task (default 5)")
    p.add_argument("--shots", type=at_least(1), metavar="K", help="drawings of each to adapt to (default 1)")
    p.add_argument("--preset", choices=PRESETS, help="small (default): minutes; long: half an hour; papers: days")
    p.add_argument("--network", choices=NETWORKS, help="conv (default), or Finn et al.'s dense 256-128-64-64")
    for name, what in OPTIONS.items():
        p.add_argument(f"--{name}", type=at_least(1), metavar="N", help=what)
    for name, what in CLIPS.items():
        option = f"--{name.replace('_', '-')}"
        p.add_argument(option, type=positive, metavar="NORM", help=f"clip {what} to this norm (default: don't)")
    p.add_argument("--test-tasks", type=at_least(2), metavar="N", default=600, help="default 600; fewer to try it out")
    p.add_argument("--not-transductive", action="store_true", help="test: batch norm over the support and one query")
    data = p.add_mutually_exclusive_group()
    data.add_argument("--data", type=Path, metavar="PATH", help="folder with Omniglot's two zips, or unpacked")
    data.add_argument("--glyphs", action="store_true", help="the generated characters, even where Omniglot is found")
    p.add_argument("--download", action="store_true", help="fetch the zips into --data, $TINYMETA_DATA or the cache")
    p.add_argument("--checkpoint", type=Path, metavar="PATH", help="default: in --out, named after task and method")
    p.add_argument("--save-every", type=at_least(0), metavar="SECONDS", default=120, help="default 120")
    p.add_argument("--eager", action="store_true", help="without tm.compile: the numbers of --shards 1, more slowly")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    start.add_argument("--evaluate", type=Path, metavar="CHECKPOINT", help="only test it, on the data it is made for")
    return p


def prepare(args):
    """(settings, run, characters by role, where to save it or None) with all that can be wrong found out at once."""
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed must be 0 or more, got {args.seed}")
    if args.glyphs and args.download:
        raise ValueError("--download fetches the real images, --glyphs leaves them aside: choose one")
    if args.evaluate and (args.checkpoint or args.preset):
        raise ValueError("--evaluate trains nothing: --checkpoint and --preset have no place beside it")
    if args.evaluate:
        s, run = restore(args.evaluate)
        given = {name: getattr(args, name) for name in CHOICES if name != "preset"}
        given["data"] = "glyphs" if args.glyphs else "omniglot" if args.data or args.download else None
        must_agree(args.evaluate, s, {name: value for name, value in given.items() if value is not None})
        if not run.validations:
            raise ValueError(f"{args.evaluate} has no validated parameters yet: it is at iteration {run.iteration}")
        parts, path = roles(s, load_data(args, wanted=s.data)), None
    else:
        chosen = {name: value for name in CHOICES if (value := getattr(args, name)) is not None}
        if args.download:
            roles(choose("omniglot", **chosen), blank())  # what Omniglot can't give is not worth fetching it
        characters = load_data(args)
        s = choose(characters.name, **chosen)
        parts, path, run = roles(s, characters), args.checkpoint or args.out / f"{s.name}.npz", begin(s)
        if path.exists():
            stored, run = restore(path)
            if not args.resume:
                raise ValueError(
                    f"{path} holds a training, at iteration {run.iteration} of {stored.iterations}: --resume goes on"
                    " with it, --checkpoint names another place"
                )
            must_agree(path, stored, vars(s))
        elif args.resume:
            print(f"no checkpoint at {path} yet: starting from the beginning", file=sys.stderr)
    report.require_writable(path, args.json, *pictures(args, s), read=args.evaluate)
    return s, run, parts, path


def pictures(args, s):
    """Where the learning curve, the accuracy over steps and the task are drawn."""
    tested = f"{s.name}_not_transductive" if args.not_transductive else s.name
    return [args.out / name for name in (f"{s.name}_curve.png", f"{tested}_steps.png", f"{tested}_task.png")]


def restore(path):
    """(settings, run) of a checkpoint."""
    state = checkpoint.load(path)
    try:
        s, run = Settings(**state["omniglot"]), Run(**state["run"])
        if missing := vars(s).keys() - state["omniglot"].keys():  # not to be filled in by today's defaults
            raise KeyError(*missing)
        return s, run
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is a checkpoint of another benchmark or version ({error})") from error


def must_agree(path, stored, wanted):
    there = vars(stored)
    differ = [f"{name} {there[name]}, not {value}" for name, value in wanted.items() if there[name] != value]
    if differ:
        raise ValueError(f"{path} is another training: {'; '.join(differ)}")


GOES_ON = "goes on from there"
IF_THERE_IS_ROOM = "goes on from there where there is more memory; --checkpoint names a place for another training"
STOPS_AGAIN = "would stop at the same place; --evaluate tests what it has learned so far"


def main(argv=None):
    parser = arguments()
    args, start, clock = parser.parse_args(argv), time.perf_counter(), Clock(list)
    transductive, saved = not args.not_transductive, ""

    def save(run):
        nonlocal saved
        checkpoint.save(path, {"omniglot": vars(s), "run": vars(run)})
        saved = f"; iteration {run.iteration} is saved in {path}, the same command with --resume "

    try:
        try:
            s, run, parts, path = prepare(args)
            if path:
                save(run)  # now, while nothing is lost if it can't be done
        except (OSError, ValueError, ImportError, MemoryError) as error:
            parser.error(error)
        if path:
            run = train(s, run, parts, save, args.save_every, clock, args.eager)
        with clock("evaluation"):
            figures = measure(s, run, parts, args.test_tasks, transductive, args.eager)
        print(*lines(s, figures), sep="\n")
        if args.json:
            seconds = {**clock.summary(), "total": round(time.perf_counter() - start)}
            report.write_json(args.json, figures, vars(s), seconds)
        if plt := report.pyplot():
            curve, steps, task = pictures(args, s)
            draw_curve(plt, s, figures, curve)
            draw_steps(plt, s, figures, steps)
            draw_task(plt, s, *predicted_task(s, run.best, parts["test"], transductive), task)
            print(f"pictures: {curve}, {steps}, {task}")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted{saved and saved + GOES_ON}\n")
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: stopped: {error}{saved and saved + STOPS_AGAIN}\n")
    except OSError as error:
        parser.exit(1, f"{parser.prog}: stopped: {error}{saved and saved + GOES_ON}\n")
    except MemoryError as error:
        parser.exit(1, f"{parser.prog}: stopped: {error}{saved and saved + IF_THERE_IS_ROOM}\n")
    times = [f"{t['calls']} × {name} {1000 * t['median']:.3g} ms" for name, t in clock.summary().items()]
    print(f"times: {', '.join(times)}")


if __name__ == "__main__":
    report.command(main)
