"""Pictures of a training on Omniglot: its curve, the accuracy over adaptation steps, a task with its predictions.

`figures` are those of the benchmark's record, s the Settings, plt matplotlib.pyplot.
"""

import numpy as np

from benchmarks import report
from benchmarks.omniglot_protocols import TITLES, published


def draw_curve(plt, s, figures, path):
    """Training loss and validation accuracy against iterations."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    loss, color = figures["loss"], "tab:gray"
    axis.plot(np.linspace(0, figures["iterations"], len(loss) + 1)[1:], loss, color=color)
    axis.set(xlabel="iteration", yscale="log", title=s.title)
    axis.set_ylabel("query loss in training", color=color)
    right, color = axis.twinx(), "tab:blue"
    right.spines["right"].set_visible(True)
    right.plot(*np.array(figures["validations"]).T * [[1], [100]], marker=".", color=color)
    right.axvline(figures["selected"], color=color, ls=":", lw=1)
    right.set_ylabel(f"validation accuracy after {s.test_steps} steps, %", color=color)
    save(plt, figure, path)


def draw_steps(plt, s, figures, path):
    """Accuracy against adaptation steps: trained, untrained, and the published value."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for name in ("trained", "untrained"):
        mean, half = (np.array(figures[name][key]) for key in ("mean", "half_width"))
        (line,) = axis.plot(mean, marker=".", label=f"{TITLES[s.method]}, {name}")
        axis.fill_between(range(len(mean)), mean - half, mean + half, color=line.get_color(), alpha=0.2, lw=0)
    if known := published(s, figures["transductive"]):
        axis.axhline(known[1], color="black", ls="--", lw=1, label=f"published, on Omniglot: {known[1]} ± {known[2]}")
    axis.axhline(100 / s.ways, color="tab:gray", ls=":", lw=1, label="chance")
    axis.plot(s.test_steps, figures["score"]["mean"], "o", mfc="none", color="black", label="the score")
    how = "transductive" if figures["transductive"] else "not transductive"
    title = f"{s.title}, {how}, {figures['tasks']} test tasks"
    axis.set(xlabel="gradient steps", ylabel="accuracy, %", ylim=(0, 102), title=title)
    axis.legend(frameon=False)
    save(plt, figure, path)


def draw_task(plt, s, support, query, chosen, path):
    """One task: a column a character, its support above, its queries below with what they were taken for.

    support, query: (images (n, 28, 28, 1), labels (n,)), every run of `ways` of them with each label once, in order.
    chosen: the labels predicted for the queries.
    """
    drawings = np.concatenate([support[0], query[0]])[..., 0]
    rows = s.shots + s.test_queries
    figure, axes = plt.subplots(rows, s.ways, figsize=(max(s.ways, 4), 1.15 * rows + 0.4))
    figure.suptitle(f"{s.title}\ntop: support; bottom: queries → prediction (green: right)", fontsize=8)
    for i, (axis, drawing) in enumerate(zip(axes.flat, drawings)):
        j = i - len(support[0])
        color = "black" if j < 0 else "tab:green" if chosen[j] == query[1][j] else "tab:red"
        axis.imshow(1 - drawing, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{support[1][i] + 1}" if j < 0 else f"→ {chosen[j] + 1}", color=color, fontsize=8, pad=2)
        for spine in axis.spines.values():
            spine.set(visible=True, color=color, linewidth=1 if j < 0 else 2)
    save(plt, figure, path)


def draw_methods(plt, records, path):
    """Several methods' records side by side: validation accuracy against iterations, test accuracy over steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    colors = plt.get_cmap("tab10" if len(records) <= 10 else "tab20").colors
    for (s, record), color in zip(records, colors):
        figures, label = record["figures"], TITLES[s.method]
        iterations, accuracies = np.array(figures["validations"]).T
        left.plot(iterations, 100 * accuracies, marker=".", color=color, label=f"{label}, {s.tasks} tasks each")
        mean = figures["trained"]["mean"]
        right.plot(range(len(mean)), mean, marker=".", color=color, label=label)
        if known := published(s, figures["transductive"]):
            beside = s.test_steps * {"maml": 0.9, "fomaml": 1.1}.get(s.method, 1)  # or one would hide the other
            right.plot(beside, known[1], marker="*", ms=9, mec="black", color=color, ls="")
    right.plot([], [], marker="*", ms=9, color="white", mec="black", ls="", label="published")
    right.axhline(100 / s.ways, color="tab:gray", ls=":", lw=1, label="chance")
    left.set(
        xlabel="training iterations", ylabel="accuracy, %", ylim=(0, 102), title="in training, on validation characters"
    )
    right.set(xlabel="gradient steps", xscale="symlog", xlim=(-0.2, 60), title="trained, on test characters")
    right.set_xticks([0, 1, 3, 10, 50], ["0", "1", "3", "10", "50"])
    left.legend(frameon=False, loc="lower right")
    right.legend(frameon=False, loc="center right")
    save(plt, figure, path)


def save(plt, figure, path):
    figure.tight_layout()
    report.write_picture(path, figure)
    plt.close(figure)
