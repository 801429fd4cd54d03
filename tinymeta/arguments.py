"""What comes in: types, shapes, axes, numbers, lists and functions, and in which words they are refused.

Arrays are checked by Tensor, and whether they fit together by the ops. A setting is checked where it comes in, by its
name, and refused in one sentence with what came: a TypeError for another kind of thing, a ValueError for its value.
"""

import operator
import sys

import numpy as np

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))  # what can be differentiated
DATA = tuple(np.dtype(code) for code in "?bBhHiIlLqQ")  # masks, labels, indices: carried along, never differentiated
NUMBERS = (int, float, np.integer, np.floating)
LARGEST = sys.float_info.max


def describe(x):
    """What came, in a few words."""
    if isinstance(x, (type, np.dtype)) or x is None:
        return f"{x!r:.60}"
    name = "array" if type(x) is np.ndarray else type(x).__name__
    kind = f"an {name}" if name[0] in "aeiou" else f"a {name}"
    if isinstance(x, (bool, int, float, complex, str)):
        return f"{kind}, {x!r:.40}"
    return f"{kind} of {x.dtype}, shape {x.shape}" if hasattr(x, "dtype") and hasattr(x, "shape") else kind


def refusal(op, inputs, error):
    """The error that a kernel has raised, with the op's name and what it was called on."""
    kind = next((kind for kind in (TypeError, IndexError) if isinstance(error, kind)), ValueError)
    return kind(f"{op} of {', '.join(map(describe, inputs))}: {error}")


def items(name, xs, remedy=None):
    """A list, of any iterable but an array, text, a dict or a set."""
    if hasattr(xs, "dtype") or isinstance(xs, (str, dict, set)) or not hasattr(xs, "__iter__"):
        raise TypeError(f"{name} is a list of Tensors, got {describe(xs)}: write {remedy or f'[{name}]'}")
    return list(xs)


def type_of(dtype, known=FLOATS + DATA):
    """One of the known types, as NumPy's object."""
    try:
        found = None if dtype is None else np.dtype(dtype)  # NumPy takes None for float64
    except (TypeError, ValueError):
        found = None
    if found is None or found not in known:
        also = ", integers or booleans" if known != FLOATS else ""
        raise TypeError(f"dtype must be float32, float64{also}, got {describe(dtype)}")
    return found


def shape_of(*shape):
    """A shape, or axes, given as a tuple or list, or as numbers."""
    shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], (int, np.integer)) else shape
    try:
        return tuple(map(operator.index, shape))
    except TypeError:
        came = shape if isinstance(shape, (tuple, list)) else describe(shape)
        raise TypeError(f"a shape and axes are whole numbers, got {came}") from None


def axes_of(axis, x):
    """An axis argument (None, a number, several; negative from the end) as a sorted tuple."""
    if axis is None:
        return tuple(range(x.ndim))
    if type(axis) is int and -x.ndim <= axis < x.ndim:
        return (axis % x.ndim,)
    given = shape_of(axis)
    axes = {a + x.ndim if a < 0 else a for a in given}
    if len(axes) < len(given) or any(not 0 <= a < x.ndim for a in axes):
        raise ValueError(
            f"axis {axis} of shape {x.shape}: it has {x.ndim} axes, counted from 0 or, backward, from -1,"
            " and each may be named once"
        )
    return tuple(sorted(axes))


def axis_of(axis, x):
    axes = axes_of(axis, x)
    if len(axes) != 1:
        raise ValueError(f"axis {axis} of shape {x.shape}: one axis is needed here")
    return axes[0]


def whole(least=0, **numbers):
    """Each is a whole number, not below `least`."""
    for name, n in numbers.items():
        if not isinstance(n, (int, np.integer)) or isinstance(n, bool):
            error = ValueError if isinstance(n, NUMBERS) else TypeError
            raise error(f"{name} must be {least} or more, a whole number, got {describe(n)}")
        if not least <= n <= sys.maxsize:
            raise ValueError(f"{name} must be {least} or more, got {str(n)[:40]}")


def finite(least=None, positive=False, **numbers):
    """Each is a number, neither NaN nor infinite, not below `least`. A 0-d array or Tensor is a number.

    Where a function is compiled, the value is that of its first call.
    """
    for name, x in numbers.items():
        array = hasattr(x, "dtype") and hasattr(x, "item")  # a Tensor has them too
        if (x.shape or x.dtype.kind not in "iuf") if array else (not isinstance(x, NUMBERS) or isinstance(x, bool)):
            raise TypeError(f"{name} must be a number, got {describe(x)}")
        value = x.item() if array else x
        fits = value > 0 if positive else least is None or value >= least
        if not (fits and -LARGEST <= value <= LARGEST):
            expected = "positive and " if positive else "" if least is None else f"{least} or more and "
            raise ValueError(f"{name} must be {expected}finite, got {str(value)[:40]}")


def function(**functions):
    for name, f in functions.items():
        if not callable(f):
            raise TypeError(f"{name} must be a function, got {describe(f)}")


def generator(rng):
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a np.random.Generator, e.g. np.random.default_rng(0), got {describe(rng)}")
