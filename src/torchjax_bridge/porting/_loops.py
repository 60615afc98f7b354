"""Runs of equal lines over a list of layers, as a loop.

Works on syntax trees: ``x = self.blocks[0](x)``, ``x = self.blocks[1](x)`` become ``for block in self.blocks``.
"""

import ast
import copy
import re
from collections.abc import Callable, Mapping, Sequence

from ._growing_lists import with_growing_lists
from ._reserved import RESERVED

__all__ = ["with_loops"]

_LONGEST = 8  # lines in the body of one loop


def with_loops(
    lines: Sequence[ast.stmt],
    length: Callable[[str], int | None],
    taken: set[str],
    author: Mapping[str, tuple[str, ...]] | None = None,
) -> list[ast.stmt]:
    """The lines, with loops.

    Args:
        lines: The statements of a body.
        length: How many layers the list ``"self.blocks"`` holds; None if it is no list.
        taken: Names that the body uses.
        author: The author's names for the items of a list, where he loops over it.
    """
    author = author or {}
    lines = with_growing_lists(_even(_uniform(list(lines), {o for o in author if length(o) == 1})), length)
    found: list[ast.stmt] = []
    place = 0
    while place < len(lines):
        for period in range(1, min(_LONGEST, len(lines) - place) + 1):
            loop = _loop(lines[place:], period, length, taken, author)
            if loop is not None:
                statement, used = loop
                found.append(statement)
                place += used
                break
        else:
            found.append(lines[place])
            place += 1
    return found


