"""What MAML, FO-MAML and Reptile have in common, by numbers: the Taylor analysis of Nichol et al. 2018, section 5.1.

k minibatches of one task with losses L_1 … L_k. Their gradients and Hessians at θ are ḡ_i and H̄_i. From φ_1 = θ come
φ_{i+1} = φ_i − α L_i'(φ_i). The k-th loss stands for the query in MAML and FO-MAML, which therefore take k − 1 steps.

    g_MAML    = ∂L_k(φ_k)/∂θ      = ḡ_k   − α H̄_k Σ_{j<k} ḡ_j − α Σ_{j<k} H̄_j ḡ_k  + O(α²)
    g_FOMAML  = L_k'(φ_k)         = ḡ_k   − α H̄_k Σ_{j<k} ḡ_j                      + O(α²)
    g_Reptile = (θ − φ_{k+1}) / α = Σ ḡ_i − α Σ_i H̄_i Σ_{j<i} ḡ_j                  + O(α²)

First experiment: the left sides by tinymeta.meta, the right ones by tm.grad and tm.hvp. Their difference must fall with
slope 2 against α in a doubly logarithmic plot; an error in either order would show as slope 0 or 1.

In expectation over minibatches in random order only two directions remain, AvgGrad = E ḡ_i, which lowers the expected
loss, and AvgGradInner = E H̄_i ḡ_j with i ≠ j, the gradient of E ½ ḡ_i·ḡ_j, against which a step makes the gradients of
a task agree:

    E g = c₀ AvgGrad − c₁ α AvgGradInner + O(α²)        c₀ = 1, 1, k,   c₁ = 2 (k − 1), k − 1, ½ k (k − 1)

Second experiment: c₀ and c₁ by regression. A draw is a wave, a pool of its minibatches and random sequences of k of
them without replacement. AvgGrad and AvgGradInner are means over the whole pool and all its ordered pairs: an error in
them would pull the coefficients toward 0. Each draw is seen at α and at −α: what is odd in α is then the first order,
freed of the scatter of ḡ and of α².

Takes about a minute, in float64, on a tanh network.
"""

import time

import numpy as np

import tinymeta as tm
from benchmarks import report
from benchmarks.report import at_least
from tinymeta.tasks import sinusoid

METHODS = {"maml": "MAML", "fomaml": "FO-MAML", "reptile": "Reptile"}
COEFFICIENTS = {  # Nichol et al. 2018, section 5.1: c₀, c₁
    "maml": lambda k: (1, 2 * (k - 1)),
    "fomaml": lambda k: (1, k - 1),
    "reptile": lambda k: (k, k * (k - 1) / 2),
}
KS = (2, 3, 4, 5)
SIZES, POINTS = (1, 20, 20, 1), 10  # the network; the points of a minibatch
ALPHAS = np.logspace(-1, -5, 9)
ASYMPTOTIC = 1e-4  # slopes are of smaller α: with larger ones α ‖H̄‖ is not small
ALPHA, POOL, SEQUENCES = 1e-4, 10, 20  # of the second experiment: minibatches of a pool, sequences of a draw


def loss(phi, data):
    x, y = data
    return tm.nn.mse(tm.nn.mlp(phi, x, activation=tm.tanh), y)


def initial(rng):
    return tm.nn.init_mlp(rng, SIZES, np.float64, scale=1.0)


def minibatches(rng, n):
    """n minibatches of one wave: (x, y), both (n, POINTS, 1)."""
    x, y = sinusoid.draw_points(rng, sinusoid.draw_waves(rng, 1), n * POINTS, dtype=np.float64)
    return x.reshape(n, POINTS, 1), y.reshape(n, POINTS, 1)


def meta_gradient(name, theta, data, alpha):
    """g as above, a vector: its mean over sequences. data: (x, y), both (sequences, k, POINTS, 1)."""
    x, y = data
    k = x.shape[1]

    def batch(support, i):
        return tuple(part[:, i] for part in support)

    steps = k if name == "reptile" else k - 1
    _, g = getattr(tm.meta, name)(loss, theta, data, (x[:, -1], y[:, -1]), alpha=alpha, steps=steps, batch=batch)
    return flat(g) / alpha if name == "reptile" else flat(g)


def flat(xs):
    return tm.concatenate([x.reshape(-1) for x in xs])


# ---- gradients and Hessians at θ -------------------------------------------------------------------------------------


def at_theta(theta, data):
    """ḡ, (n, parameters), of n minibatches, and the function v ↦ H̄ v, row by row. data: (x, y), both (n, POINTS, 1)."""
    phi = [tm.broadcast_to(t, (len(data[0]), *t.shape)) for t in theta]  # a copy of θ for each: see tinymeta.meta.adapt
    phi = tm.stop_gradient(phi)

    def total(*phi):
        return tm.sum(loss(phi, data))

    def rows(stacks):
        return np.concatenate([s.data.reshape(len(s), -1) for s in stacks], axis=1)

    def hessian_products(v):
        parts = np.split(v, np.cumsum([t.size for t in theta])[:-1], axis=1)
        return rows(tm.hvp(total, phi, [part.reshape(p.shape) for part, p in zip(parts, phi)]))

    return rows(tm.grad(total(*phi), phi)), hessian_products


