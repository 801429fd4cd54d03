"""How the loss at θⁿ gets back to θ: one meta-gradient taken apart. `python -m tinymeta explain` prints it.

The numbers are computed when they are printed. No derivative is written down here; the engine finds them all.
"""

import numpy as np

import tinymeta as tm


def explain():
    """The walk-through as text: lines of at most 80 columns, ASCII."""
    return "\n".join([one_number(), a_vector(), relu()])


def descend(loss, theta, alpha, steps):
    """[θ, θ′, ...] and the gradients on the way, all of one graph."""
    thetas, grads = [theta], []
    for _ in range(steps):
        grads += tm.grad(loss(thetas[-1]), thetas[-1:], create_graph=True)
        thetas.append(thetas[-1] - alpha * grads[-1])
    return thetas, grads


def differences(f, theta, step=1e-5):
    """The gradient of f at theta by central differences, an array."""
    moves = step * np.eye(theta.size).reshape(theta.size, *theta.shape)
    slopes = [(f(theta + move) - f(theta - move)).item() / (2 * step) for move in moves]
    return np.reshape(slopes, theta.shape)


def show(x):
    x = x.data if isinstance(x, tm.Tensor) else x
    return f"{x:.6f}" if np.ndim(x) == 0 else f"({', '.join(f'{value:8.5f}' for value in x)})"


def error(x, numeric):
    return f"relative error {np.max(np.abs(x.data - numeric)) / np.max(np.abs(numeric)):.0e}"


# ---- one number ------------------------------------------------------------------------------------------------------


def support_loss(t):
    return t**4 / 4


def query_loss(t):
    return (t - 2) ** 2 / 2


def one_number(alpha=0.1):
    theta = tm.Tensor(1.0)
    (_, theta1, theta2), (g0, g1) = descend(support_loss, theta, alpha, steps=2)
    (h0,), (h1,) = tm.grad(g0, [theta]), tm.grad(g1, [theta1])
    (v2,) = tm.grad(query_loss(theta2), [theta2])
    v1 = (1 - alpha * h1) * v2
    v0 = (1 - alpha * h0) * v1
    (whole,) = tm.grad(query_loss(theta2), [theta])
    numeric = differences(lambda t: query_loss(descend(support_loss, t, alpha, steps=2)[0][-1]), theta)
    return f"""\
HOW THE LOSS AT theta'' GETS BACK TO theta

L_s = phi^4/4 on the support, L_q = (phi - 2)^2/2 on the query. Two inner steps
from phi = theta, phi <- phi - alpha g with g = dL_s/dphi, alpha = {alpha}:

    theta   = {show(theta)}     g0 = {show(g0)}
    theta'  = {show(theta1)}     g1 = {show(g1)}
    theta'' = {show(theta2)}     dL_q/dtheta'' = {show(v2)} = v

How far does theta'' move with theta? g changes with phi at a rate h, the second
derivative of L_s, so each step passes a change on times 1 - alpha h. The graph
of g is still there; differentiated it gives h0 = {show(h0)}, h1 = {show(h1)}.
Back up, by the chain rule, with one factor for each step, the last step first:

    v <- (1 - alpha h1) v = {show(1 - alpha * h1)} * {show(v2)} = {show(v1)}
    v <- (1 - alpha h0) v = {show(1 - alpha * h0)} * {show(v1)} = {show(v0)}

tm.grad(L_q(theta''), [theta]) does all of this in one walk through the graph:

    meta-gradient        {show(whole)}
    finite difference    {show(numeric)}   of all together; {error(whole, numeric)}
"""


# ---- a vector --------------------------------------------------------------------------------------------------------

SUPPORT = np.array([[0.5, 1.0, 1.5]]), np.array([[1.0, 1.4, 1.5]])
QUERY = np.array([[0.8, 2.0]]), np.array([[1.2, 1.6]])


def loss(params, data):
    """Mean squared error of a tanh(b x), for params = [(a, b)] of each task: (tasks, 2) -> (tasks,)."""
    (theta,), (x, y) = params, data
    return tm.mean((theta[..., :1] * tm.tanh(theta[..., 1:] * x) - y) ** 2, axis=-1)


