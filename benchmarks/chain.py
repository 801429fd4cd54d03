"""The picture of README's lesson: how the loss at θ″ gets back to θ, and what each algorithm makes of that way.

Two inner steps on one number: L_s = φ⁴/4, so g = φ³ and h = 3φ²; L_q = (φ − 2)²/2; θ = 1, α = 0.1, and λ = 1 for iMAML.
Every number in the picture is computed by the engine, in well under a second.
"""

import numpy as np

import tinymeta as tm
from benchmarks import report

ALPHA, STEPS, LAM = 0.1, 2, 1.0
WIDTH = 0.82  # of a box


def loss(phi, of_query):
    """L_s, or L_q where of_query is 1: (tasks,)."""
    return (1 - of_query) * phi[0] ** 4 / 4 + of_query * (phi[0] - 2) ** 2 / 2


def numbers():
    """({name: meta-gradient}, path θ, θ′, θ″, gradients g, factors 1 − αh, query loss at θ″, iMAML's φ*)."""
    theta, support, query = [tm.Tensor(1.0)], np.zeros(1), np.ones(1)
    options = {"alpha": ALPHA, "steps": STEPS}
    results = {
        "MAML": tm.meta.maml(loss, theta, support, query, **options),
        "truncated": tm.meta.truncated(loss, theta, support, query, last=1, **options),
        "FO-MAML": tm.meta.fomaml(loss, theta, support, query, **options),
        "Reptile": tm.meta.reptile(loss, theta, support, query, **options),
        "iMAML": tm.meta.imaml(loss, theta, support, query, lam=LAM, alpha=ALPHA, steps=200, cg_steps=1),
    }
    path = list(tm.meta.trajectory(loss, theta, support, create_graph=True, **options))
    gs = [tm.grad(tm.sum(loss(phi, support)), phi)[0].item() for phi in path[:-1]]
    factors = [tm.grad(tm.sum(after[0]), before)[0].item() for before, after in zip(path, path[1:])]
    pulled = tm.meta.proximal(loss, theta, LAM)
    solution = tm.meta.adapt(pulled, theta, support, alpha=ALPHA, steps=200)[0].item()
    meta_grads = {name: meta_grad[0].item() for name, (_, meta_grad) in results.items()}
    return meta_grads, [phi[0].item() for phi in path], gs, factors, results["MAML"][0].item(), solution


def draw(plt, path):
    meta_grads, phis, gs, factors, query_loss, solution = numbers()
    figure, axis = plt.subplots(figsize=(9.6, 5.2))
    axis.set(xlim=(-1.75, 5.95), ylim=(-6.45, 0.5))
    axis.axis("off")
    forward, back, cut, other = (dict(ec=edge, fc=fill) for edge, fill in (
        ("0.3", "0.95"), ("tab:blue", "#e6f0fa"), ("0.6", "white"), ("tab:green", "#e8f5e8")))  # fmt: skip
    x, loss_x = [0, 1.85, 3.7], 5.35  # of θ, θ′, θ″ and the query loss

    def title(row, text, what):
        axis.text(-1.7, 0.1 - row, text, va="center", fontweight="bold")
        axis.text(-1.7, -0.2 - row, what, va="center", fontsize=7.5, color="0.35")

    def box(at, row, text, style):
        axis.add_patch(plt.Rectangle((at - WIDTH / 2, -row - 0.25), WIDTH, 0.5, lw=1.1, **style))
        axis.text(at, -row, text.replace("-", "−"), ha="center", va="center")

    def arrow(start, end, row, color, above="", below="", ls="-"):
        side = WIDTH / 2 if start < end else -WIDTH / 2
        style = dict(arrowstyle="-|>", color=color, ls=ls, lw=1.3, shrinkA=2, shrinkB=2)
        axis.annotate("", (end - side, -row), (start + side, -row), arrowprops=style)
        for text, up, va in ((above, 0.07, "bottom"), (below, -0.09, "top")):
            axis.text((start + end) / 2, up - row, text, ha="center", va=va, fontsize=7.5, color=color)

    title(0, "forward", "two inner steps")
    for j, (name, phi) in enumerate(zip(("θ", "θ′", "θ″"), phis)):
        box(x[j], 0, f"{name} = {phi:.3f}", forward)
    for j, g in enumerate(gs):
        arrow(x[j], x[j + 1], 0, "0.3", f"− αg{'₀₁'[j]}", f"− {ALPHA * g:.3f}")
    arrow(x[2], loss_x, 0, "0.3")
    box(loss_x, 0, f"$L_q$ = {query_loss:.3f}", forward)
    rows = [("MAML", "the whole product", 0), ("truncated", "the last step only", 1), ("FO-MAML", "no step at all", 2)]
    for row, (name, what, first) in enumerate(rows, 1):
        value = phis[2] - 2
        title(1.15 * row, name, what)
        arrow(loss_x, x[2], 1.15 * row, "tab:blue", "v = ∇$L_q$(θ″)")
        box(x[2], 1.15 * row, f"{value:.3f}", back)
        for j in (1, 0):
            if j >= first:
                value, style = value * factors[j], back
                look = "tab:blue", f"× (1 − αh{'₀₁'[j]})", f"× {factors[j]:.3f}"
            else:
                style, look = cut, ("0.5", "as if × 1", "", ":")
            arrow(x[j + 1], x[j], 1.15 * row, *look)
            box(x[j], 1.15 * row, f"{value:.3f}", style)
        np.testing.assert_allclose(value, meta_grads[name], rtol=1e-12)
    title(4.6, "Reptile", "the way, no query")
    box(x[2], 4.6, f"θ″ = {phis[2]:.3f}", forward)
    arrow(x[2], x[0], 4.6, "tab:green", "θ − θ″ = α (g₀ + g₁)")
    box(x[0], 4.6, f"{meta_grads['Reptile']:.3f}", other)
    title(5.75, "iMAML", "the end, not the way")
    end = (x[1] + x[2]) / 2  # in no column: φ* is none of the θs
    arrow(loss_x, end, 5.75, "tab:green", "∇$L_q$(φ*)", f"{solution - 2:.3f}".replace("-", "−"))
    box(end, 5.75, f"φ* = {solution:.3f}", forward)
    what = f"where $L_s$ + λ/2 (φ − θ)² is least; λ = {LAM:g}"
    axis.text(end, -6.1, what, ha="center", va="top", fontsize=7.5, color="0.35")
    arrow(end, x[0], 5.75, "tab:green", "× 1 / (1 + h(φ*)/λ)", f"× {meta_grads['iMAML'] / (solution - 2):.3f}")
    box(x[0], 5.75, f"{meta_grads['iMAML']:.3f}", other)
    report.write_picture(path, figure, bbox_inches="tight")
    plt.close(figure)


def main(argv=None):
    parser = report.parser(__doc__, "example: python -m benchmarks.chain --out benchmarks/results   (a second or two)")
    args = report.parse(parser, argv, "chain.png")
    meta_grads, *_ = numbers()
    print(*(f"{name:>10} {value:8.4f}" for name, value in meta_grads.items()), sep="\n")
    if args.json:
        report.write_json(args.json, meta_grads, {"alpha": ALPHA, "steps": STEPS, "lam": LAM}, {})
    if plt := report.pyplot():
        draw(plt, args.out / "chain.png")
        print(f"picture: {args.out / 'chain.png'}")


if __name__ == "__main__":
    report.command(main)