def expansion(name, theta, data):
    """(e₀, e₁) of g = e₀ − α e₁ + O(α²) for the sequence data, (x, y), both (k, POINTS, 1)."""
    g, hessian_products = at_theta(theta, data)
    earlier = np.cumsum(g, axis=0) - g  # Σ_{j<i} ḡ_j
    first = hessian_products(earlier)  # H̄_i Σ_{j<i} ḡ_j
    if name == "reptile":
        return g.sum(axis=0), first.sum(axis=0)
    if name == "fomaml":
        return g[-1], first[-1]
    through_steps = hessian_products(np.broadcast_to(g[-1], g.shape))[:-1]  # H̄_j ḡ_k: back through step j
    return g[-1], first[-1] + through_steps.sum(axis=0)


def averages(theta, pool):
    """AvgGrad and AvgGradInner of a pool of minibatches: the means of ḡ_i, and of H̄_i ḡ_j over all i ≠ j."""
    g, hessian_products = at_theta(theta, pool)
    others = (g.sum(axis=0) - g) / (len(g) - 1)  # the mean of ḡ_j over j ≠ i
    return g.mean(axis=0), hessian_products(others).mean(axis=0)


# ---- the experiments -------------------------------------------------------------------------------------------------


def errors(seed):
    """{method: {k: {"error": ‖g − expansion‖ / ‖e₀‖ at each of ALPHAS, "slope"}}}"""
    result = {name: {} for name in METHODS}
    for k in KS:
        rng = np.random.default_rng([seed, 0])
        theta, data = initial(rng), minibatches(rng, k)
        for name in METHODS:
            e0, e1 = expansion(name, theta, data)
            one = tuple(part[None] for part in data)
            exact = [meta_gradient(name, theta, one, alpha).data for alpha in ALPHAS]
            error = [np.linalg.norm(g - (e0 - a * e1)) / np.linalg.norm(e0) for g, a in zip(exact, ALPHAS)]
            small = ALPHAS <= ASYMPTOTIC * 1.001
            slope = np.polyfit(np.log(ALPHAS[small]), np.log(error)[small], 1)[0]
            result[name][k] = {"error": error, "slope": slope}
    return result


def coefficients(seed, draws):
    """{method: {k: {"estimate": (c₀, c₁), "half_width": 95 % of each, "exact"}}}"""
    result = {name: {} for name in METHODS}
    compiled = {name: tm.compile(lambda theta, data, alpha, name=name: meta_gradient(name, theta, data, alpha))
                for name in METHODS}  # fmt: skip
    for k in KS:
        rng = np.random.default_rng([seed, k])
        theta = initial(rng)
        design, observed = [], {name: [] for name in METHODS}
        for _ in report.progress(f"k = {k}", draws, lambda: "draws"):
            pool = minibatches(rng, POOL)
            sequences = rng.permuted(np.tile(np.arange(POOL), (SEQUENCES, 1)), axis=1)[:, :k]
            data = tuple(part[sequences] for part in pool)
            avg_grad, avg_grad_inner = averages(theta, pool)
            design.append([(avg_grad, -alpha * avg_grad_inner) for alpha in (ALPHA, -ALPHA)])
            for name, g in observed.items():
                g.append([compiled[name](theta, data, np.array(alpha)).data for alpha in (ALPHA, -ALPHA)])
        for name, g in observed.items():
            estimate, half_width = regress(np.array(design), np.array(g))
            exact = COEFFICIENTS[name](k)
            result[name][k] = {"estimate": estimate.tolist(), "half_width": half_width.tolist(), "exact": exact}
    return result


def regress(design, g):
    """Least squares for c in g = Σ_r c_r design_r, and 1.96 standard errors: (coefficients,) each.

    design (draws, 2, coefficients, parameters), g (draws, 2, parameters). The errors within a draw are anything but
    independent: the sandwich estimate sums them up draw by draw.
    """
    inverse = np.linalg.inv(np.einsum("dsrp,dstp->rt", design, design))
    c = inverse @ np.einsum("dsrp,dsp->r", design, g)
    score = np.einsum("dsrp,dsp->dr", design, g - np.einsum("dsrp,r->dsp", design, c))
    covariance = inverse @ score.T @ score @ inverse * len(g) / (len(g) - 1)
    return c, 1.96 * np.sqrt(np.diag(covariance))


# ---- tables and picture ----------------------------------------------------------------------------------------------


