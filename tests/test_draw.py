"""Pictures of graphs: sound DOT and SVG, nothing on top of anything else, and the passes told apart."""

import re
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import tinymeta as tm
from tinymeta.draw import arrange, place
from tinymeta.lesson import explain
from tinymeta.tensor import graph


def derivatives(f, x, order):
    """[f(x), f′(x), ...], recorded."""
    ys = [f(x)]
    for _ in range(order):
        ys += tm.grad(ys[-1], [x], create_graph=True)
    return ys


def cube(order=2):
    x = tm.Tensor(2.0)
    return derivatives(lambda x: x**3, x, order), {"x": x}


def maml():
    """One inner step on two parameters, the query loss, and its gradient."""
    w, b = theta = [tm.Tensor(0.8), tm.Tensor(0.3)]

    def loss(phi, x, y):
        return (tm.tanh(phi[0] * x) * phi[1] - y) ** 2

    support = loss(theta, tm.Tensor(1.5), tm.Tensor(0.7))
    g = tm.grad(support, theta, create_graph=True)
    phi = [p - 0.1 * g_i for p, g_i in zip(theta, g)]
    query = loss(phi, tm.Tensor(-0.5), tm.Tensor(0.2))
    meta_grad = tm.grad(query, theta, create_graph=True)
    return [support, query, *meta_grad], {"θ": theta, "g": g, "φ": phi, "∇F": meta_grad, "L_q": query}


def network():
    """A layer with relu, whose mask is a node, and its gradient."""
    x, w, v = (tm.Tensor(np.ones(shape)) for shape in ((4, 2), (2, 3), (3, 1)))
    y = tm.mean(tm.relu(x @ w) @ v)
    return [y, *tm.grad(y, [w, v], create_graph=True)], {"X": x, "W": w, 'v "<&>" \\n': v}


def deep():
    x = tm.Tensor(1.0)
    y = x
    for _ in range(3000):
        y = y + x
    return [y], {}


GRAPHS = {"cube": cube, "maml": maml, "network": network, "deep": deep}


@pytest.fixture(params=GRAPHS)
def example(request):
    return GRAPHS[request.param]()


def read_dot(text):
    """{id: (label, attributes, title of its cluster)} and [(from, to, attributes)], of the DOT that draw writes."""
    nodes, edges, cluster, open_braces = {}, [], "", 0
    attributes = r'\[((?:[a-z]+=(?:[a-z0-9]+|"(?:[^"\\]|\\.)*")(?:, )?)*)\]'
    for line in map(str.strip, text.splitlines()):
        if match := re.fullmatch(r"(?:digraph|subgraph) \w+ \{", line):
            open_braces += 1
        elif line == "}":
            open_braces -= 1
        elif match := re.fullmatch(r'label="([^"]*)";', line):
            cluster = match[1]
        elif match := re.fullmatch(rf"(\w+) -> (\w+)(?: {attributes})?;", line):
            edges.append((match[1], match[2], match[3] or ""))
        else:
            match = re.fullmatch(rf"(\w+) {attributes};", line)
            assert match, f"no DOT: {line}"
            if match[1] != "node":
                label = re.search(r'label="((?:[^"\\]|\\.)*)"', match[2])[1]
                nodes[match[1]] = label, match[2], cluster
    assert open_braces == 0
    return nodes, edges


SVG = "{http://www.w3.org/2000/svg}"


def read_svg(text):
    """The boxes (left, top, right, bottom), the texts (x, y, text), the size."""
    svg = ElementTree.fromstring(text)
    boxes = []
    for e in svg.iter():
        if e.tag == SVG + "rect" and "stroke" in e.attrib:
            x, y, w, h = (float(e.get(k)) for k in ("x", "y", "width", "height"))
            boxes.append((x, y, x + w, y + h))
        elif e.tag == SVG + "polygon":
            xs, ys = zip(*(map(float, point.split(",")) for point in e.get("points").split()))
            boxes.append((min(xs), min(ys), max(xs), max(ys)))
    texts = [(float(e.get("x")), float(e.get("y")), e.text) for e in svg.iter(SVG + "text")]
    return boxes, texts, [float(v) for v in svg.get("viewBox").split()][2:]


def both(ys, **options):
    return tm.draw(ys, **options), tm.draw(ys, format="svg", **options)


