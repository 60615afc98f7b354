"""What the author called a value: the left side of the statement that made it.

Reads the source of ``forward`` as a hint for names. Without source there are no names, and nothing else changes.
"""

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass
from types import CodeType

from torchjax_bridge.recording import SourceLine

__all__ = [
    "author_aliases",
    "author_conditions",
    "author_loops",
    "author_names",
    "author_shapes",
    "author_size",
]


@dataclass(frozen=True)
class _Statement:
    first: int
    last: int
    names: tuple[str, ...]
    returns: bool


def author_names(source: SourceLine) -> tuple[tuple[object, ...], tuple[str, ...], bool]:
    """The statement of a line as a key, the names on its left side, and whether it returns."""
    if not source.file or source.code is None:
        return (), (), False
    around = [s for s in _statements(source.code) if s.first <= source.line <= s.last]
    if not around:
        return (source.code, source.line), (), False
    found = max(around, key=lambda statement: statement.first)
    return (source.code, found.first), found.names, found.returns


@functools.lru_cache(maxsize=1024)
def _statements(code: CodeType) -> tuple[_Statement, ...]:
    tree, start = _parsed(code)
    if tree is None:
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.For | ast.While | ast.With):
            end = node.body[0].lineno - 1
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Return | ast.Expr):
            end = node.end_lineno or node.lineno
        else:
            continue
        first, last = node.lineno + start - 1, end + start - 1
        found.append(_Statement(first, last, _targets(node), isinstance(node, ast.Return)))
    return tuple(found)


def author_conditions(code: CodeType, lines: set[int]) -> list[ast.expr]:
    """The conditions that a function asks, those around some of its lines first, the innermost first of all."""
    tree, start = _parsed(code)
    if tree is None:
        return []
    around: list[tuple[int, ast.expr]] = []
    others: list[tuple[int, ast.expr]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp):
            first, last = node.lineno + start - 1, (node.end_lineno or node.lineno) + start - 1
            inside = any(first <= line <= last for line in lines)
            (around if inside else others).append((last - first, node.test))
    return [test for _, test in sorted(around, key=lambda pair: pair[0])] + [test for _, test in others]


def author_shapes(code: CodeType) -> dict[str, tuple[str, ...]]:
    """What a function calls the sizes of a variable: of ``b, c, h, w = x.shape``, by ``"x"``."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(_parsed(code)[0] or ast.Module([], [])):
        match node:
            case ast.Assign(
                targets=[ast.Tuple(elts=elts)],
                value=ast.Attribute(value=ast.Name(id=name), attr="shape")
                | ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="size"), args=[]),
            ) if all(isinstance(item, ast.Name) for item in elts):
                found.setdefault(name, tuple(item.id for item in elts))  # type: ignore[attr-defined]
    return found


def author_aliases(code: CodeType) -> list[tuple[str, str, int]]:
    """The statements ``residual = x`` of a function: both names and the line of the file."""
    tree, start = _parsed(code)
    found = []
    for node in ast.walk(tree or ast.Module([], [])):
        match node:
            case ast.Assign(targets=[ast.Name(id=alias)], value=ast.Name(id=name)):
                found.append((alias, name, node.lineno + start - 1))
    return found


def author_size(code: CodeType, name: str, axis: int) -> str:
    """What a function calls one size of a variable: of ``bs = x.size(0)``."""
    wanted = {f"{name}.size({axis})", f"{name}.shape[{axis}]", *([f"len({name})"] if axis == 0 else [])}
    for node in ast.walk(_parsed(code)[0] or ast.Module([], [])):
        match node:
            case ast.Assign(targets=[ast.Name(id=size)], value=value) if ast.unparse(value) in wanted:
                return size
    return ""


def author_loops(code: CodeType) -> dict[str, tuple[str, ...]]:
    """What a function calls the items of a list: of ``for attn, ff in self.layers``, by ``"self.layers"``."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(_parsed(code)[0] or ast.Module([], [])):
        if isinstance(node, ast.For):
            target, over = node.target, node.iter
            if (
                isinstance(over, ast.Call)
                and ast.unparse(over.func) == "enumerate"
                and isinstance(target, ast.Tuple)
            ):
                target, over = target.elts[1], over.args[0]
            items = target.elts if isinstance(target, ast.Tuple) else [target]
            if all(isinstance(item, ast.Name) for item in items):
                found.setdefault(ast.unparse(over), tuple(map(ast.unparse, items)))
    return found


@functools.lru_cache(maxsize=1024)
def _parsed(code: CodeType) -> tuple[ast.AST | None, int]:
    """The syntax tree of a function, and the line of the file that it starts at."""
    try:
        lines, start = inspect.getsourcelines(code)
        return ast.parse(textwrap.dedent("".join(lines))), start
    except (OSError, SyntaxError, TypeError):
        return None, 0


def _targets(node: ast.stmt) -> tuple[str, ...]:
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    if isinstance(node, ast.For):
        target = None
    if isinstance(target, ast.Name):
        return (target.id,)
    if isinstance(target, ast.Subscript | ast.Attribute) and isinstance(target.value, ast.Name):
        return (target.value.id,) if target.value.id != "self" else ()
    if isinstance(target, ast.Tuple):
        return tuple(item.id if isinstance(item, ast.Name) else "_" for item in target.elts)
    return ()
