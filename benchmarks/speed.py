"""The race: tinymeta's meta-gradients against PyTorch, JAX and HIPS autograd, on the same tasks in float32.

Every contestant's gradient is first compared with our eager float64 and float32 ones: one that is off by more than
rounding ends the run. Then all take turns, a short burst of calls each, after a pause in which the threads of the one
before fall asleep and a call that is not timed. Where one or two threads can be chosen, a few calls decide. Columns:

    ms        median of a call, and its quartiles       ×         the same as a multiple of the fastest peer's
    first     seconds to the first result, compilation included, in a process of its own
    MB        peak of that process above what it held after imports: in the first call, and in the calls after it

The last line is the floor: np.matmul for the step's matrix products alone, one after the other on contiguous arrays. It
is no strict one, for outer products and small matrices can be multiplied faster. Growth is time and memory over inner
steps, tasks and ways, each point in a process of its own, three calls after the first: rough, by up to a factor of 2.

Peers stand in benchmarks/peers, in the forms that their experts would choose. Their arrays are converted before the
clock starts; ours are copied in and out while it runs.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import tinymeta as tm
from benchmarks import peers, report
from benchmarks.peers import tinymeta_peer
from benchmarks.report import at_least, positive
from benchmarks.speed_report import cell, draw, fastest_peer, is_peer, milliseconds, table
from tinymeta.program import Plan
from tinymeta.tasks import episodes, glyphs, sinusoid

PAUSE = 0.03  # seconds: OpenBLAS's threads spin for so long after a product
BURST = 0.25  # seconds of calls in a turn
TOLERANCE = 1e-3  # of a parameter's gradient, relative in norm to float64
DRAWS = 5  # of data, on one of which a contestant must agree


@dataclasses.dataclass(frozen=True)
class Workload:
    algorithm: str  # maml, fomaml, imaml
    network: str  # mlp, convnet
    tasks: int
    steps: int
    alpha: float
    ways: int = 5  # of the convnet, one image each in support and query; the MLP sees 10 + 10 points
    filters: int = 64
    lam: float | None = None
    damping: float = 0.0
    cg_steps: int | None = None
    compile: bool = True  # torch.compile takes minutes for the largest

    def arrays(self, seed, dtype=np.float32):
        """(theta, support, query): float32, or the same values in float64."""
        rng = np.random.default_rng([seed, 3])
        if self.network == "mlp":
            theta = tm.nn.init_mlp(rng, (1, 40, 40, 1), scale=1.0)
            support, query = sinusoid.training_batch(rng, self.tasks, 10)
        else:
            theta = tm.nn.init_convnet(rng, self.ways, self.filters, scale=2**0.5)
            support, query = episodes.draw_episodes(rng, characters(), self.tasks, self.ways, 1, 1)
        cast = lambda x: x.astype(dtype) if x.dtype.kind == "f" else x
        return [cast(t.data) for t in theta], tuple(map(cast, support)), tuple(map(cast, query))


@functools.cache
def characters():
    return glyphs.load(characters=72)


SINUSOID = dict(network="mlp", tasks=25)
OMNIGLOT = dict(network="convnet", steps=1, alpha=0.4)
IMAML = dict(algorithm="imaml", network="convnet", steps=5, alpha=0.1, lam=2.0, damping=22.0, cg_steps=2)
WORKLOADS = {
    "sinusoid-maml-1": Workload("maml", **SINUSOID, steps=1, alpha=0.01),
    "sinusoid-maml-5": Workload("maml", **SINUSOID, steps=5, alpha=0.01),
    "sinusoid-imaml": Workload("imaml", **SINUSOID, steps=16, alpha=0.001, lam=100.0, cg_steps=5),
    "omniglot-maml-8": Workload("maml", **OMNIGLOT, tasks=8),
    "omniglot-fomaml-8": Workload("fomaml", **OMNIGLOT, tasks=8),
    "omniglot-imaml-8": Workload(**IMAML, tasks=8),
    "omniglot-maml-32": Workload("maml", **OMNIGLOT, tasks=32, compile=False),
    "omniglot-fomaml-32": Workload("fomaml", **OMNIGLOT, tasks=32, compile=False),
    "omniglot-imaml-32": Workload(**IMAML, tasks=32, compile=False),
    "omniglot-20way": Workload("maml", "convnet", tasks=2, steps=5, alpha=0.1, ways=20, compile=False),
}
GROWTH = {"steps": (1, 5, 10, 20), "tasks": (1, 8, 32, 64), "ways": (5, 20, 50)}
GROWTH_BASE = Workload("maml", "convnet", tasks=4, steps=1, alpha=0.05)
GROWING = "tinymeta-eager", "tinymeta-sharded", "torch-hand-conv", "jax-map-patches"


# ---- agreement -------------------------------------------------------------------------------------------------------


def disagreement(grads, reference):
    """The largest ‖g − r‖ / ‖r‖ of a parameter; infinity where shapes differ or a value is not finite."""
    if [np.shape(g) for g in grads] != [r.shape for r in reference]:
        return np.inf
    worst = np.max([np.linalg.norm(g - r) / np.linalg.norm(r) for g, r in zip(grads, reference)])
    return float(worst) if np.isfinite(worst) else np.inf


@functools.cache
def reference(w, seed, dtype):
    """[query loss, *meta_grad] of our eager engine."""
    theta, *data = w.arrays(seed, dtype)
    query_loss, grads = tinymeta_peer.to_numpy("", w, tinymeta_peer.meta_step(w)([tm.Tensor(t) for t in theta], *data))
    return [query_loss, *grads]


def check(name, library, w, bind, seed):
    """The disagreement with our eager engine in float64 and in float32. ValueError beyond TOLERANCE on all of DRAWS.

    In one draw of data a unit may lie so near to relu's kink that rounding decides which side it is on, and then the
    gradients differ by a hundredth; a wrong formula is wrong in all of them.
    """
    found = []
    for drawn in range(seed, seed + DRAWS):
        query_loss, grads = library.to_numpy(name, w, bind(*w.arrays(drawn))())
        errors = [disagreement([query_loss, *grads], reference(w, drawn, t)) for t in (np.float64, np.float32)]
        if errors[0] <= TOLERANCE:
            return errors
        found.append(errors)
    errors = min(found)
    raise ValueError(
        f"{name} computes something else than {w.algorithm}: its gradient is off by {errors[0]:.2g} of our float64's"
        f" and by {errors[1]:.2g} of our float32's; rounding may take {TOLERANCE}"
    )


# ---- the race --------------------------------------------------------------------------------------------------------


def timed(step, library, threads, seconds=0.0, calls=1):
    """Seconds of a call: the mean of a burst of that many calls or, if that takes longer, of that many seconds."""
    with library.threads(threads):
        step()
        start, done = time.perf_counter(), 0
        while done < calls or time.perf_counter() - start < seconds:
            step()
            done += 1
        return (time.perf_counter() - start) / done


def race(w, contestants, seed, rounds, patience):
    """{name: times and what else is known}: all in turn, `rounds` times, or 3 times and until `patience` seconds."""
    arrays, steps, results, spent = w.arrays(seed), {}, {}, {}
    for name, (library, choices) in contestants.items():
        bind = library.build(name, w)
        errors = check(name, library, w, bind, seed)
        step = steps[name] = bind(*arrays)
        tried = {n: min(timed(step, library, n) for _ in range(3)) for n in choices}
        threads = min(tried, key=tried.get)
        results[name] = {"threads": threads, "errors": errors, "times": []}
        spent[name] = 0.0
    for i in range(rounds):
        for name, (library, _) in contestants.items():
            if i < 3 or spent[name] < patience:
                time.sleep(PAUSE)
                start = time.perf_counter()
                burst = timed(steps[name], library, results[name]["threads"], seconds=BURST)
                results[name]["times"].append(burst)
                spent[name] += time.perf_counter() - start
    for r in results.values():
        r["low"], r["median"], r["high"] = np.quantile(r.pop("times"), (0.25, 0.5, 0.75)).tolist()
    return results


# ---- the floor -------------------------------------------------------------------------------------------------------


def products(w, seed):
    """[(shape, shape)] of the matrix products of our compiled step."""
    program = tinymeta_peer.compiled(w).program(*w.arrays(seed))
    return [tuple(x.shape for x in n.inputs) for n in program.nodes if n.op == "matmul"]


def floor(w, seed, rounds):
    """Seconds of these products alone and their floating-point operations; the better of two ways to use two cores."""

    def calls(w):
        rng, result = np.random.default_rng(0), []
        for shapes in products(w, seed):
            a, b = (rng.standard_normal(s, np.float32) for s in shapes)
            result.append((a, b, np.matmul(a, b)))
        return result

    def run(calls):
        for a, b, out in calls:
            np.matmul(a, b, out)

    whole = calls(w)
    ways = {"BLAS on 2 threads": (lambda: run(whole), 2)}
    if w.tasks > 1:
        halves = [calls(dataclasses.replace(w, tasks=n)) for n in (w.tasks // 2, w.tasks - w.tasks // 2)]
        pool = ThreadPoolExecutor(2)
        ways["2 × BLAS on 1 thread"] = (lambda: list(pool.map(run, halves)), 1)
    times = {}
    for _ in range(max(3, rounds // 2)):
        for way, (f, n) in ways.items():
            times.setdefault(way, []).append(timed(f, tinymeta_peer, n, seconds=BURST))
    best = min(times, key=lambda way: statistics.median(times[way]))
    flops = sum(2 * out.size * a.shape[-1] for a, _, out in whole)
    return {"median": statistics.median(times[best]), "how": best, "products": len(whole), "gflop": flops / 1e9}


def profile(w, seed, calls=10):
    """The kernels of our compiled step, unsharded: [(seconds, calls, op, shape)] of one step, the longest first."""
    theta, *data = w.arrays(seed)
    plan = Plan(tinymeta_peer.compiled(w).program(theta, *data))
    values = [*theta, *data[0], *data[1]]
    plan(values)
    seconds = {}
    for _ in range(calls):
        for i, array in plan.arguments:
            np.copyto(array, values[i])
        for n, kernel in plan.kernels:
            start = time.perf_counter()
            for call in kernel:
                call()
            key = n.op, " ".join(map(str, [*(x.shape for x in n.inputs), "->", n.shape]))
            total, count = seconds.get(key, (0.0, 0))
            seconds[key] = total + time.perf_counter() - start, count + 1
    return sorted(((s / calls, count // calls, *key) for key, (s, count) in seconds.items()), reverse=True)


# ---- a process of its own --------------------------------------------------------------------------------------------


def resident(key="VmRSS"):
    """Megabytes that this process holds, or has held at most (VmHWM); None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return None


