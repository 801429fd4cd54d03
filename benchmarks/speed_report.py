"""What benchmarks/speed prints and draws."""

import dataclasses

import numpy as np


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


def draw(plt, figures, path):
    """Bars: times over the fastest peer's. Curves: time and memory over what grows."""
    races, curves = figures["races"], figures.get("growth", {})
    figure = plt.figure(figsize=(11, 3 + 0.16 * sum(len(r["contestants"]) for r in races.values())))
    outer = figure.add_gridspec(2 if curves else 1, 1, height_ratios=[2, 1] if curves else None)
    columns = min(5, len(races))
    grid = outer[0].subgridspec(-(-len(races) // columns), columns)
    for place, (name, r) in zip(grid, races.items()):
        results, axis = r["contestants"], figure.add_subplot(place)
        unit = results[fastest_peer(results) or min(results)]["median"]
        order = sorted(results, key=lambda c: -results[c]["median"])
        colours = ["tab:gray" if is_peer(c) else "tab:blue" for c in order]
        axis.barh(order, [results[c]["median"] / unit for c in order], color=colours)
        axis.axvline(r["floor"]["median"] / unit, color="black", ls=":")
        axis.set(xscale="log", title=name)
        axis.tick_params(labelsize=6)
    if curves:
        grid = outer[1].subgridspec(1, 2 * len(curves))
        cells = [(axis, key) for axis in curves for key in ("median", "steady_mb")]
        for place, (what, key) in zip(grid, cells):
            axis = figure.add_subplot(place)
            for contestant, points in curves[what].items():
                ys = [np.nan if p[key] is None else p[key] for p in points.values()]
                axis.plot(list(points), ys, marker=".", label=contestant)
            axis.set(xlabel=what, title="seconds" if key == "median" else "MB", yscale="log")
            axis.tick_params(labelsize=6)
        figure.legend(*axis.get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path)
    plt.close(figure)
