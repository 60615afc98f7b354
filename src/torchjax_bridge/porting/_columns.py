"""Settings of the instances of a class, compared and written: what an author would pass for each.

Knows that Flax wants ``(3, 3)`` where an author passes 3, and ``"VALID"`` where he passes no padding.
"""

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from ._constructors import MISSING, Column, Either, Items, Tree, literal
from ._expressions import plain

__all__ = ["agree", "eithers", "equal", "scalar", "text"]


def scalar(value: Any) -> Any:
    """``(3, 3)`` as 3, and no padding as 0: what an author passes for them."""
    if isinstance(value, tuple | list) and len(value) > 1 and len(set(map(repr, value))) == 1:
        return value[0]
    return 0 if value == "VALID" else plain(value)


def text(expression: ast.expr, column: Column) -> str:
    text = ast.unparse(ast.fix_missing_locations(expression))
    if isinstance(expression, ast.Constant):
        text = literal(expression.value)
    first = column.known[0]
    if isinstance(first, tuple | list) and not isinstance(scalar(first), tuple):
        return f"({', '.join([text] * len(first))})"
    return text


def equal(one: Sequence[Any], other: Sequence[Any], as_truth: bool) -> bool:
    if as_truth:
        return [bool(value) for value in one] == list(other)
    return all(type(a) is type(b) and a == b for a, b in zip(map(scalar, one), other, strict=True))


def agree(group: list[tuple[str, Column]], column: Column) -> bool:
    both = False
    for _, other in group:
        for one, two in zip(other.values, column.values, strict=True):
            if one is not MISSING and two is not MISSING:
                both = True
                if type(scalar(one)) is not type(scalar(two)) or scalar(one) != scalar(two):
                    return False
    return both


def eithers(trees: Sequence[Tree]) -> Iterator[Either]:
    for tree in trees:
        if isinstance(tree, Either):
            yield tree
            yield from eithers([tree.then])
        elif isinstance(tree, Items):
            yield from eithers(tree.items)
