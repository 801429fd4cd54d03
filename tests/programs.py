"""Random programs: a hypothesis strategy for whole graphs of ops, and `replay`, which runs a recorded graph again."""

from collections import Counter

import numpy as np
from hypothesis import strategies as st

import tinymeta as tm

counts = Counter()  # of test_programs: those drawn, and those discarded as a finite difference would straddle a kink

# Each takes any values: what has a domain is kept inside it by tanh, which also keeps the numbers small.
# All is written in functions of tm and in operators, so that a library with the same functions can run it too.
UNARY = [
    "-{a}",
    "{a} ** 2",
    "{a} ** 3",
    "(1.5 + tm.tanh({a})) ** -1.5",
    "2 - {a} / 3",
    "1 / (1.5 + tm.tanh({a}))",
    "tm.sin({a})",
    "tm.cos({a})",
    "tm.tanh({a})",
    "tm.exp(tm.tanh({a}))",
    "tm.log(1.5 + tm.tanh({a}))",
    "tm.log1p({a} * {a})",
    "tm.sqrt(1.5 + tm.tanh({a}))",
    "tm.softplus({a})",
    "tm.sigmoid({a})",
    "tm.relu({a})",
    "tm.abs({a})",
    "(1.5 + tm.tanh({a})) ** {a}",
    "{a}[None]",
    "tm.transpose({a})",
    "tm.squeeze({a})",
    "tm.reshape({a}, -1)",
    "tm.reshape({a}, {shape}[::-1])",
    "tm.broadcast_to({a}, (2, *{shape}))",
    "tm.sum({a})",
    "tm.mean({a})",
    "tm.max({a})",
    "tm.min({a})",
    "tm.logsumexp({a})",
    "tm.pad({a}, 1)",
    "tm.pad({a}, (0, 1))",
    "tm.stack([{a}, tm.sin({a})])",
]
WITH_AXIS = [  # also need an axis to work on
    "tm.sum({a}, axis={axes}, keepdims={k})",
    "tm.mean({a}, axis={axes}, keepdims={k})",
    "tm.max({a}, axis={axes}, keepdims={k})",
    "tm.min({a}, axis={axes}, keepdims={k})",
    "tm.logsumexp({a}, axis={axes}, keepdims={k})",
    "tm.softmax({a}, axis={i})",
    "tm.log_softmax({a}, axis={i})",
    "tm.concatenate([{a}, tm.sin({a})], axis={i})",
    "tm.stack([tm.cos({a}), {a}], axis={i})",
    "tm.swapaxes({a}, {i}, -1)",
    "tm.transpose({a}, {order})",
    "tm.sum_to({a}, {shape}[1:])",
    "tm.sum_to({a}, (1, *{shape}[1:]))",
    "{a}[..., :1]",
    "{a}[0]",
    "tm.gather({a}, (..., slice(None, None, -1)))",
    "tm.gather({a}, [0, -1, 0])",
    "tm.gather({a}, (..., {last}))",
    "tm.scatter({a}, {positions}, (3, *{shape}[1:]))",
]
BINARY = [
    "{a} + {b}",
    "{a} - {b}",
    "{a} * {b}",
    "{a} / (1.5 + tm.tanh({b}))",
    "(1.5 + tm.tanh({a})) ** {b}",
    "{a} * tm.sign({b})",
    "tm.where({a} > {b}, {a}, tm.sin({b}))",
    "tm.where({a} * {b} > 0, {a} * {b}, {b})",
    "tm.where(({a} < {b}) | ({b} >= 0.5), {b}, 0.25)",
]
MATRIX = ["{a} @ tm.transpose({a})", "tm.tanh({a}) @ tm.transpose({a})"]
STACKS = ["tm.matmul({a}, tm.swapaxes({a}, -1, -2))", "tm.matmul(tm.swapaxes({a}, -1, -2), tm.sin({a}))"]
PRODUCT = ["tm.matmul({a}, {b})", "{a} @ tm.cos({b})"]


def fits(f, a, b):
    """Does NumPy's f take these shapes?"""
    try:
        return f(a.data, b.data) is not None
    except ValueError:
        return False


