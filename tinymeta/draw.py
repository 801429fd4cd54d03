"""Draw a graph of Tensors: the forward pass, the backward passes that were recorded, and how they hang together.

The picture is the engine's own record. A Tensor knows its inputs, and its `origin` tells which backward pass made it:
none, the first, the second, ... Time goes from left to right, with a column for each stretch of forward computation and
for each backward pass. Forward columns are read downward, backward ones upward: a step of MAML goes down to the support
loss, up to its gradient, down to the query loss, and up again through all of that.

Layout after Sugiyama, Tagawa and Toda (1981): levels by longest path, order within a level by barycentres.
"""

import html
from bisect import bisect
from xml.etree import ElementTree

from .arguments import describe, items, whole
from .ops import number
from .tensor import Tensor, graph

# of forward, first, second and all later passes: fill and line, distinct in grey too, and the shape in DOT
LOOKS = [
    ("#f2f2f2", "#444444", "box"),
    ("#d9ecfa", "#0072b2", "ellipse"),
    ("#fde6d3", "#c04e00", "octagon"),
    ("#dbf3e7", "#007f5c", "octagon, penwidth=3"),
]
SIGNS = {
    "add": "+", "subtract": "−", "multiply": "×", "divide": "/", "negative": "−", "power": "^", "matmul": "@",
    "sum": "∑", "equal": "=", "not_equal": "≠", "less": "<", "less_equal": "≤", "greater": ">", "greater_equal": "≥",
    "logical_and": "∧", "logical_or": "∨", "logical_not": "¬", "stopped": "stop", "broadcast_to": "broadcast",
}  # fmt: skip
PITCH, TOP, GAP, LINE, LETTER = 58, 60, 16, 15, 7.2  # pixels between levels, above the first, between boxes, of text


def draw(y, *, names=None, format="dot", limit=500):
    """The graph that y, a Tensor or a list of them, was computed from: DOT text, or SVG that needs no Graphviz.

    A node shows its name, its op with the numbers that were written into the formula, as "× 0.1", and its shape, or the
    value of a single number. Inputs are white. Nodes without a derivative (masks, indices, what was cut or stopped) are
    dashed, as are edges through which none flows. Frames are square in the forward pass, round in the first backward
    pass, octagonal in the second, thick from the third on. Gradients are nodes if create_graph=True recorded them.

    names: {"θ": theta, ...}; a list of Tensors becomes θ[0], θ[1], ... limit: of more nodes the newest are drawn, and
    the picture says how many are not. Raises TypeError or ValueError for arguments that don't fit, and for a name that
    is not in the graph.

    >>> import tinymeta as tm
    >>> x = tm.Tensor(2.0)
    >>> print(tm.draw(x**3, names={"x": x}))
    digraph tinymeta {
      node [style=filled, fontname="sans-serif"];
      subgraph cluster_0 {
        label="forward";
        n0 [label="x\\n2", shape=box, color="#444444", fillcolor="white"];
        n1 [label="^3\\n8", shape=box, color="#444444", fillcolor="#f2f2f2"];
      }
      n0 -> n1;
    }
    """
    roots = [y] if isinstance(y, Tensor) else items("y", y)
    if not roots or not all(isinstance(z, Tensor) for z in roots):
        raise TypeError(f"draw takes a Tensor or a list of them, got {', '.join(map(describe, roots)) or 'none'}")
    if format not in ("dot", "svg"):
        raise ValueError(f"format is 'dot' or 'svg', got {format!r}")
    whole(1, limit=limit)
    tensors = graph(*roots)
    named = by_serial({} if names is None else names, {z.serial for z in tensors})
    wanted = {z.serial for z in roots} | named.keys()
    tensors = [z for z in tensors if z.kernel is not number or z.serial in wanted]
    older = max(len(tensors) - limit, 0)
    note = f"{older} older nodes are not drawn (limit={limit})" if older else ""
    return (to_dot if format == "dot" else to_svg)(arrange(tensors[older:], named), note)


