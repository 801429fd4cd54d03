"""Whole random programs: orders 1 to 3 against finite differences, and the recorded graph run again."""

import numpy as np
from hypothesis import given, reject

import tinymeta as tm
from programs import counts, programs, replay


def check(program, order):
    counts["drawn"] += 1
    try:
        tm.check_grads(program, program.xs, order=order, tol=1e-5)
    except tm.KinkError as e:
        if "f itself" in str(e):  # no program branches
            raise
        counts["kinks"] += 1
        reject()


@given(programs())
def test_gradients_and_their_gradients(program):
    check(program, order=2)


@given(programs(max_lines=5))
def test_third_order(program):
    check(program, order=3)


@given(programs())
def test_the_graph_is_a_program(program):
    """The recorded kernels, run again on other inputs, give what the function gives there: the law of tensor.py.

    A mask, a shift or any other value computed on the side would keep what it was at the first inputs.
    """

    counts["drawn"] += 1

    def all_orders(*xs):
        ys = program(*xs)
        g = tm.vjp(ys, xs, [np.ones(y.shape) for y in ys], create_graph=True)
        gg = tm.vjp(g, xs, [np.ones(x.shape) for x in xs], create_graph=True)
        return [*ys, *g, *gg]

    here = [tm.Tensor(x) for x in program.xs]
    there = [0.7 - x for x in program.xs]
    with np.errstate(all="ignore"):
        recorded = replay(all_orders(*here), here, there)
        fresh = all_orders(*map(tm.Tensor, there))
    for a, b in zip(
        recorded, fresh
    ):  # to rounding: BLAS adds up x @ x.T differently if it sees that both are one array
        np.testing.assert_allclose(a, b.data, rtol=1e-10, atol=1e-10)