def test_dot_is_sound(example):
    ys, names = example
    nodes, edges = read_dot(tm.draw(ys, names=names, limit=10_000))
    drawn = [z for z in graph(*ys) if z.op != "number"]
    assert len(nodes) == len(drawn)
    assert len(edges) == sum(x.op != "number" for z in drawn for x in z.inputs) > 0
    assert all(a in nodes and b in nodes for a, b, _ in edges)


def test_svg_is_sound(example):
    ys, names = example
    boxes, texts, (width, height) = read_svg(tm.draw(ys, names=names, format="svg", limit=200))
    for a, b in combinations(boxes, 2):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1], f"{a} and {b} overlap"
    labels = 0
    for x, y, text in texts:
        half = 3.2 * len(text)  # letters are 6.4 pixels wide on average
        assert 0 <= x - half and x + half <= width and 12 <= y <= height, f"{text} sticks out of the picture"
        around = [(left, right) for left, top, right, bottom in boxes if left < x < right and top < y < bottom]
        labels += len(around)
        assert all(left < x - half and x + half < right for left, right in around), f"{text} sticks out of its box"
    assert labels >= len(boxes)


def edges_of(text):
    """The points of every edge in SVG text, each (n, 2), by the definition of a Bézier curve."""
    t = np.linspace(0, 1, 201)[:, None]
    for path in re.findall(r'<path d="(M[^"]*)" fill="none"', text):
        p = np.array(re.findall(r"-?[0-9.]+", path), float).reshape(-1, 2)
        while len(p) > 1:
            a, b, c, d = p[:4]
            yield (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d
            p = p[3:]


@pytest.mark.parametrize("name", ["picture", "cube", "network"])
def test_no_edge_passes_behind_a_box(name):
    text = explain.picture() if name == "picture" else tm.draw(GRAPHS[name]()[0], format="svg")
    boxes = read_svg(text)[0]
    assert len(list(edges_of(text))) >= 11
    for points in edges_of(text):
        for box in boxes:
            assert not ((points > np.add(box[:2], 1)) & (points < np.subtract(box[2:], 1))).all(axis=1).any(), box


def test_names_values_shapes_and_signs_are_shown():
    ys, names = network()
    for text in both(ys, names=names):
        for expected in ("X", "W", "(4, 2)", "(2, 3)", "24", "∑", "@", "≤ 0", "where(·, 0, ·)", "/ 4"):
            assert expected in text
    ys, names = maml()
    for text in both(ys, names=names):
        for expected in ("θ[0]", "g[1]: ×", "φ[0]: −", "∇F[1]: +", "0.1 ×", "^2", "1 −", "0.8"):
            assert expected in text


def test_names_are_escaped():
    name = 'v "<&>" \\n'
    x = tm.Tensor(np.ones(3))
    ((label, *_),) = read_dot(tm.draw(x, names={name: x}))[0].values()
    assert label == 'v \\"&lt;&amp;&gt;\\" \\\\n\\n(3,)'
    assert name in [text for *_, text in read_svg(tm.draw(x, names={name: x}, format="svg"))[1]]


def test_the_graph_grows_with_the_order():
    counts = [len(read_dot(tm.draw(cube(order)[0]))[0]) for order in range(6)]
    assert all(a < b for a, b in zip(counts, counts[1:])), counts
    x = tm.Tensor(2.0)
    fifth = derivatives(lambda x: tm.sin(x) ** 3, x, 5)
    counts = [len(read_dot(tm.draw(y, limit=10_000))[0]) for y in fifth]
    assert all(1.5 * a < b for a, b in zip(counts, counts[1:])), counts
    assert "5th backward" in tm.draw(fifth[-1], limit=10_000)


def test_time_goes_down_and_back():
    """Forward, first backward, forward, second backward, from left to right; edges down in the forward columns only."""
    ys, names = maml()
    nodes, _ = read_dot(tm.draw(ys, names=names))
    order = {label.split("\\n")[0].split(":")[0]: cluster for label, _, cluster in nodes.values()}
    assert order["θ[0]"] == order["L_q"] == order["φ[1]"] == "forward"
    assert (order["g[0]"], order["∇F[1]"]) == ("1st backward", "2nd backward")
    assert [cluster for label, _, cluster in nodes.values() if label == "1"] == [
        "1st backward",
        "2nd backward",
    ]  # seeds
    columns = arrange(graph(*ys), {})
    edges, width, _ = place(columns)
    assert [column.order for column in columns] == [0, 1, 0, 2]
    borders = [column.left for column in columns] + [width]
    for column, left, right, down in zip(columns, borders, borders[1:], (True, False, True, False)):
        for node in column.nodes:
            assert left < node.x - node.width / 2 and node.x + node.width / 2 < right
            assert all((x.y < node.y) == down for x, _ in node.inputs if x.column is column)
    assert {columns.index(b.column) - columns.index(a.column) for a, b, _ in edges} == {
        0,
        1,
        2,
        3,
    }  # never back in time


def test_passes_are_told_apart_without_colour():
    ys, _ = cube(3)
    nodes, _ = read_dot(tm.draw(ys))
    looks = {}
    for _, attributes, cluster in nodes.values():
        if "white" not in attributes:
            looks.setdefault(cluster, set()).add(tuple(re.findall(r"(?:shape|penwidth)=\w+", attributes)))
    assert len(looks) == 4 and len(set(map(frozenset, looks.values()))) == 4 and {len(v) for v in looks.values()} == {1}
    svg = ElementTree.fromstring(tm.draw(ys, format="svg"))
    frames = [e for e in svg.iter() if e.get("stroke") and e.get("fill") not in ("white", "none")]
    assert len({(e.tag, float(e.get("rx", 0)) > 0, e.get("stroke-width")) for e in frames}) == 4
    assert len({e.get("stroke") for e in frames}) == len({e.get("fill") for e in frames}) == 4


def test_what_has_no_derivative_is_dashed():
    ys, names = network()
    nodes, edges = read_dot(tm.draw(ys, names=names))
    dashed = {i for i, (_, attributes, _) in nodes.items() if "dashed" in attributes}
    (mask,) = dashed
    assert nodes[mask][0].startswith("≤ 0")
    assert [a for a, b, attributes in edges if "dashed" in attributes and b != mask] == [mask, mask]  # by both wheres
    assert [b for a, b, attributes in edges if "dashed" in attributes and a != mask] == [mask]
    assert tm.draw(ys, format="svg").count('stroke-dasharray="4,3"') == 1 + 3
    x = tm.Tensor(2.0)
    (cut,) = tm.grad(x**3, [x])
    for z in (cut, tm.stop_gradient(x * x)):
        assert "dashed" in tm.draw(z) and len(read_dot(tm.draw(z))[0]) == 1
    assert "dashed" not in tm.draw(x)


def test_what_is_left_out_is_said():
    ys, _ = deep()
    for text in both(ys, names={"y": ys[0]}):
        assert "2501 older nodes are not drawn (limit=500)" in text and "y: +" in text
    nodes, edges = read_dot(tm.draw(ys))
    assert len(nodes) == 500 and all(a in nodes and b in nodes for a, b, _ in edges)
    assert "not drawn" not in tm.draw(ys, limit=3001)
    assert all("not drawn" not in text for text in both(cube()[0]))


def test_the_same_graph_gives_the_same_text():
    for make in (maml, network):
        first, second = make(), make()  # with other serial numbers
        assert both(first[0], names=first[1]) == both(second[0], names=second[1])


def test_bad_arguments():
    x = tm.Tensor(2.0)
    (g,) = tm.grad(x**3, [x])
    for y, options, kind, message in (
        (x, {"names": {"x": 2.0}}, TypeError, "names maps printable text to Tensors.*'x': a float"),
        (x, {"names": {"a\nb": x}}, TypeError, "names maps printable text"),
        (g, {"names": {"θ": [x]}}, ValueError, r"y was not computed from θ\[0\]: draw it beside y"),
        (x, {"format": "png"}, ValueError, "format is 'dot' or 'svg', got 'png'"),
        (x, {"limit": 0}, ValueError, "limit must be 1 or more, got 0"),
        ([], {}, TypeError, "draw takes a Tensor or a list of them, got none"),
        ([x, 2.0], {}, TypeError, "draw takes a Tensor or a list of them, got a Tensor.*, a float"),
    ):
        with pytest.raises(kind, match=message):
            tm.draw(y, **options)


def test_the_picture_in_the_results_is_up_to_date():
    path = Path(__file__).parents[1] / "benchmarks/results/maml_graph.svg"
    assert path.read_text(encoding="utf-8") == explain.picture(), f"run: python -m tinymeta explain --svg {path.name}"