def by_serial(names, serials):
    """{serial: name}, all checked to be in the graph."""
    if not isinstance(names, dict):
        raise TypeError(f"names maps printable text to Tensors or lists of them, got {describe(names)}")
    pairs, named = [], {}
    for name, value in names.items():
        many = isinstance(value, (list, tuple))
        pairs += [(f"{name}[{i}]", z) for i, z in enumerate(value)] if many else [(name, value)]
    for name, z in pairs:
        if not isinstance(z, Tensor) or not isinstance(name, str) or not name.isprintable():
            raise TypeError(f"names maps printable text to Tensors or lists of them, got {name!r}: {describe(z)}")
        if z.serial not in serials:
            remedy = "draw it beside y, draw([y, ...]); gradients are in a graph if create_graph=True recorded them"
            raise ValueError(f"names: y was not computed from {name}: {remedy}")
        named[z.serial] = name
    return named


# ---- layout ----------------------------------------------------------------------------------------------------------


class Column:
    """A stretch of forward computation, or a backward pass, with its Nodes."""

    def __init__(self, order):
        self.order, self.down, self.nodes = order, -1 if order else 1, []
        self.title = f"{order}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(order, 'th') } backward" if order else "forward"


class Node:
    """A box. inputs: pairs of a Node and whether a derivative flows back to it."""

    def __init__(self, z, name, inputs):
        self.inputs, self.leaf, self.order, self.near = inputs, not z.inputs, z.origin[0] if z.origin else 0, []
        fill, self.line, self.shape = LOOKS[min(self.order, len(LOOKS) - 1)]
        made = z.op not in ("leaf", "replayed")
        self.fill, self.constant = "white" if self.leaf else fill, made and not any(z.pullbacks)
        head = ": ".join(filter(None, (name, made and formula(z))))
        self.lines = [line for line in (head, f"{z.item():.4g}" if z.shape == () else str(z.shape)) if line]
        self.width, self.height = max(34, LETTER * max(map(len, self.lines)) + 14), LINE * len(self.lines) + 8


class Bend:
    """Where edges of one Node to later levels, which share their way, pass a level."""

    width = height = 0

    def __init__(self, column):
        self.column, self.near = column, []


def formula(z):
    sign, exponent = SIGNS.get(z.op, z.op), getattr(z.kernel, "keywords", {}).get("exponent")
    if exponent is not None:
        return f"^{exponent:.4g}"
    numbers = [f"{x.item():.4g}" if x.kernel is number else "" for x in z.inputs]
    if any(numbers) and len(numbers) == 2:
        return f"{numbers[0]} {sign} {numbers[1]}".strip()
    return f"{sign}({', '.join(n or '·' for n in numbers)})" if any(numbers) else sign


def arrange(tensors, named):
    """Columns of Nodes, each on its level: below the inputs that it has in its column, but close to its readers."""
    nodes, columns = {}, []
    for z in tensors:
        flows = [*map(bool, z.pullbacks), *[False] * len(z.inputs)]
        inputs = [(nodes[x.serial], flow) for x, flow in zip(z.inputs, flows) if x.serial in nodes]
        node = nodes[z.serial] = Node(z, named.get(z.serial, ""), inputs)
        if not node.leaf and (not columns or columns[-1].order != node.order):
            columns.append(Column(node.order))
        node.column = None if node.leaf else columns[-1]
        for x, _ in inputs:  # a leaf stands with its first reader
            x.column = x.column or node.column
    columns = columns or [Column(0)]
    for node in nodes.values():
        node.column = node.column or columns[-1]
        node.column.nodes.append(node)
        node.level = max((x.level + 1 for x, _ in node.inputs if x.column is node.column), default=0)
    highest = {}
    for node in reversed(nodes.values()):
        node.level = highest.get(node, node.level)
        for x, _ in node.inputs:
            if x.column is node.column:
                highest[x] = min(highest.get(x, node.level), node.level - 1)
    return columns