def peak(f):
    """(seconds of f(), peak in MB while it ran); None where the peak can't be measured apart."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is held now
        known = True
    except OSError:
        known = False
    start = time.perf_counter()
    f()
    return time.perf_counter() - start, resident("VmHWM") if known else None


def alone(contestant, workload, seed, calls):
    """What a child process prints: seconds to the first result and of a later call, and the peaks above the imports."""
    w = Workload(**workload)
    found, _ = peers.load([contestant.split("-")[0]])
    (library,) = found.values()
    arrays, choices = w.arrays(seed), library.contestants(w)[contestant]
    with library.threads(choices[-1]):
        before, steps = resident(), []
        first, first_peak = peak(lambda: (steps.append(library.build(contestant, w)(*arrays)), steps[0]()))
        times = []
        _, steady_peak = peak(lambda: times.extend(timed(steps[0], library, choices[-1]) for _ in range(calls)))
    above = [None if p is None else p - before for p in (first_peak, steady_peak)]
    record = {"first": first, "median": statistics.median(times), "first_mb": above[0], "steady_mb": above[1]}
    print(json.dumps(record))


def in_a_process(contestant, w, seed, calls=3):
    command = [sys.executable, "-m", "benchmarks.speed", "--alone", contestant, json.dumps(dataclasses.asdict(w))]
    command += ["--seed", str(seed), "--rounds", str(calls)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{contestant}, in a process of its own: {result.stderr.strip() or result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def growth(seed, contestants, quick):
    """{axis: {contestant: {value: record of its process}}}."""
    result = {}
    for axis, values in GROWTH.items():
        base = dataclasses.replace(GROWTH_BASE, filters=8) if quick else GROWTH_BASE
        for value in values[:2] if quick else values:
            w = dataclasses.replace(base, **{axis: value})
            for name in contestants:
                record = in_a_process(name, w, seed)
                result.setdefault(axis, {}).setdefault(name, {})[value] = record
                print(f"{axis} {value:3}  {name:20}{milliseconds(record['median'])} ms{cell(record['steady_mb'])} MB")
    return result


# ---- the command -----------------------------------------------------------------------------------------------------

EXAMPLES = """\
without a peer that is not installed, the others race. Examples, with their time on 2 cores:
  python -m benchmarks.speed                                              all, 40 minutes, many of them torch.compile's
  python -m benchmarks.speed --quick                                      tiny networks, to see that all works: a minute
  python -m benchmarks.speed --workloads omniglot-maml-8 --no-memory      one race, some 3 minutes
  python -m benchmarks.speed --workloads growth --json speed.json         5 minutes; the file keeps its other races
  python -m benchmarks.speed --workloads sinusoid-maml-1 --contestants tinymeta jax    or how names begin: half a minute
  python -m benchmarks.speed --workloads omniglot-maml-8 --profile        where our time goes: seconds