def tables(errors, coefficients, draws):
    lines = [f"error of the expansion / α², relative to the term without α; slope of the error for α ≤ {ASYMPTOTIC:g}"]
    lines.append(f"{'':>9}  k  " + "".join(f"{f'α={a:.0e}':>10}" for a in ALPHAS[::2]) + "    slope (2 expected)")
    for name, by_k in errors.items():
        for k, e in by_k.items():
            cells = "".join(f"{error / a**2:10,.1f}" for error, a in list(zip(e["error"], ALPHAS))[::2])
            lines.append(f"{METHODS[name]:>9}  {k}  {cells}    {e['slope']:.3f}")
    lines.append(f"\nE g = c₀ AvgGrad − c₁ α AvgGradInner, by regression over {draws} draws, ± 95 %")
    lines.append(f"{'':>9}  k  {'c₀':>9} {'±':>8}   exact  {'c₁':>9} {'±':>8}   exact")
    missed = 0
    for name, by_k in coefficients.items():
        for k, e in by_k.items():
            c, half, exact = e["estimate"], e["half_width"], e["exact"]
            missed += sum(abs(c[r] - exact[r]) > half[r] for r in (0, 1))
            cells = "  ".join(f"{c[r]:9.4f} {half[r]:8.4f}  {exact[r]:6g}" for r in (0, 1))
            lines.append(f"{METHODS[name]:>9}  {k}  {cells}")
    n = 2 * sum(map(len, coefficients.values()))
    lines.append(f"{n - missed} of {n} intervals hold the exact value")
    return "\n".join(lines)


def draw(plt, errors, coefficients, path):
    """Errors against α with lines of slope 2, and both coefficients against k with those of the paper."""
    figure, (left, *right) = plt.subplots(1, 3, figsize=(11, 4), width_ratios=(1.3, 1, 1))
    colours = dict(zip(METHODS, ("tab:blue", "tab:orange", "tab:green")))
    for name, colour in colours.items():
        for k, marker in zip(KS, "os^D"):
            left.plot(ALPHAS, errors[name][k]["error"], marker, color=colour, ms=4, mfc="none")
            left.plot(ALPHAS, errors[name][k]["error"][-1] * (ALPHAS / ALPHAS[-1]) ** 2, color=colour, lw=0.6)
    for name, colour in colours.items():
        left.plot([], [], color=colour, label=METHODS[name])
    left.plot([], [], color="black", lw=0.6, label="slope 2")
    for k, marker in zip(KS, "os^D"):
        left.plot([], [], marker, color="black", ms=4, mfc="none", label=f"{k} minibatches")
    left.set(xscale="log", yscale="log", ylim=(1e-10, 1e3), xlabel="inner step α")
    left.set_ylabel("error, relative to the term without α")
    left.set_title("error of the expansion to first order in α")
    left.legend(frameon=False, ncols=2, fontsize=8, loc="upper left")
    ends = np.array([KS[0] - 0.3, KS[-1] + 0.3])
    for r, (axis, what) in enumerate(zip(right, ("c₀, of AvgGrad", "c₁, of −α AvgGradInner"))):
        for i, (name, colour) in enumerate(colours.items()):
            k_line = np.linspace(*ends)
            axis.plot(k_line, [COEFFICIENTS[name](k)[r] for k in k_line], color=colour, lw=0.8)
            c, half = (np.array([coefficients[name][k][key][r] for k in KS]) for key in ("estimate", "half_width"))
            shift = 0.06 * (i - 1)  # intervals of equal coefficients side by side
            axis.errorbar(np.array(KS) + shift, c, half, fmt="o", color=colour, ms=3.5, capsize=3, label=METHODS[name])
        axis.set(title=what, xlabel="minibatches k", xticks=KS)
    right[0].legend(frameon=False, title="points: regression, ± 95 %\nlines: the analysis", alignment="left")
    figure.tight_layout()
    report.write_picture(path, figure)
    plt.close(figure)


def main(argv=None):
    parser = report.parser(
        __doc__, "Writes taylor.png. Example: python -m benchmarks.taylor --draws 100   (10 seconds)"
    )
    parser.add_argument("--draws", type=at_least(2), default=1000, metavar="N", help="of the regression (default 1000)")
    args = report.parse(parser, argv, "taylor.png")
    start = time.perf_counter()
    results = errors(args.seed), coefficients(args.seed, args.draws)
    print(tables(*results, args.draws))
    seconds = time.perf_counter() - start
    if args.json:
        settings = {"seed": args.seed, "draws": args.draws, "sizes": SIZES, "points": POINTS, "alphas": ALPHAS.tolist(),
                    "alpha": ALPHA, "pool": POOL, "sequences": SEQUENCES}  # fmt: skip
        figures = dict(zip(("errors", "coefficients"), results))
        report.write_json(args.json, figures, settings, {"total": round(seconds)})
    plt = report.pyplot()
    if plt:
        draw(plt, *results, args.out / "taylor.png")
        print(f"picture: {args.out / 'taylor.png'}")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    report.command(main)
