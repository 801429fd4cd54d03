"""The error of iMAML's and MAML's meta-gradient against inner steps, after Rajeswaran et al. 2019, Figure 2a.

Tasks are linear regressions y = X w without noise, so the inner problem L_s(φ) + λ/2 ‖φ − θ‖² is a quadratic and
everything is known by hand: with H the Hessian of L_s and H_q, w_q those of the query loss,

    φ* = (H + λI)⁻¹ (H w + λ θ),      ∇F = mean over tasks of λ (H + λI)⁻¹ H_q (φ* − w_q)

Gradient descent leaves φ − φ* = (I − α (H + λI))^steps (θ − φ*). Back-propagation through it, which is MAML on this
objective, has that factor once more, in ∂φ/∂θ; iMAML has it in φ alone, plus what CG leaves.

Prints the error, ‖meta-gradient − ∇F‖ / ‖∇F‖, of both, with gradient descent and with Nesterov's method inside, beside
the published values, and the order of iMAML's error in ‖φ − φ*‖, which the paper proves to be 1. The paper's dimension,
condition number, λ and step size are not known to us. Ours are chosen so that its picture appears, which therefore
confirms no number of it: one large eigenvalue, to which CG takes one step and which keeps gradient descent's α small,
and 49 close to each other.
"""

import time
from functools import partial

import numpy as np

import tinymeta as tm
from benchmarks import report

TASKS, POINTS = 4, 50
EIGENVALUES = np.append(np.linspace(1.8, 2.65, 49), 90.0)  # of H: κ = 50
LAM = 1.0
ALPHA = 1 / (EIGENVALUES.max() + LAM)
KAPPA = (EIGENVALUES.max() + LAM) / (EIGENVALUES.min() + LAM)  # of H + λI
STEPS = range(0, 101, 5)
MU = (KAPPA**0.5 - 1) / (KAPPA**0.5 + 1)
NESTEROV = partial(tm.solvers.nesterov, mu=MU)

PUBLISHED = {  # Rajeswaran et al. 2019, Figure 2a, read off the picture to ± 0.01
    "MAML": {40: 1.27, 50: 0.80, 60: 0.52, 70: 0.36, 80: 0.25, 90: 0.18, 100: 0.135},
    "iMAML, CG = 2": {
        25: 0.95, 30: 0.75, 40: 0.48, 50: 0.32, 60: 0.22, 70: 0.18, 80: 0.156, 90: 0.150, 100: 0.153
    },
    "iMAML, CG = 5": {
        25: 0.99, 30: 0.79, 40: 0.505, 50: 0.34, 60: 0.23, 70: 0.166, 80: 0.120, 90: 0.090, 100: 0.070
    },
}  # fmt: skip
PUBLISHED["iMAML, CG = 10"] = PUBLISHED["iMAML, CG = 5"]  # the curves lie on each other


# ---- the problem, and its solution by hand ---------------------------------------------------------------------------


def problem(seed):
    """(theta, support, query, w): X (tasks, n, 50) of Hessian 2 XᵀX/n with the eigenvalues above, y = X w."""
    rng, d = np.random.default_rng(seed), len(EIGENVALUES)
    axes = np.linalg.qr(rng.standard_normal((TASKS, d, d)))[0]
    theta, w = rng.standard_normal((d, 1)), rng.standard_normal((TASKS, d, 1))

    def data():
        x = np.linalg.qr(rng.standard_normal((TASKS, POINTS, d)))[0] * np.sqrt(POINTS / 2 * EIGENVALUES)
        x = x @ axes.swapaxes(1, 2)
        return x, x @ w

    return [tm.Tensor(theta)], data(), data(), w


def by_hand(theta, support, query, w):
    """(φ*, ∇F) from the closed forms."""
    h, h_query = (2 * x.swapaxes(1, 2) @ x / POINTS for x, _ in (support, query))
    pulled = h + LAM * np.eye(len(theta))
    phi = np.linalg.solve(pulled, h @ w + LAM * theta)
    return phi, np.mean(LAM * np.linalg.solve(pulled, h_query @ (phi - w)), axis=0)


# ---- meta-gradients --------------------------------------------------------------------------------------------------


def loss(phi, data):
    x, y = data
    return tm.nn.mse(tm.matmul(x, phi[0]), y)