def a_vector(alpha=0.4, lam=2.0):
    L, Q = (lambda theta, data=data: loss([theta], data)[0] for data in (SUPPORT, QUERY))
    theta = tm.Tensor([0.5, 0.8])
    (_, theta1, theta2), (g0, g1) = descend(L, theta, alpha, steps=2)
    (v2,) = tm.grad(Q(theta2), [theta2])
    (h1_v,) = tm.vjp(g1, [theta1], v2)
    H1 = tm.hessian(L, [theta1])[0][0].data
    v1 = v2 - alpha * h1_v
    (h0_v,) = tm.vjp(g0, [theta], v1)
    v0 = v1 - alpha * h0_v
    (whole,) = tm.grad(Q(theta2), [theta])
    numeric = differences(lambda t: Q(descend(L, t, alpha, steps=2)[0][-1]), theta)

    def result(algorithm, **options):
        options = {"alpha": alpha, "steps": 2, **options}
        _, (meta_grad,) = algorithm(loss, [theta], SUPPORT, QUERY, **options)
        return show(meta_grad)

    return f"""\
THE SAME FOR A VECTOR

theta = (a, b), prediction a tanh(b x); L_s and L_q are mean squared errors on
three and two points; alpha = {alpha}. The factor of a step is now I - alpha H, with
the Hessian H of L_s, a matrix that nobody forms: v <- v - alpha H v needs a
product alone. tm.vjp(g, [theta], v), one walk through the graph of g, gives
H^T v, and H^T = H.

    theta   = {show(theta)}     g0 = {show(g0)}
    theta'  = {show(theta1)}     g1 = {show(g1)}
    theta'' = {show(theta2)}     v  = {show(v2)}

    H1 = {show(H1[0])}    at theta', formed here only to be looked at
         {show(H1[1])}

    H1 v = {show(h1_v)}    v <- v - alpha H1 v = {show(v1)}
    H0 v = {show(h0_v)}    v <- v - alpha H0 v = {show(v0)}

    meta-gradient        {show(whole)}
    finite differences   {show(numeric)}   {error(whole, numeric)}

What the algorithms of tm.meta make of this chain:

    maml        {result(tm.meta.maml)}  v, through both steps
    truncated   {result(tm.meta.truncated, last=1)}  v, through the last step only
    fomaml      {result(tm.meta.fomaml)}  v as it was: each step counts as I
    reptile     {result(tm.meta.reptile)}  theta - theta'' = alpha (g0 + g1); no v
    imaml       {result(tm.meta.imaml, lam=lam, steps=200, cg_steps=2)}  (I + H/lambda)^-1 dL_q/dphi at phi*

iMAML goes elsewhere: to phi*, where L_s + lambda/2 |phi - theta|^2 is least
(lambda = {lam:g}). There g + lambda (phi* - theta) = 0 whatever theta is, which tells
how phi* moves with theta. The path that led to phi* plays no part.
"""


# ---- relu ------------------------------------------------------------------------------------------------------------


def relu(x=1.5, w1=0.7, w2=-0.4):
    h = tm.hessian(lambda x, w1, w2: w2 * tm.relu(w1 * x), [tm.Tensor(x), tm.Tensor(w1), tm.Tensor(w2)])
    xx, w1w2, w1x = (f"{block.item():g}" for block in (h[0][0], h[1][2], h[1][0]))
    return f"""\
WITH relu, WHOSE SECOND DERIVATIVE IS 0?

f = w2 relu(w1 x) has at x = {x}, w1 = {w1}, w2 = {w2} the second derivatives
d2f/dx2 = {xx}, but d2f/dw1dw2 = {w1w2} = x and d2f/dw1dx = {w1x} = w2: what a weight
does depends on the others. H is not 0, and FO-MAML leaves it out."""


# ---- the picture -----------------------------------------------------------------------------------------------------


def picture(alpha=0.1):
    """One inner step of the first example, the query loss, and the meta-gradient: their graph, as SVG."""
    theta = tm.Tensor(1.2)
    support = support_loss(theta)
    (g,) = tm.grad(support, [theta], create_graph=True)
    theta1 = theta - alpha * g
    query = query_loss(theta1)
    v, meta_grad = tm.grad(query, [theta1, theta], create_graph=True)
    names = {"θ": theta, "L_s": support, "g": g, "θ′": theta1, "L_q": query, "v": v, "∂L_q/∂θ": meta_grad}
    return tm.draw([support, query, meta_grad], names=names, format="svg")