def place(columns):
    """Give every box its centre (x, y). Returns the edges, cut at their bends: (from, to, does a derivative flow?), and
    the width and height of it all."""
    for column in columns:
        column.levels = [[] for _ in range(1 + max(node.level for node in column.nodes))]
    edges, bends = [], {}
    for node in (node for column in columns for node in column.nodes):
        node.column.levels[node.level].append(node)
        for x, flow in node.inputs:
            before = x
            for level in range(x.level + 1, node.level) if x.column is node.column else ():
                bend = bends.get((x, flow, level))
                if not bend:
                    bend = bends[x, flow, level] = Bend(x.column)
                    x.column.levels[level].append(bend)
                    edges.append((before, bend, flow))
                before = bend
            edges.append((before, node, flow))
    for a, b, _ in edges:
        a.near.append(b)
        b.near.append(a)
    span, width = PITCH * (max(len(column.levels) for column in columns) - 1), 0
    for column in columns:
        column.left, width = width, width + max(150, 40 + max(sum(n.width + GAP for n in r) for r in column.levels))
        column.middle = (column.left + width) / 2
        for i, row in enumerate(column.levels):
            part = i / max(len(column.levels) - 1, 1)
            for node in row:
                node.y = TOP + span * (part if column.down > 0 else 1 - part)
    for sweep in range(7):  # the first only puts them side by side
        for column in columns:
            for row in column.levels[:: -1 if sweep % 2 else 1]:
                if sweep:
                    row.sort(key=lambda n: sum(m.x for m in n.near) / len(n.near) if n.near else n.x)
                x = column.middle - sum(n.width + GAP for n in row) / 2
                for node in row:
                    node.x, x = x + (node.width + GAP) / 2, x + node.width + GAP
                    node.sides = node is row[-1], node is row[0]  # is there nothing to the right of it, to the left?
    return edges, width, TOP + span + 40


# ---- text ------------------------------------------------------------------------------------------------------------


def to_dot(columns, note):
    def quoted(text):  # Graphviz reads &amp; as HTML does
        return html.escape(text, quote=False).replace("\\", "\\\\").replace('"', '\\"')

    ids = {node: f"n{i}" for i, node in enumerate(node for column in columns for node in column.nodes)}
    lines = ["digraph tinymeta {", '  node [style=filled, fontname="sans-serif"];']
    lines += [f'  label="{note}";'] * bool(note)
    for i, column in enumerate(columns):
        lines += [f"  subgraph cluster_{i} {{", f'    label="{column.title}";']
        for node in column.nodes:
            label, dashes = "\\n".join(map(quoted, node.lines)), ', style="filled,dashed"' * node.constant
            look = f'shape={node.shape}, color="{node.line}", fillcolor="{node.fill}"{dashes}'
            lines.append(f'    {ids[node]} [label="{label}", {look}];')
        lines.append("  }")
    for node in ids:
        lines += [f"  {ids[x]} -> {ids[node]}{'' if flow else ' [style=dashed]'};" for x, flow in node.inputs]
    return "\n".join([*lines, "}"])


def to_svg(columns, note):
    edges, width, height = place(columns)
    width, height = max(width, LETTER * len(note) + 20), height + 20 * bool(note)
    svg = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width:.0f} {height:.0f}")
    svg.set("width", f"{width:.0f}")
    add(svg, "style", "text { font-family: 'DejaVu Sans', Verdana, sans-serif; font-size: 12px; text-anchor: middle }")
    add(svg, "rect", width=width, height=height, fill="white")
    for column in columns:
        (fill, line, _), left, wide = LOOKS[min(column.order, len(LOOKS) - 1)], column.left, column.middle - column.left
        add(svg, "rect", x=left + 3, y=3, width=2 * wide - 6, height=height - 6, rx=6, fill=fill, opacity=0.4)
        heading = f"{column.title} {'↓' if column.down > 0 else '↑'}"
        add(svg, "text", heading, x=column.middle, y=22, fill=line, font_weight="bold")
    head = {"viewBox": "0 0 8 8", "refX": 8, "refY": 4, "markerWidth": 5, "markerHeight": 5, "orient": "auto"}
    add(add(svg, "marker", id="head", **head), "path", d="M0,0 L8,4 L0,8 z", fill="#555555")
    for edge in edges:
        add_edge(svg, columns, *edge)
    for node in (node for column in columns for node in column.nodes):
        add_box(svg, node)
    if note:
        add(svg, "text", note, x=width / 2, y=height - 12)
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode")