def maml(theta, support, query, steps, rule):
    """MAML's meta-gradient on the proximal objective. θ comes in twice, as the start and as the centre of the pull."""

    def pulled_loss(params, data):
        phi, centre = params
        x, y, lam = data
        return loss([phi], (x, y)) + lam / 2 * tm.sum((phi - centre) ** 2, axis=(1, 2))

    def phi_alone(params, grads, state=None, *, lr):
        phi, state = rule(params[:1], grads[:1], state, lr=lr)
        return [*phi, params[1] + 0.0], state  # a new node, or each step's walk would go back to the first

    support, query = (*support, np.full(TASKS, LAM)), (*query, np.zeros(TASKS))
    _, meta_grad = tm.meta.maml(
        pulled_loss, [theta[0], tm.Tensor(theta[0].data.copy())], support, query, alpha=ALPHA, steps=steps,
        rule=phi_alone,
    )  # fmt: skip
    return meta_grad[0].data + meta_grad[1].data


def imaml(theta, support, query, steps, rule, cg_steps):
    _, (meta_grad,), _ = tm.meta.imaml(
        loss, theta, support, query, lam=LAM, alpha=ALPHA, steps=steps, cg_steps=cg_steps, rule=rule, report=True
    )
    return meta_grad.data


CURVES = {
    "MAML": partial(maml, rule=tm.solvers.sgd),
    **{f"iMAML, CG = {k}": partial(imaml, rule=tm.solvers.sgd, cg_steps=k) for k in (2, 5, 10)},
    "MAML, Nesterov": partial(maml, rule=NESTEROV),
    "iMAML, Nesterov, CG = 10": partial(imaml, rule=NESTEROV, cg_steps=10),
}


def errors_by_steps(theta, support, query, w):
    """{curve: [relative error after each of STEPS]}"""
    exact = by_hand(theta[0].data, support, query, w)[1]
    return {
        name: [relative_error(curve(theta, support, query, steps), exact) for steps in STEPS]
        for name, curve in CURVES.items()
    }


def relative_error(meta_grad, exact):
    return float(np.linalg.norm(meta_grad - exact) / np.linalg.norm(exact))


SOLVERS = {  # of the inner problem: step size, option of `adapt`, numbers of steps
    "gradient descent": (ALPHA, {"rule": tm.solvers.sgd}, range(0, 601, 100)),
    "momentum": (ALPHA, {"rule": partial(tm.solvers.momentum, mu=MU)}, range(10, 111, 20)),
    "Nesterov": (ALPHA, {"rule": NESTEROV}, range(5, 106, 20)),
    "Adam": (0.02, {"rule": tm.solvers.adam}, range(50, 501, 75)),
    "Hessian-free": (0.5, {"solve": partial(tm.solvers.hessian_free, cg_steps=10)}, range(1, 28, 4)),
}


def errors_by_delta(theta, support, query, w):
    """{solver: [(δ, error of the implicit gradient)]}, CG converged. δ, the paper's, is the r.m.s. of ‖φ − φ*‖."""
    star, exact = by_hand(theta[0].data, support, query, w)
    objective = tm.meta.proximal(loss, theta, LAM)
    result = {}
    for name, (alpha, how, all_steps) in SOLVERS.items():
        result[name] = []
        for steps in all_steps:
            phi = tm.meta.adapt(objective, theta, support, alpha=alpha, steps=steps, **how)
            _, (meta_grad,) = tm.meta.implicit_gradient(loss, phi, support, query, lam=LAM, cg_steps=20)
            delta = float(np.sqrt(np.mean(np.sum((phi[0].data - star) ** 2, axis=(1, 2)))))
            result[name].append((delta, relative_error(meta_grad.data, exact)))
    return result


def fitted_slope(points):
    """d log error / d log δ by least squares, over points clear of rounding."""
    delta, error = np.log([p for p in points if p[0] > 1e-9]).T
    return float(np.polyfit(delta, error, 1)[0])


def crossing(errors):
    """The number of steps from which MAML is better than iMAML with CG = 2, between two of STEPS by the logarithms."""
    gap = np.log(errors["MAML"]) - np.log(errors["iMAML, CG = 2"])
    after = [i for i in range(1, len(gap)) if gap[i - 1] > 0 >= gap[i]]
    if not after:
        return None
    i = after[-1]
    return float(np.interp(0, [gap[i], gap[i - 1]], [STEPS[i], STEPS[i - 1]]))


