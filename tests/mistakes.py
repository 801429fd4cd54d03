"""The mistakes that the mutation run makes, see mutate.py: each is one node of a file's syntax tree in another's place."""

import ast
import copy
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parent.parent / "tinymeta"


class Mutant(NamedTuple):
    file: str
    line: int
    name: str  # function: what it says  ->  what it says instead; from the second such one on with a number
    lines: tuple  # whose tests may catch it, those in a lambda negative; (None,): the whole file's
    put: Callable  # makes the mistake, in parsed(file)

    scope = property(lambda m: (m.file, m.name.partition(":")[0]))

    def __str__(self):
        return f"{self.file}:{self.line} {self.name}"


# calls and functions that only make an error message, or whose arguments only tell types apart
MESSAGES = {"describe", "name_of", "name", "__repr__", "__str__", "isinstance", "hasattr", "warn", "simplefilter"}
OTHER = {
    **{ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.Pow: [ast.Mult]},
    **{ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd], ast.And: [ast.Or], ast.Or: [ast.And]},
    **{ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.GtE], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.LtE]},
    **{ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is]},
    **{ast.In: [ast.NotIn], ast.NotIn: [ast.In]},
}


@cache
def parsed(file):
    return ast.parse((SOURCE / file).read_bytes())


def mutants(file):
    """All mistakes that can be made in a file of tinymeta."""
    count = Counter()
    for node, put, scope, lines in visit(parsed(file), None, "", (None,)):
        at = node.target if isinstance(node, ast.comprehension) else node
        before = ast.unparse(node)
        for after, new in {ast.unparse(new): new for new in mistakes(node, scope)}.items():
            if after != before:
                name = f"{scope}: {before}  ->  {after}"
                count[name] += 1
                name += f"  ({count[name]})" * (count[name] > 1)
                yield Mutant(file, at.lineno, name, lines, partial(put, ast.copy_location(new, at)))


def visit(node, put, scope, lines):
    """(node, put(another) in its place, the function it is in, the lines that stand for it) of all that may change."""
    called = getattr(node, "func", None)
    names = {getattr(called, "id", None), getattr(called, "attr", None), getattr(node, "name", None)}
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)) or names & MESSAGES:
        return
    if isinstance(node, ast.FunctionDef):
        scope, lines = node.name, tuple(range(node.body[0].lineno, node.end_lineno + 1))
    elif isinstance(node, ast.Lambda):
        lines = tuple(-line for line in range(node.lineno, node.end_lineno + 1))
    elif isinstance(node, ast.stmt) and scope:
        body = getattr(node, "body", None)  # of which a line of its own is left out
        lines = tuple(range(node.lineno, max(body[0].lineno, node.lineno + 1) if body else node.end_lineno + 1))
    yield node, put, scope, lines
    for field, value in ast.iter_fields(node):
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                place = partial(value.__setitem__, i) if isinstance(value, list) else partial(setattr, node, field)
                yield from visit(child, place, scope, lines)


def mistakes(node, scope):
    """What may stand in a node's place."""

    def but(**fields):
        new = copy.copy(node)
        vars(new).update(fields)
        return new

    def exchanged(field):
        items = getattr(node, field)
        for i, (a, b) in enumerate(zip(items, items[1:])):
            if not isinstance(a, ast.Starred) and not isinstance(b, ast.Starred):
                yield but(**{field: [*items[:i], b, a, *items[i + 2 :]]})

    def without(*fields):
        for i in range(len(getattr(node, fields[0]))):
            yield but(**{f: [x for j, x in enumerate(getattr(node, f)) if j != i] for f in fields})

    match node:
        case ast.BinOp(left, op, right):
            yield from (but(op=other()) for other in OTHER.get(type(op), []))
            yield copy.copy(left)
            if isinstance(op, (ast.Add, ast.Mult, ast.BitAnd, ast.BitOr)):
                yield copy.copy(right)
            elif isinstance(op, ast.Sub):
                yield ast.UnaryOp(ast.USub(), right)
            elif isinstance(op, ast.Div):
                yield but(left=ast.Constant(1))
        case ast.UnaryOp(_, operand):
            yield copy.copy(operand)
        case ast.Constant(bool() as value):
            yield but(value=not value)
        case ast.Constant(int() | float() as value):
            yield but(value=value + 1 if value % 1 == 0 else 1.2 * value)
        case ast.Compare(_, ops, _):
            for i, op in enumerate(ops):
                yield from (but(ops=[*ops[:i], other(), *ops[i + 1 :]]) for other in OTHER[type(op)])
        case ast.BoolOp(op, values):
            yield but(op=OTHER[type(op)][0]())
            yield from without("values") if len(values) > 2 else map(copy.copy, values)
        case ast.Call():
            yield from (*exchanged("args"), *without("keywords"))
        case ast.Dict():
            yield from without("keys", "values")
        case ast.Tuple(_, ast.Load()):
            yield from exchanged("elts")
        case ast.AugAssign(_, op, _):
            yield from (but(op=other()) for other in OTHER.get(type(op), []))
            yield ast.Pass()
        case ast.Assign(targets, value):
            read = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
            parts = [n for target in targets for n in getattr(target, "elts", [target])]
            if any(not isinstance(n, ast.Name) or n.id in read for n in parts):
                yield ast.Pass()
        case ast.Expr(ast.Call() | ast.Yield() | ast.YieldFrom()) | ast.Delete() | ast.Break() | ast.Continue():
            yield ast.Pass()
        case ast.Lambda(ast.arguments([], [_, ast.arg(arg=second), *_]), body) if second.endswith("_bar"):
            yield from (but(body=other) for other in pulled_wrongly(body))
        case ast.Return(value) if scope == "pullback":
            yield from (but(value=other) for other in pulled_wrongly(value))
        case ast.If(test) | ast.IfExp(test) if not isinstance(test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
            yield but(test=ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[test]):
            yield but(ifs=[ast.UnaryOp(ast.Not(), test)])


def pulled_wrongly(x_bar):
    return ast.UnaryOp(ast.USub(), x_bar), ast.BinOp(ast.Constant(2), ast.Mult(), x_bar)
