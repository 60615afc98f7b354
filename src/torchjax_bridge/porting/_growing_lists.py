"""Lists that a loop fills, as in a DenseNet: each layer is given everything that was made before it.

Works on syntax trees: ``a = f[0]([x])``, ``b = f[1]([x, a])`` become a list, a loop and ``append``.
"""

import ast
import copy
from collections.abc import Callable

__all__ = ["with_growing_lists"]


def with_growing_lists(lines: list[ast.stmt], length: Callable[[str], int | None]) -> list[ast.stmt]:
    """The lines, with a loop for each list of layers that is called on a growing list.

    Args:
        lines: The statements of a body.
        length: How many layers the list ``"self.layers"`` holds.
    """
    if any(isinstance(n, ast.Name) and n.id == "features" for line in lines for n in ast.walk(line)):
        return lines
    for start in range(len(lines)):
        run = _run(lines, start, length)
        if run is None:
            continue
        owner, given, made = run
        end = start + len(made)
        rest = [_with_list(line, given + made) for line in lines[end:]]
        read = {node.id for line in rest for node in ast.walk(line) if isinstance(node, ast.Name)}
        if read & set(made):
            continue
        head = ast.parse(
            f"features = [{', '.join(given)}]\nfor layer in {owner}:\n    features.append(layer(features))"
        ).body
        return [*lines[:start], *head, *rest]
    return lines


def _run(
    lines: list[ast.stmt], start: int, length: Callable[[str], int | None]
) -> tuple[str, list[str], list[str]] | None:
    """The list of layers, what the first is given, and what each makes."""
    made: list[str] = []
    owner, given = "", []
    for line in lines[start:]:
        step = _step(line)
        if step is None:
            break
        target, of, place, names = step
        if not made:
            owner, given = of, names
        if of != owner or place != len(made) or names != given + made or target in given + made:
            break
        made.append(target)
    return (owner, given, made) if len(made) > 1 and length(owner) == len(made) else None


def _step(line: ast.stmt) -> tuple[str, str, int, list[str]] | None:
    """The parts of ``target = owner[place]([names])``."""
    match line:
        case ast.Assign(
            targets=[ast.Name(id=target)],
            value=ast.Call(
                func=ast.Subscript(value=owner, slice=ast.Constant(value=int(place))),
                args=[ast.List(elts=items)],
                keywords=[],
            ),
        ) if all(isinstance(item, ast.Name) for item in items):
            return target, ast.unparse(owner), place, [item.id for item in items]  # type: ignore[attr-defined]
    return None


def _with_list(line: ast.stmt, names: list[str]) -> ast.stmt:
    """The line with ``features`` for the list of all names."""

    class Change(ast.NodeTransformer):
        def visit_List(self, node: ast.List) -> ast.AST:
            items = [item.id if isinstance(item, ast.Name) else "" for item in node.elts]
            return ast.Name("features", ast.Load()) if items == names else self.generic_visit(node)

    return ast.fix_missing_locations(Change().visit(copy.deepcopy(line)))