# ---- table, picture, command -----------------------------------------------------------------------------------------


def table(errors):
    shown = [25, 30, 40, 50, 60, 70, 80, 90, 100]
    lines = ["error of the meta-gradient after inner steps", f"{'':>26}" + "".join(f"{k:>8}" for k in shown)]
    for name, values in errors.items():
        of_step = dict(zip(STEPS, values))
        cells = (f"{of_step[k]:8.3f}" if of_step[k] > 0.001 else f"{of_step[k]:8.0e}" for k in shown if k in of_step)
        lines.append(f"{name:>26}" + "".join(cells))
        if name in PUBLISHED:
            lines.append(f"{'published':>26}" + "".join(f"{PUBLISHED[name].get(k, ''):>8}" for k in shown))
    return "\n".join(lines)


def draw(plt, errors, orders, path):
    """Error against steps, as published; and against the distance from φ*, for every inner solver."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2))
    for name, color in zip(errors, ["tab:red", "tab:orange", "tab:blue", "tab:cyan", "tab:red", "tab:cyan"]):
        styles = dict(ls="--") if "Nesterov" in name else dict(lw=3, alpha=0.5) if name == "iMAML, CG = 10" else {}
        left.plot(STEPS, errors[name], color=color, label=name, **styles)
        if name in PUBLISHED and name != "iMAML, CG = 10":
            left.plot(*zip(*PUBLISHED[name].items()), "x", ms=5, color=color)
    left.plot([], [], "x", ms=5, color="gray", label="published")
    left.set(xlabel="inner steps", ylabel="relative error of the meta-gradient", xlim=(0, 100), ylim=(0, 1.75))
    left.set_title("by inner steps, of gradient descent if none is named", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    for (name, points), marker in zip(orders.items(), "osD^v"):
        points = [p for p in points if p[0] > 1e-9]
        right.plot(*zip(*points), marker, ms=4, label=f"{name}: slope {fitted_slope(points):.2f}")
    delta, error = orders["gradient descent"][0]
    ends = np.array([1e-8, delta])
    right.plot(ends, ends * error / delta, color="gray", lw=0.8, zorder=0, label="slope 1")
    right.set(xscale="log", yscale="log", xlabel="‖φ − φ*‖, root mean square over tasks")
    right.set_title("iMAML, 20 CG steps: by how far φ is from φ*, for each inner solver", fontsize=9)
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    report.write_picture(path, figure)
    plt.close(figure)


def main(argv=None):
    parser = report.parser(
        __doc__, "Writes implicit.png. Example: python -m benchmarks.implicit   (5 to 20 seconds on 2 cores)"
    )
    args = report.parse(parser, argv, "implicit.png")
    start = time.perf_counter()
    tasks = problem(args.seed)
    errors, orders = errors_by_steps(*tasks), errors_by_delta(*tasks)
    slopes = {name: fitted_slope(points) for name, points in orders.items()}
    settings = {
        "seed": args.seed, "tasks": TASKS, "points": POINTS, "dimension": len(EIGENVALUES),
        "kappa of H": EIGENVALUES.max() / EIGENVALUES.min(), "kappa of H + lam I": KAPPA, "lam": LAM, "alpha": ALPHA,
        "mu": MU,
    }  # fmt: skip
    print(", ".join(f"{key} = {value:.4g}" for key, value in settings.items()))
    print("(the paper's dimension, κ, λ and step size are not known to us)\n")
    print(table(errors))
    cross = crossing(errors)
    when = f"from {cross:.0f} steps on" if cross else "nowhere up to 100 steps"
    print(f"\nMAML is better than iMAML with CG = 2 {when}; published: from about 95")
    print("d log error / d log ‖φ − φ*‖: " + ", ".join(f"{name} {slope:.3f}" for name, slope in slopes.items()))
    seconds = time.perf_counter() - start
    if args.json:
        figures = {"steps": list(STEPS), "errors": errors, "crossing": cross, "by_delta": orders}
        report.write_json(args.json, {**figures, "slopes": slopes}, settings, {"total": round(seconds)})
    plt = report.pyplot()
    if plt:
        draw(plt, errors, orders, args.out / "implicit.png")
        print(f"picture: {args.out / 'implicit.png'}")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    report.command(main)
