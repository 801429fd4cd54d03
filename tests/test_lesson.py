"""The lessons: what they print is what an independent computation gives, and what they claim of the engines holds."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import tinymeta as tm
from tinymeta.__main__ import main
from tinymeta.lesson import first_order
from tinymeta.lesson.first_order import First, Second

ROOT = Path(__file__).parents[1]


# ---- explain ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text():
    """What the command prints in a terminal that knows ASCII alone."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "TERM": "dumb"}
    command = [sys.executable, "-m", "tinymeta", "explain"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?"


def printed(text, label):
    """All numbers and vectors that follow `label` in the text."""
    found = re.findall(rf"(?<![\w.]){re.escape(label)} +(?:= )?(\([-\d., ]+\)|{NUMBER}(?!\w))", text)
    assert found, f"{label} is not in the output"
    return [np.array(re.findall(NUMBER, value), float) for value in found]


def test_it_fits_a_terminal(text):
    lines = text.splitlines()
    assert text.isascii() and len(lines) <= 72 and max(map(len, lines)) <= 80
    assert not any(line != line.rstrip() for line in lines)


def test_one_number_is_the_chain_rule_by_hand(text):
    t, alpha, slopes = 1.0, 0.1, []
    text = text[: text.index("VECTOR")]
    for k, mark in enumerate(("", "'")):
        g, h = t**3, 3 * t**2
        for label, value in ((f"theta{mark}", t), (f"g{k}", g), (f"h{k}", h)):
            np.testing.assert_allclose(printed(text, label)[0], [value], atol=1e-6)
        slopes.append(1 - alpha * h)
        t -= alpha * g
    v = t - 2
    for k in (1, 0):
        (line,) = re.findall(rf"v <- \(1 - alpha h{k}\) v = (.*) \* (.*) = (.*)", text)
        np.testing.assert_allclose(np.array(line, float), [slopes[k], v, slopes[k] * v], atol=1e-6)
        v = slopes[k] * v
    np.testing.assert_allclose(printed(text, "theta''")[0], [t], atol=1e-6)
    np.testing.assert_allclose(printed(text, "dL_q/dtheta''")[0], [t - 2], atol=1e-6)
    for label in ("meta-gradient", "finite difference"):
        np.testing.assert_allclose(printed(text, label)[0], [v], atol=1e-6)
    assert printed(text, "relative error")[0] < 1e-8


SUPPORT = np.array([0.5, 1.0, 1.5]), np.array([1.0, 1.4, 1.5])
QUERY = np.array([0.8, 2.0]), np.array([1.2, 1.6])


def slope(theta, data):
    """∇ of mean (a tanh(b x) − y)², by hand."""
    (a, b), (x, y) = theta, data
    u = np.tanh(b * x)
    r = a * u - y
    return 2 * np.array([np.mean(r * u), np.mean(r * a * x * (1 - u**2))])


def curvature(theta, data):
    """Its Hessian, by hand."""
    (a, b), (x, y) = theta, data
    u = np.tanh(b * x)
    r, du = a * u - y, x * (1 - u**2)
    ab = np.mean(du * (a * u + r))
    return 2 * np.array([[np.mean(u * u), ab], [ab, np.mean((a * du) ** 2 - 2 * r * a * du * x * u)]])


def test_a_vector_is_the_chain_of_hessian_vector_products(text):
    text, alpha, lam, eye = text[text.index("VECTOR") :], 0.4, 2.0, np.eye(2)
    thetas = [np.array([0.5, 0.8])]
    for k, mark in enumerate(("", "'")):
        g = slope(thetas[-1], SUPPORT)
        for label, value in ((f"theta{mark}", thetas[-1]), (f"g{k}", g)):
            np.testing.assert_allclose(printed(text, label)[0], value, atol=1e-5)
        thetas.append(thetas[-1] - alpha * g)
    v = slope(thetas[-1], QUERY)
    chain = [v]
    for k in (1, 0):
        hv = curvature(thetas[k], SUPPORT) @ v
        v = v - alpha * hv
        np.testing.assert_allclose(printed(text, f"H{k} v")[0], hv, atol=1e-5)
        np.testing.assert_allclose(printed(text, f"v - alpha H{k} v")[0], v, atol=1e-5)
        chain.append(v)
    phi = thetas[0]
    for _ in range(30):  # Newton's method
        matrix = curvature(phi, SUPPORT) + lam * eye
        phi = phi - np.linalg.solve(matrix, slope(phi, SUPPORT) + lam * (phi - thetas[0]))
    implicit = np.linalg.solve(eye + curvature(phi, SUPPORT) / lam, slope(phi, QUERY))
    expected = {
        "theta''": thetas[2], "v": chain[0], "meta-gradient": chain[2], "finite differences": chain[2],
        "maml": chain[2], "truncated": chain[1], "fomaml": chain[0], "reptile": thetas[0] - thetas[2], "imaml": implicit,
    }  # fmt: skip
    for label, value in expected.items():
        np.testing.assert_allclose(printed(text, label)[0], value, atol=1e-5, err_msg=label)
    assert printed(text, "relative error")[0] < 1e-8


def test_relu_has_mixed_second_derivatives(text):
    text = text[text.index("relu") :]
    numbers = [printed(text, label)[0] for label in ("d2f/dx2", "d2f/dw1dw2", "d2f/dw1dx", "x", "w2")]
    np.testing.assert_array_equal(np.ravel(numbers), [0, 1.5, -0.4, 1.5, -0.4])


def test_the_command(capsys, tmp_path, text):
    main(["explain", "--svg", str(tmp_path / "graph.svg")])
    assert capsys.readouterr().out == text and ElementTree.parse(tmp_path / "graph.svg")
    for args, code, message in (
        ([], 2, "required: command"),
        (["show"], 2, "invalid choice: 'show'"),
        (["explain", "--steps", "3"], 2, "unrecognized arguments: --steps 3"),
        (["explain", "--svg", str(tmp_path / "graph.svg" / "in_a_file")], 1, "graph.svg"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(args)
        errors = capsys.readouterr().err
        assert stop.value.code == code and message in errors and len(errors.splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "explain" in capsys.readouterr().out


# ---- from first order to second; the examples in the file are doctests -------------------------------------------------


def program(a, b, c):
    d = a * b + 2
    e = d * d + c * d + a
    return e * d * e + e + c


def test_both_engines_agree_with_tinymeta():
    values = 0.7, -1.3, 0.4
    firsts, seconds, tensors = ([kind(v) for v in values] for kind in (First, Second, tm.Tensor))
    program(*firsts).backward()
    expected = [g.item() for g in tm.grad(program(*tensors), tensors)]
    np.testing.assert_allclose([x.grad for x in firsts], expected, rtol=1e-12)
    np.testing.assert_allclose([g.data for g in first_order.grad(program(*seconds), seconds)], expected, rtol=1e-12)


def test_all_third_derivatives_agree_with_tinymeta():
    seconds, tensors = ([kind(v) for v in (0.7, -1.3, 0.4)] for kind in (Second, tm.Tensor))
    ys, zs = [program(*seconds)], [program(*tensors)]
    for _ in range(3):
        ys = [g for y in ys for g in first_order.grad(y, seconds)]
        zs = [g for z in zs for g in tm.grad(z, tensors, create_graph=True)]
        np.testing.assert_allclose([y.data for y in ys], [z.item() for z in zs], rtol=1e-10)


def test_visits_recurse_and_serial_numbers_dont():
    x, y = First(1), Second(1)
    first, second = x, y
    for _ in range(5000):
        first, second = first + x, second + y
    with pytest.raises(RecursionError):
        first.backward()
    assert first_order.grad(second, [y])[0].data == 5001


def test_a_float_gradient_leads_nowhere():
    x = First(2)
    (x * x * x).backward()
    assert type(x.grad) is float
    again = First(x.grad)
    again.backward()
    assert x.grad == 12 and again.inputs == ()


def test_the_list_of_changes_quotes_the_code():
    source = Path(first_order.__file__).read_text(encoding="utf-8")
    engines = [source[source.index(f"class {name}") :].split("\n# ")[0] for name in ("First", "Second")]
    rows = re.findall(r"(?m)^# \d +(\S.*?)  +(\S.*)$", source)
    assert len(rows) == 5
    for row in (rows[0], rows[1], rows[3]):  # the others are in words
        assert all(quoted.removesuffix("...") in engine for quoted, engine in zip(row, engines)), row
