"""From first order to second: what must change in an engine until its gradients have gradients.

`First` is the engine that everybody writes first: numbers that remember what they were made from, each with its
derivative in `.grad`, a float, and with a closure that adds to the `.grad` of its inputs.

>>> x = First(2)
>>> y = x * x * x
>>> y.backward()
>>> x.grad                                          # 3x²: a float, and nothing tells that it came from x
12.0
>>> y.backward()                                    # again, without resetting every .grad
>>> x.grad
32.0

`Second` does the same with as few changes as possible, and can be differentiated to any order:

>>> x = Second(2)
>>> y, values = x * x * x, []
>>> for _ in range(5):
...     (y,) = grad(y, [x])
...     values.append(y.data)
>>> values                                          # 3x², 6x, 6, 0, 0
[12.0, 12.0, 6.0, 0.0, 0.0]

So it can do MAML, where a gradient is part of what is differentiated. One inner step φ = θ − 0.1 L_s′(θ) from θ = 1:

>>> def support(t):                                 # L_s = θ⁴/4:  L_s′ = θ³ = 1,  L_s″ = 3θ² = 3
...     return t * t * t * t * 0.25
>>> def query(t):                                   # L_q = (φ − 2)²/2:  L_q′ = φ − 2 = −1.1
...     return (t + -2) * (t + -2) * 0.5
>>> theta = Second(1)
>>> (g,) = grad(support(theta), [theta])
>>> grad(query(theta + g * -0.1), [theta])[0].data  # (1 − 0.1 · 3) · −1.1
-0.77
>>> F = lambda t: query(t + t**3 * -0.1)            # and by the finite difference
>>> (F(1 + 1e-5) - F(1 - 1e-5)) / 2e-5
-0.77

`First` has a float for g, a constant as far as the second `backward` can see. It can do first-order MAML:

>>> theta = First(1)
>>> support(theta).backward()
>>> g, theta.grad = theta.grad, 0.0
>>> query(theta + g * -0.1).backward()
>>> theta.grad
-1.1
"""

import itertools


class First:
    def __init__(self, data, inputs=()):
        self.data, self.inputs, self.push = float(data), inputs, lambda: None
        self.grad = 0.0

    def __add__(x, y):
        y = y if isinstance(y, First) else First(y)
        z = First(x.data + y.data, (x, y))

        def push():
            x.grad += z.grad
            y.grad += z.grad

        z.push = push
        return z

    def __mul__(x, y):
        y = y if isinstance(y, First) else First(y)
        z = First(x.data * y.data, (x, y))

        def push():
            x.grad += z.grad * y.data
            y.grad += z.grad * x.data

        z.push = push
        return z

    def backward(self):
        order, seen = [], set()

        def visit(z):
            if z not in seen:
                seen.add(z)
                for x in z.inputs:
                    visit(x)
                order.append(z)

        visit(self)
        self.grad = 1.0
        for z in reversed(order):  # z's own .grad must be complete before z hands it on
            z.push()


# Why can `x.grad` not be differentiated? `z.grad * y.data` multiplies two floats: the value is right, and that it was a
# product with y is known to nobody. First(x.grad) would be a new number that depends on nothing. So:
#
#     First                            Second
# 1   x.grad += z.grad * y.data        z_bar * y
#         A product of nodes, recorded like any other: a pullback is written in the engine's own ops. This is the whole
#         idea; the rest makes room for it.
# 2   x.grad += ...                    bars[x.serial] + x_bar
#         A sum is a new node. To change one in place would change it for those that were computed from it.
# 3   .grad on every number            a dict that belongs to the walk, and grad(y, xs) returns what was asked for
#         The second walk passes the numbers of the first. In a common .grad the two would add up: 32 above is 12 from
#         each call, and 8 more because x·x still held its own. There is nothing to reset, either.
# 4   self.grad = 1.0                  Second(1)
#         The seed is a node, or the first product would be none.
# 5   a sort, by visiting              sorted by serial number
#         An input is older than its output, so the order of creation will do. The visits recurse, and Python gives up
#         at a depth of 1000, which graphs of gradients soon reach.


class Second:
    serials = itertools.count()

    def __init__(self, data, inputs=(), pullbacks=()):
        self.data, self.inputs, self.pullbacks = float(data), inputs, pullbacks
        self.serial = next(Second.serials)

    def __add__(x, y):
        y = y if isinstance(y, Second) else Second(y)
        return Second(x.data + y.data, (x, y), (lambda z_bar: z_bar, lambda z_bar: z_bar))

    def __mul__(x, y):
        y = y if isinstance(y, Second) else Second(y)
        return Second(x.data * y.data, (x, y), (lambda z_bar: z_bar * y, lambda z_bar: z_bar * x))


def grad(y, xs):
    """[∂y/∂x for x in xs], each a Second."""
    nodes, todo = {}, [y]
    while todo:
        z = todo.pop()
        if z.serial not in nodes:
            nodes[z.serial] = z
            todo.extend(z.inputs)
    bars = {y.serial: Second(1)}
    for serial in sorted(nodes, reverse=True):
        z = nodes[serial]
        for x, pullback in zip(z.inputs, z.pullbacks):
            x_bar = pullback(bars[serial])
            bars[x.serial] = bars[x.serial] + x_bar if x.serial in bars else x_bar
    return [bars.get(x.serial, Second(0)) for x in xs]


def shared(a, b):
    """c + d + cd with c = a + b, d = ab: c and d are each used twice, and a and b reach y by several ways.

    Both engines visit a number only when all that it flows into has been visited. Handing derivatives on as they come
    in, by recursion alone, passes the first part of c's and d's twice:

    >>> a, b = First(2), First(3)
    >>> shared(a, b).backward()
    >>> a.grad, b.grad
    (25.0, 19.0)
    >>> a, b = Second(2), Second(3)
    >>> [g.data for g in grad(shared(a, b), [a, b])]
    [25.0, 19.0]
    >>> def hand_on(z):
    ...     z.push()
    ...     for x in z.inputs:
    ...         hand_on(x)
    >>> a, b = First(2), First(3)
    >>> y = shared(a, b)
    >>> y.grad = 1.0
    >>> hand_on(y)
    >>> a.grad, b.grad
    (29.0, 22.0)
    """
    c, d = a + b, a * b
    return c + d + c * d


# From Second to tinymeta it is five more steps, none of which changes the idea.
#
# Arrays (ops.py). What is new is broadcasting: x̄ must have the shape of x, so broadcasting is an op of its own, whose
#   pullback sums. Linear ops come in such pairs, each the other's pullback.
# What depends on a value is a node (ops.py). Batch norm's variance, saved as an array, would be a constant: right in
#   the first derivative, silently wrong in the second. relu's mask would be wrong when the graph is run again.
# No closure over its own output (tensor.py). exp's pullback is z_bar * z. First's closures hold the z that holds them,
#   a cycle that only Python's garbage collector frees. The engine hands z to the pullback instead.
# The walk stays on the paths from xs to y (tensor.py). Nobody differentiates the images; and with n inner steps, the
#   gradient of each must not walk back through all before it.
# Saying no (tensor.py). stop_gradient makes a number of a node, and grad records itself only with create_graph=True, or
#   each gradient that one only wants to read would keep its graph.
