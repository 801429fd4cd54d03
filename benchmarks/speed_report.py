"""What benchmarks/speed prints and draws."""

import dataclasses

import numpy as np

from benchmarks import report


def milliseconds(seconds):
    return f"{1000 * seconds:9.3g}"


def cell(value, form=">8.0f"):
    return f"{'-':>8}" if value is None else f"{value:{form}}"


def is_peer(name):
    return not name.startswith("tinymeta")


def fastest_peer(results):
    return min(filter(is_peer, results), key=lambda name: results[name]["median"], default=None)


def table(name, w, results, ground):
    settings = {k: v for k, v in dataclasses.asdict(w).items() if v not in (None, 0.0) and k != "compile"}
    lines = [f"\n{name}: " + ", ".join(f"{k} {v}" for k, v in settings.items())]
    lines.append(f"{'':22}{'ms':>9}{'quartiles':>18}{'×':>7}{'threads':>9}{'first':>8}{'MB':>8}{'':8}   error")
    unit = fastest_peer(results)
    for contestant, r in sorted(results.items(), key=lambda item: item[1]["median"]):
        ratio = f"{r['median'] / results[unit]['median']:7.2f}" if unit else f"{'':7}"
        spread = f"{milliseconds(r['low'])}{milliseconds(r['high'])}"
        own = f"{cell(r.get('first'), '>8.2f')}{cell(r.get('first_mb'))}{cell(r.get('steady_mb'))}"
        threads = r["threads"] or "its own"
        lines.append(
            f"{contestant:22}{milliseconds(r['median'])}{spread}{ratio}{threads:>9}{own}   {r['errors'][0]:.1g}"
        )
    ratio = f"{ground['median'] / results[unit]['median']:7.2f}" if unit else ""
    work = (
        f"{ground['products']} products, {ground['gflop']:.3g} GFLOP, {ground['gflop'] / ground['median']:.0f} GFLOP/s"
    )
    if not w.compile:
        lines.append("torch-compile is left out here: it takes minutes to compile; name it with --contestants")
    lines.append(f"{'floor':22}{milliseconds(ground['median'])}{'':18}{ratio}   {work}, {ground['how']}")
    return "\n".join(lines)


FAMILIES = {  # how names begin, title, colour, marker; of each the fastest form is drawn
    ("tinymeta-compiled", "tinymeta-sharded"): ("tinymeta, compiled", "tab:blue", "o"),
    ("tinymeta-eager",): ("tinymeta, eager", "tab:cyan", "o"),
    ("torch-compile",): ("torch.compile", "tab:red", "s"),
    ("torch-hand", "torch-vmap"): ("PyTorch, eager", "tab:orange", "s"),
    ("jax",): ("JAX, jit", "tab:green", "^"),
    ("autograd",): ("HIPS autograd", "tab:gray", "D"),
}


def draw(plt, figures, base, path):
    """Times over the fastest peer's, by workload; time and memory over what grows, from the workload `base` on."""
    races, curves = figures["races"], figures.get("growth", {})
    height = 0.8 + 0.42 * len(races)
    figure = plt.figure(figsize=(9, height + 5.4 * bool(curves)), layout="constrained")
    rows = figure.add_gridspec(4 if curves else 1, 1, height_ratios=[height, 0.4, 2.5, 2.5] if curves else None)
    draw_races(figure.add_subplot(rows[0]), races)
    if curves:
        note = figure.add_subplot(rows[1])
        note.axis("off")
        note.text(0, 0.5, GROWTH_NOTE, va="center", transform=note.transAxes)
    labels = {"median": "seconds a call", "steady_mb": "peak memory, MB"}
    others = {"steps": f"{base.steps} inner step", "tasks": f"{base.tasks} tasks", "ways": f"{base.ways}-way"}
    for row, (key, label) in enumerate(labels.items(), 2) if curves else ():
        for place, what in zip(rows[row].subgridspec(1, len(curves)), curves):
            axis = figure.add_subplot(place)
            for contestant, points in curves[what].items():
                title, colour, marker = next(v for k, v in FAMILIES.items() if contestant.startswith(k))
                ys = [np.nan if p[key] is None else p[key] for p in points.values()]
                axis.plot([float(x) for x in points], ys, marker=marker, ms=4, color=colour, label=title)
            axis.set(xlabel=f"{'inner ' * (what == 'steps')}{what}", ylabel=label, xscale="log", yscale="log")
            axis.set_title(", ".join(others[k] for k in others if k != what), fontsize=9)
            axis.set_xticks([float(x) for x in points], list(map(str, points)))
            axis.set_xticks([], minor=True)
    report.write_picture(path, figure)
    plt.close(figure)


GROWTH_NOTE = """\
Growth: MAML on the convnet; each point is of three calls in a process of its own, and rough, by up to a factor of 2.
Without torch.compile, which takes a minute or more to compile each."""


def draw_races(axis, races):
    for prefixes, (title, colour, marker) in FAMILIES.items():
        xs, ys = [], []
        for y, race in enumerate(races.values()):
            results = race["contestants"]
            unit = results[fastest_peer(results) or min(results)]["median"]
            times = [r["median"] / unit for name, r in results.items() if name.startswith(prefixes)]
            if times:
                xs.append(min(times))
                ys.append(y)
        axis.plot(xs, ys, marker, color=colour, label=title, ms=7)
    for y, race in enumerate(races.values()):
        results = race["contestants"]
        x = race["floor"]["median"] / results[fastest_peer(results) or min(results)]["median"]
        axis.plot([x, x], [y - 0.3, y + 0.3], color="black", lw=1, label="np.matmul alone" if y == 0 else None)
    axis.axvline(1, color="lightgray", zorder=0)
    axis.set(xscale="log", xlabel="time over the fastest peer's: left of 1 is faster", ylim=(len(races) - 0.5, -0.5))
    axis.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axis.minorticks_off()
    axis.set_yticks(range(len(races)), list(races))
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