def add(parent, tag, text=None, **attributes):
    texts = {k.replace("_", "-"): f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in attributes.items()}
    element = ElementTree.SubElement(parent, tag, texts)
    element.text = text
    return element


def add_edge(svg, columns, a, b, flow):
    """Within a column an edge leaves and enters in the column's direction; to another it goes sideways, unless there a
    box is in the way, and if it would pass behind a box, then between two levels. What a pullback reads of earlier
    passes is thin."""
    across = a.column is not b.column
    start, end = (
        (node.x + out * node.width / 2, node.y, 1, 0)  # a point and the direction of the edge there
        if across and node.sides[node is b]
        else (node.x, node.y + out * node.column.down * node.height / 2, 0, node.column.down)
        for node, out in ((a, 1), (b, -1))
    )
    routes = [(start, end)]
    if across:
        left, right = columns[columns.index(a.column) + 1].left, b.column.left
        ys = [node.y + side * node.column.down * PITCH / 2 for node in (b, a) for side in (-1, 1)]
        routes += [(start, (left, y, 1, 0), (right, y, 1, 0), end) for y in ys]
    drawn = [[cubic(*p, *q) for p, q in zip(route, route[1:])] for route in routes]
    curves = next((c for c in drawn if not across or not behind(c, columns, (a, b))), drawn[0])
    d = f"M{start[0]:.1f},{start[1]:.1f}"
    d += "".join(" C" + " ".join(f"{x:.1f},{y:.1f}" for x, y in points) for _, *points in curves)
    reads = across and b.order > a.order
    line = {"stroke": "#999999" if reads else "#333333", "stroke_width": 1 if reads else 1.5}
    line["stroke_dasharray"] = "none" if flow else "4,3"
    add(svg, "path", d=d, fill="none", marker_end="url(#head)" if isinstance(b, Node) else "none", **line)


def cubic(ax, ay, au, av, bx, by, bu, bv):
    """The four points of a Bézier curve from a to b, with the directions (u, v) that it has there."""
    h, s, t = abs(bx - ax) / 2, *(abs(by - ay) / 2 if (by - ay) * v > 0 else PITCH / 2 for v in (av, bv))
    return (ax, ay), (ax + h * au, ay + s * av), (bx - h * bu, by - t * bv), (bx, by)


def behind(curves, columns, ends):
    """Do these Bézier curves, from one of the ends to the other, pass behind a box, or closely by?"""
    lefts = [column.left for column in columns]
    for curve in curves:
        for t in (i / 16 for i in range(17)):
            weights = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
            x, y = (sum(w * v for w, v in zip(weights, values)) for values in zip(*curve))
            for n in columns[bisect(lefts, x) - 1].nodes:
                margin = -2 if n in ends else 3
                if abs(x - n.x) < n.width / 2 + margin and abs(y - n.y) < n.height / 2 + margin:
                    return True
    return False


def add_box(svg, node):
    a, b, c = node.width / 2, node.height / 2, 7
    style = {"fill": node.fill, "stroke": node.line, "stroke_width": 3 if node.order > 2 else 1}
    style["stroke_dasharray"] = "4,3" if node.constant else "none"
    if node.order < 2:
        add(svg, "rect", x=node.x - a, y=node.y - b, width=2 * a, height=2 * b, rx=b * node.order, **style)
    else:
        corners = [(a - c, b), (a, b - c), (a, c - b), (a - c, -b), (c - a, -b), (-a, c - b), (-a, b - c), (c - a, b)]
        add(svg, "polygon", points=" ".join(f"{node.x + u:.1f},{node.y + v:.1f}" for u, v in corners), **style)
    for i, text in enumerate(node.lines):
        add(svg, "text", text, x=node.x, y=node.y + LINE * (i - (len(node.lines) - 1) / 2) + 4)