class Program:
    """Inputs and lines of source, so that a failing one reads like a program."""

    def __init__(self, shapes, seed):
        rng = np.random.default_rng(seed)
        self.names = "xyz"[: len(shapes)]
        self.xs = [rng.uniform(-1.2, 1.2, shape) for shape in shapes]
        self.lines = []

    def __call__(self, *xs, tm=tm):
        values = {"tm": tm, **dict(zip(self.names, xs))}
        for line in self.lines:
            exec(line, values)
        return [values[name] for name in self.results()]

    def results(self):
        """The values that no later line reads: all that was computed counts, some of it several times."""
        names = [line.split(" = ")[0] for line in self.lines]
        last = [name for i, name in enumerate(names) if not any(name in line for line in self.lines[i + 1 :])]
        return last or self.names

    def __repr__(self):
        inputs = [f"{name} = Tensor of shape {x.shape}" for name, x in zip(self.names, self.xs)]
        return "\n" + "\n".join([*inputs, *self.lines, "return " + ", ".join(self.results())]) + "\n"


@st.composite
def completed(draw, form, a, b, shape):
    """The form with its names and, where it has any, its axes and positions."""
    axes = st.integers(-len(shape), len(shape) - 1)
    each = st.lists(axes, min_size=1, max_size=len(shape), unique_by=lambda i: i % len(shape))
    fields = {
        "i": axes,
        "axes": axes | each.map(tuple),
        "k": st.booleans(),
        "order": st.permutations(range(len(shape))),
        "positions": st.lists(st.integers(0, 2), min_size=shape[0], max_size=shape[0]) if shape else None,
        "last": st.lists(st.integers(-shape[-1], shape[-1] - 1), min_size=1, max_size=3) if shape else None,
    }
    drawn = {name: draw(field) for name, field in fields.items() if "{" + name + "}" in form}
    return form.format(a=a, b=b, shape=shape, **drawn)


@st.composite
def programs(draw, max_lines=7):
    base = draw(st.sampled_from([(), (3,), (2, 3), (1,), (3, 3), (2, 1, 2), (2, 3, 2)]))
    shapes = []
    for _ in range(draw(st.integers(1, 3))):  # shapes that broadcast against each other: sizes of 1, axes missing
        shape = [draw(st.sampled_from([n, n, 1])) for n in base]
        shapes.append(tuple(shape[draw(st.sampled_from([0, 0, len(shape) // 2, len(shape)])) :]))
    program = Program(shapes, draw(st.integers(0, 10**6)))
    values = dict(zip(program.names, map(tm.Tensor, program.xs)), tm=tm)
    for i in range(draw(st.integers(2, max_lines))):
        names = [name for name in values if name not in ("tm", "__builtins__")]
        a, b = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        x, y = values[a], values[b]
        forms = UNARY + BINARY * fits(np.add, x, y) + WITH_AXIS * (x.ndim > 0) + MATRIX * (x.ndim in (1, 2))
        forms = forms + STACKS * (x.ndim > 1) + PRODUCT * fits(np.matmul, x, y)
        line = f"v{i} = " + draw(completed(draw(st.sampled_from(forms)), a, b, x.shape))
        exec(line, values)  # legal in NumPy's eyes, so a refusal is a failure
        if values[f"v{i}"].size > 24:
            del values[f"v{i}"]
            continue
        program.lines.append(line)
    return program


def replay(outputs, leaves, arrays):
    """Run the graph of `outputs` again with other arrays in its leaves, every kernel into a buffer of garbage."""
    values = {leaf.serial: array for leaf, array in zip(leaves, arrays)}
    for z in tm.tensor.graph(*outputs):
        if z.inputs:
            out = np.frombuffer(b"\x7f" * z.data.nbytes, np.uint8).copy().view(z.dtype).reshape(z.shape)
            result = z.kernel(*[values[x.serial] for x in z.inputs], out=out)
            assert result is out
            values[z.serial] = out
        else:
            values.setdefault(z.serial, z.data)
    return [values[y.serial] for y in outputs]