class _Items(ast.NodeTransformer):
    """Replaces ``self.blocks[3]`` by a placeholder; remembers lists and places. Of several indices the first."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int]] = []

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        owner = ast.unparse(node.value)
        is_item = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int)
        if is_item and re.fullmatch(r"self(\.\w+)+", owner):
            self.found.append((owner, node.slice.value))  # type: ignore[attr-defined]
            return ast.Name(f"•{owner}", ast.Load())
        self.generic_visit(node)
        return node


def _abstract(line: ast.stmt) -> tuple[str, set[tuple[str, int]], ast.stmt]:
    items = _Items()
    changed = items.visit(copy.deepcopy(line))
    return ast.dump(changed), set(items.found), changed


def _loop(
    lines: Sequence[ast.stmt],
    period: int,
    length: Callable[[str], int | None],
    taken: set[str],
    author: Mapping[str, tuple[str, ...]],
) -> tuple[ast.stmt, int] | None:
    first = [_abstract(line) for line in lines[:period]]
    owners = list(dict.fromkeys(owner for _, found, _ in first for owner, _ in sorted(found)))
    if not owners or any(place != 0 for _, found, _ in first for _, place in found):
        return None
    if any(isinstance(line, ast.Return) for line in lines[:period]):
        return None  # what follows the loop
    count = 1
    while True:
        group = [_abstract(line) for line in lines[count * period : (count + 1) * period]]
        same = [dump for dump, _, _ in group] == [dump for dump, _, _ in first]
        if not same or any(place != count for _, found, _ in group for _, place in found):
            break
        count += 1
    if any(length(owner) != count for owner in owners):
        return None
    is_step = period == 1 and isinstance(lines[0], ast.Assign) and not _mentions(lines[1:], owners)
    if count < 2 and not (is_step and author.keys() >= set(owners)):
        return None  # a list of one layer is looped over where the author does so
    names: dict[str, str] = {}
    unpacked: dict[str, tuple[str, ...]] = {}
    for owner in owners:
        own = author.get(owner, ())
        if len(own) > 1 and not taken & set(own):
            unpacked[owner] = own
        if len(own) == 1 and own[0] not in taken | set(names.values()) | RESERVED:
            names[owner] = own[0]
        else:
            others = {name for list_of, own in author.items() if list_of != owner for name in own}
            names[owner] = _item_name(owner, taken | set(names.values()) | others)
    rename = _Rename({f"•{owner}": name for owner, name in names.items()})
    body = [rename.visit(changed) for _, _, changed in first]
    targets = [names[owner] for owner in owners]
    for owner, own in unpacked.items():
        parts = _Parts(names[owner], own)
        whole = [parts.visit(copy.deepcopy(line)) for line in body]
        if parts.is_whole:
            body, targets[owners.index(owner)] = whole, f"({', '.join(own)})"
    over = owners[0] if len(owners) == 1 else f"zip({', '.join(owners)}, strict=True)"
    loop = ast.parse(f"for {', '.join(targets)} in {over}:\n    pass").body[0]
    loop.body = body  # type: ignore[attr-defined]
    return ast.fix_missing_locations(loop), count * period


def _mentions(lines: Sequence[ast.stmt], owners: Sequence[str]) -> bool:
    return any(owner in owners for line in lines for owner, _ in _abstract(line)[1])


class _Parts(ast.NodeTransformer):
    """``layer[0]`` and ``layer[1]`` by the names of the parts of a layer."""

    def __init__(self, name: str, parts: tuple[str, ...]) -> None:
        self.name, self.parts, self.is_whole = name, parts, True

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(place))) if (
                name == self.name
            ):
                if place < len(self.parts):
                    return ast.Name(self.parts[place], ast.Load())
        self.generic_visit(node)
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        self.is_whole &= node.id != self.name
        return node


class _Rename(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)


def _item_name(owner: str, taken: set[str]) -> str:
    """The name of one item of ``self.blocks``."""
    name = owner if owner == "self.layers" else owner.removesuffix(".layers")
    name = name.rpartition(".")[2]
    singular = name[:-1] if name.endswith("s") and len(name) > 2 else f"{name}_layer"
    while singular in taken or not singular.isidentifier():
        singular = f"each_{singular}"
    return singular


def _uniform(lines: list[ast.stmt], single: set[str]) -> list[ast.stmt]:
    """``return self.blocks[2](x)`` after ``x = self.blocks[1](x)`` as a statement and a return.

    Args:
        lines: The statements.
        single: Lists of one layer that the author loops over, so that no statement stands in front.
    """
    match lines:
        case [
            *before,
            ast.Assign(targets=[ast.Name(id=name)]) as line,
            ast.Return(value=ast.Call() as value),
        ]:
            last = ast.fix_missing_locations(ast.Assign([ast.Name(name, ast.Store())], value))
            if _abstract(line)[1] and _abstract(last)[1]:
                return [
                    *before,
                    line,
                    last,
                    ast.fix_missing_locations(ast.Return(ast.Name(name, ast.Load()))),
                ]
    match lines:
        case [*before, ast.Return(value=ast.Call(args=[ast.Name(id=name), *_]) as value)]:
            last = ast.fix_missing_locations(ast.Assign([ast.Name(name, ast.Store())], value))
            if single & {owner for owner, _ in _abstract(last)[1]}:
                return [*before, last, ast.fix_missing_locations(ast.Return(ast.Name(name, ast.Load())))]
    return lines


def _even(lines: list[ast.stmt]) -> list[ast.stmt]:
    """``x = self.blocks[0](y)``, ``x = self.blocks[1](x)`` with ``x = y`` in front, so that the lines are equal."""
    found = []
    for line, after in zip(lines, [*lines[1:], None], strict=False):
        (start, given), (_, next_given) = _step(line), _step(after)
        if given and start == next_given != given and _items(line, 0) and _items(after, 1):
            copied = ast.parse(f"{next_given} = {given}").body[0]
            renamed = _Rename({given: next_given}).visit(copy.deepcopy(line))
            if ast.dump(_abstract(renamed)[2]) == ast.dump(_abstract(after)[2]):  # type: ignore[arg-type]
                found += [copied, renamed]
                continue
        found.append(line)
    return found


def _step(line: ast.stmt | None) -> tuple[str, str]:
    """The target and the first argument of ``target = self.blocks[0](given)``."""
    match line:
        case ast.Assign(
            targets=[ast.Name(id=target)], value=ast.Call(func=ast.Subscript(), args=[ast.Name(id=given), *_])
        ):
            return target, given
    return "", ""


def _items(line: ast.stmt | None, place: int) -> bool:
    return line is not None and {found for _, found in _abstract(line)[1]} == {place}
