"""What follows from `vjp` without a new rule: Jacobian-vector products, Hessian-vector products, Hessians.

A Jacobian-vector product is the vjp of a vjp with respect to its cotangent, in which it is linear; a Hessian-vector
product is the vjp of a gradient, as Hᵀ = H.
"""

import numpy as np

from .arguments import describe, function, items
from .tensor import Tensor, grad, vjp


def jvp(f, xs, tangents):
    """(f(*xs), Σ_i ∂f/∂x_i ẋ_i): the value, and its change along the tangents ẋ, which are shaped like xs.

    u ↦ g(u) = (∂f/∂x)ᵀ u is linear, so its own vjp with ẋ is (∂g/∂u)ᵀ ẋ = (∂f/∂x) ẋ, whatever u was.
    Both results can be differentiated.
    """
    y, xs = value(f, xs)
    if not isinstance(y, Tensor):
        raise TypeError(f"jvp: f returns one Tensor, got {describe(y)}")
    u = Tensor(np.zeros_like(y.data))
    g = vjp(y, xs, u, create_graph=True)
    return y, vjp(g, [u], directions("tangents", tangents, xs), create_graph=True)[0]


def hvp(f, xs, vs, *, create_graph=False):
    """H v for the Hessian H of a scalar f(*xs), a list like xs: H v = ∂⟨∇f, v⟩/∂x. H itself is never formed.

    Takes about three gradients' time, one for the graph of ∇f and two for the walk through it. vs are shaped like xs.
    """
    y, xs = value(f, xs)
    g = grad(y, xs, create_graph=True)
    return vjp(g, xs, directions("vs", vs, xs), create_graph=create_graph)


def value(f, xs):
    function(f=f)
    xs = items("xs", xs)
    twice = lambda x: isinstance(x, Tensor) and [x is y for y in xs].count(True) > 1  # ==, and so xs.count, is an op
    xs = [x[...] if twice(x) else x for x in xs]  # at each position it is an argument of its own
    return f(*xs), xs


def directions(name, vs, xs):
    vs = items(name, vs)
    shapes = [Tensor(v).shape for v in vs]
    if shapes != [x.shape for x in xs]:
        raise ValueError(f"{name} must be one direction for each x: of shapes {[x.shape for x in xs]}, not {shapes}")
    return vs


def hessian(f, xs):
    """[[∂²f/∂x_i ∂x_j]] of a scalar f(*xs): H[i][j] has shape x_i.shape + x_j.shape. One vjp per element of xs.

    The results are leaves.
    """
    (y, xs), rows = value(f, xs), []
    for g in grad(y, xs, create_graph=True):
        products = [vjp(g, xs, e) for e in np.eye(g.size, dtype=g.dtype).reshape(g.size, *g.shape)]
        blocks = [np.array([p[j].data for p in products], g.dtype) for j in range(len(xs))]
        rows.append([Tensor(block.reshape(g.shape + x.shape)) for block, x in zip(blocks, xs)])
    return rows