"""


def entrants(w, found, wanted):
    """{name: (library's file, choices of threads)}; torch.compile only where w says so, or where it is named."""
    result = {}
    for library in found.values():
        for name, choices in library.contestants(w).items():
            chosen = any(name.startswith(prefix) for prefix in wanted or [name])
            if chosen and (w.compile or "torch-compile" not in name or any("compile" in prefix for prefix in wanted)):
                result[name] = library, choices
    return result


def smaller(w):
    return dataclasses.replace(
        w, filters=8, tasks=min(w.tasks, 2), ways=min(w.ways, 5), steps=min(w.steps, 2), compile=False
    )


def best_forms(results):
    """Ours, and of every other library the fastest contestant."""
    best = {}
    for name in sorted(results, key=lambda c: results[c]["median"]):
        best.setdefault(name if not is_peer(name) else name.split("-")[0], name)
    return list(best.values())


def run(name, w, found, args):
    contestants = entrants(w, found, args.contestants)
    records = {}
    with tempfile.TemporaryDirectory() as cache:  # of torch.compile: cold in its own process, warm in the race
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        if args.memory:
            records = {c: in_a_process(c, w, args.seed) for c in contestants if "torch-compile" in c}
        results = race(w, contestants, args.seed, args.rounds, args.patience)
        if args.memory:
            records |= {c: in_a_process(c, w, args.seed) for c in best_forms(results) if c not in records}
    for c, record in records.items():
        results[c] |= {key: record[key] for key in ("first", "first_mb", "steady_mb")}
    ground = floor(w, args.seed, args.rounds)
    print(table(name, w, results, ground), flush=True)
    return {"contestants": results, "floor": ground, "fastest_peer": fastest_peer(results)}


def recorded(path, settings):
    """What the file holds from a run with these settings: races that are not run again stay. ValueError if damaged."""
    if path is None or not path.exists():
        return {"races": {}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["settings"] != settings:
            return {"races": {}}
        require_sound(record["figures"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it holds something else than a record: {type(error).__name__} {error}") from error
    return record["figures"]


def require_sound(figures):
    """Raise one of the errors above if something is not there that will be drawn beside what is run now."""
    drawn = []
    for race in figures["races"].values():
        drawn += [r["median"] for r in (race["floor"], *race["contestants"].values())]
        if not race["contestants"]:
            raise ValueError("a race without contestants")
    for curves in figures.get("growth", {}).values():
        for value, point in itertools.chain.from_iterable(points.items() for points in curves.values()):
            drawn += [float(value), point["median"], 1.0 + abs(point["steady_mb"] or 0)]
    if not all(isinstance(x, float) and 0 < x < float("inf") for x in drawn):
        raise ValueError("a figure that is no positive number")


def arguments():
    parser = report.parser(__doc__, EXAMPLES)
    names = [*WORKLOADS, "growth"]
    parser.add_argument("--workloads", nargs="+", choices=names, default=names, metavar="NAME", help=" ".join(names))
    parser.add_argument(
        "--contestants", nargs="+", default=[], metavar="NAME", help="some only, by how their names begin"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), metavar="N", help="turns of a contestant (default 11; 3 with --quick)"
    )
    parser.add_argument(
        "--patience", type=positive, metavar="S", default=4.0, help="3 turns, then while below S seconds"
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks, no growth, no memory, no torch.compile")
    parser.add_argument("--profile", action="store_true", help="no race: the time of each kernel of our compiled step")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, help="a process for each (default: yes)")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)  # what that process runs
    return parser


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.quick else 11)
    args.memory = not args.quick if args.memory is None else args.memory
    if args.alone:
        contestant, workload = args.alone
        return alone(contestant, json.loads(workload), args.seed, args.rounds)
    found, missing = peers.load()
    for library in missing:
        print(f"not here: {peers.LIBRARIES[library]}; pip install {library}", file=sys.stderr)
    workloads = {name: smaller(w) if args.quick else w for name, w in WORKLOADS.items() if name in args.workloads}
    known = {c for w in WORKLOADS.values() for c in entrants(w, found, ["", "torch-compile"])}
    for prefix in args.contestants:
        if not any(c.startswith(prefix) for c in known):
            parser.error(f"no contestant begins with {prefix}; there are {' '.join(sorted(known))}")
    growing = "growth" in args.workloads and not args.profile and (args.memory or not args.quick)
    if not (workloads or growing):
        parser.error("nothing to do: --profile, and --quick without --memory, leave growth out, the only workload")
    settings = {"seed": args.seed, "rounds": args.rounds, "quick": args.quick, "tolerance": TOLERANCE}
    try:
        report.require_writable(args.json, args.out / "speed.png")
        figures, start = recorded(args.json, settings) | {"missing": missing}, time.perf_counter()
    except (OSError, ValueError) as error:
        parser.error(f"--json {args.json} can't be taken: {error}")

    def save():
        if args.json:
            report.write_json(args.json, figures, settings, {"total": round(time.perf_counter() - start)})

    try:
        for name, w in workloads.items():
            if args.profile:
                print(f"\n{name}\n{'ms':>8}{'share':>8}{'calls':>7}  op")
                kernels = profile(w, args.seed)
                total = sum(s for s, *_ in kernels)
                for s, calls, op, shape in kernels:
                    print(f"{1000 * s:8.3f}{s / total:8.1%}{calls:7}  {op} {shape}")
                continue
            figures["races"][name] = run(name, w, found, args) | {"workload": vars(w), "commit": report.commit()}
            save()
        if growing:
            wanted = [c for c in GROWING if c.split("-")[0] in found]
            wanted = [c for c in wanted if not args.contestants or any(c.startswith(p) for p in args.contestants)]
            figures["growth"] = growth(args.seed, wanted, args.quick)
            save()
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted; {args.json or 'what is printed'} has what was measured\n")
    except (ValueError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: stopped: {error}\n")
    if figures["races"] and (plt := report.pyplot()):
        draw(plt, figures, GROWTH_BASE, args.out / "speed.png")
        print(f"picture: {args.out / 'speed.png'}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    report.command(main)
