"""Layers that the author's ``__init__`` makes in a loop, under one name with numbers: ``layer1``, ``layer2``, ...

Works on syntax trees. In a body they are a list while loops are looked for; what is found asks for them with
``getattr``. A class whose body calls them otherwise keeps its attributes as they are.
"""

import ast
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from ._author_init import parsed_function, replaced
from ._constructors import Column, Numbered, Tree
from ._merging import DifferError, merge
from ._rendering import PLACE

__all__ = ["Family", "as_attributes", "as_list", "families", "in_place_of"]


@dataclass(frozen=True)
class Family:
    """Attributes ``name1`` to ``name4``, of layers of one class.

    Attributes:
        prefix: The name without a number.
        first: The first number.
        count: How many there are.
        counted_by: The attribute that holds their number, by the author's name for it.
    """

    prefix: str
    first: int
    count: int
    counted_by: str = "depth"

    @property
    def label(self) -> str:
        """The name at the place ``i``, as an f-string without quotes."""
        number = f"{PLACE} + {self.first}" if self.first else PLACE
        return f"{self.prefix}{{{number}}}"

    def length(self, owner: str) -> int | None:
        """How many layers the list ``self.name`` would hold."""
        return self.count if owner == f"self.{self.prefix}" else None

    @property
    def names(self) -> list[str]:
        """The names of all."""
        return [f"{self.prefix}{self.first + place}" for place in range(self.count)]


def families(kind: type[nn.Module], fields: Mapping[str, Tree]) -> list[Family]:
    """The attributes that loops in the ``__init__`` of a class make, where all are layers of one class."""
    found: list[Family] = []
    for prefix, counted_by in dict(_prefixes(kind)).items():
        numbers = [
            int(name[len(prefix) :]) for name in fields if re.fullmatch(rf"{prefix}(0|[1-9]\d*)", name)
        ]
        if len(numbers) < 2 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            continue
        taken = {*fields, *(family.counted_by for family in found)}
        name = f"{prefix}_count" if counted_by in taken else counted_by
        family = Family(prefix, numbers[0], len(numbers), name)
        with suppress(DifferError):
            merge([Numbered([fields[name] for name in family.names], counted_by)], prefix)
            found.append(family)
    return found


def in_place_of(fields: Mapping[str, Tree], family: Family) -> dict[str, Tree]:
    """The attributes, with the family as one of them."""
    found: dict[str, Tree] = {}
    for name, tree in fields.items():
        if name not in family.names:
            found[name] = tree
        elif family.label not in found:
            found[family.counted_by] = Column([family.count], family.counted_by, family.counted_by)
            found[family.label] = Numbered([fields[one] for one in family.names], family.counted_by)
    return found


def as_list(lines: Sequence[ast.stmt], family: Family) -> list[ast.stmt]:
    """``self.layer3`` as ``self.layer[2]``."""

    class Change(ast.NodeTransformer):
        def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
            if isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in family.names:
                place = int(node.attr[len(family.prefix) :]) - family.first
                return ast.parse(f"self.{family.prefix}[{place}]", mode="eval").body
            return self.generic_visit(node)

    return [Change().visit(copy.deepcopy(line)) for line in lines]


def as_attributes(lines: Sequence[ast.stmt], family: Family) -> list[ast.stmt] | None:
    """Loops over ``self.layer`` as loops over numbers; None if there is anything but loops."""
    owner = f"self.{family.prefix}"

    class Change(ast.NodeTransformer):
        def visit_For(self, node: ast.For) -> ast.AST:
            if ast.unparse(node.iter) != owner or not isinstance(node.target, ast.Name):
                return self.generic_visit(node)
            name = node.target.id
            layer = ast.parse(f'getattr(self, f"{family.label}")', mode="eval").body
            reads = sum(
                isinstance(inner, ast.Name) and inner.id == name
                for line in node.body
                for inner in ast.walk(line)
            )
            body = [replaced(line, {name: layer}) for line in node.body] if reads == 1 else node.body
            taken = [] if reads == 1 else [ast.Assign([ast.Name(name, ast.Store())], layer)]
            over = ast.parse(f"range(self.{family.counted_by})", mode="eval").body
            return ast.For(ast.Name(PLACE, ast.Store()), over, [*taken, *body], [])

    changed = [ast.fix_missing_locations(Change().visit(copy.deepcopy(line))) for line in lines]
    left = any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == owner
        for line in changed
        for node in ast.walk(line)
    )
    return None if left else changed


def _prefixes(kind: type[nn.Module]) -> Iterator[tuple[str, str]]:
    """What stands before the number in ``self.add_module(f"layer{i}", ...)`` and the like, and what counts them."""
    tree = parsed_function(kind.__init__)
    for loop in ast.walk(tree) if tree is not None else ():
        if not isinstance(loop, ast.For):
            continue
        match loop.iter:
            case ast.Call(func=ast.Name(id="range"), args=[ast.Name(id=count)]):
                pass
            case _:
                count = "depth"
        for node in ast.walk(loop):
            match node:
                case (
                    ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr="add_module"), args=[name, _])
                    | ast.Call(func=ast.Name(id="setattr"), args=[ast.Name(id="self"), name, _])
                ):
                    yield from ((prefix, count) for prefix in _text_before_number(name))


def _text_before_number(name: ast.expr) -> Iterator[str]:
    for node in ast.walk(name):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            prefix = re.split(r"[%{]", node.value)[0]
            if prefix.isidentifier():
                yield prefix
            return
