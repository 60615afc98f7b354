"""Lists that a loop fills, as in a DenseNet: each layer is given everything that was made before it.

Works on syntax trees: ``a = f[0]([x])``, ``b = f[1]([x, a])`` become a list, a loop and ``append``; layers that
stand in no list are called one by one.
"""

import ast
import copy
import re
from collections.abc import Callable, Sequence

__all__ = ["has_growing_list", "with_growing_lists"]


_FEWEST = 3  # layers that stand in no list, for which a list is shorter


def with_growing_lists(lines: list[ast.stmt], length: Callable[[str], int | None]) -> list[ast.stmt]:
    """The lines, with a list in the place of what is made one after the other and given to each next layer.

    Args:
        lines: The statements of a body.
        length: How many layers the list ``"self.layers"`` holds.
    """
    if any(isinstance(n, ast.Name) and n.id == "features" for line in lines for n in ast.walk(line)):
        return lines
    for start in range(len(lines)):
        layers, given, made = _run(lines, start)
        owner = _whole_list(layers, length)
        if len(made) < (_FEWEST if owner is None else 2):
            continue
        rest = [_with_list(line, given + made) for line in lines[start + len(made) :]]
        read = {node.id for line in rest for node in ast.walk(line) if isinstance(node, ast.Name)}
        if read & set(made):
            continue
        calls = [f"features.append({ast.unparse(layer)}(features))" for layer in layers]
        if owner is not None:
            calls = [f"for layer in {owner}:\n    features.append(layer(features))"]
        head = ast.parse("\n".join([f"features = [{', '.join(given)}]", *calls])).body
        return [*lines[:start], *head, *rest]
    return lines


def has_growing_list(lines: Sequence[ast.stmt]) -> bool:
    """Whether the lines fill such a list."""
    return any("features.append(" in ast.unparse(line) for line in lines)


def _run(lines: list[ast.stmt], start: int) -> tuple[list[ast.expr], list[str], list[str]]:
    """The layers of consecutive lines, what the first is given, and what each makes for the next."""
    layers: list[ast.expr] = []
    given: list[str] = []
    made: list[str] = []
    for line in lines[start:]:
        step = _step(line)
        if step is None:
            break
        target, layer, names = step
        given = given if made else names
        if names != given + made or target in given + made:
            break
        layers.append(layer)
        made.append(target)
    return layers, given, made


def _step(line: ast.stmt) -> tuple[str, ast.expr, list[str]] | None:
    """The parts of ``target = layer([names])``, where the layer is one of the module's."""
    match line:
        case ast.Assign(
            targets=[ast.Name(id=target)],
            value=ast.Call(func=layer, args=[ast.List(elts=items)], keywords=[]),
        ) if re.fullmatch(r"self\.[\w.\[\]]+", ast.unparse(layer)):
            names = [item.id for item in items if isinstance(item, ast.Name)]
            return (target, layer, names) if len(names) == len(items) else None
    return None


def _whole_list(layers: list[ast.expr], length: Callable[[str], int | None]) -> str | None:
    """The list that holds just these layers in this order."""
    owners = set()
    for place, layer in enumerate(layers):
        match layer:
            case ast.Subscript(value=held, slice=ast.Constant(value=int(at))) if at == place:
                owners.add(ast.unparse(held))
            case _:
                return None
    owner = owners.pop() if len(owners) == 1 else ""
    return owner if owner and length(owner) == len(layers) else None


def _with_list(line: ast.stmt, names: list[str]) -> ast.stmt:
    """The line with ``features`` for the list of all names."""

    class Change(ast.NodeTransformer):
        def visit_List(self, node: ast.List) -> ast.AST:
            items = [item.id if isinstance(item, ast.Name) else "" for item in node.elts]
            return ast.Name("features", ast.Load()) if items == names else self.generic_visit(node)

    return ast.fix_missing_locations(Change().visit(copy.deepcopy(line)))
