"""Settings of the instances of a class, compared and written: what an author would pass for each.

Knows that Flax wants ``(3, 3)`` where an author passes 3, and ``"VALID"`` where he passes no padding.
"""

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from ._constructors import MISSING, Column, Either, Items, Tree
from ._expressions import plain
from ._rendering import literal

__all__ = ["agree", "eithers", "equal", "scalar", "shown", "text"]


def scalar(value: Any) -> Any:
    """``(3, 3)`` as 3, and no padding as 0: what an author passes for them."""
    if isinstance(value, tuple | list) and len(value) > 1 and len(set(map(repr, value))) == 1:
        return value[0]
    return 0 if value == "VALID" else plain(value)


def shown(column: Column) -> list[Any]:
    """The values of a column as an author would pass them: as one number each, if that says them all."""
    if any(isinstance(scalar(value), tuple | list) for value in column.known):
        return [value if value is MISSING else plain(value) for value in column.values]
    return [value if value is MISSING else scalar(value) for value in column.values]


def text(expression: ast.expr, column: Column, *, is_whole: bool) -> str:
    """The expression of a column.

    Args:
        expression: It gives the values of the column, or the number that each of its tuples repeats, or tuples
            that repeat its numbers.
        column: The column.
        is_whole: Whether it gives tuples.
    """
    text = ast.unparse(ast.fix_missing_locations(expression))
    if isinstance(expression, ast.Constant):
        text = literal(expression.value)
    first = next((value for value in column.known if value is not None), None)
    if is_whole and not any(isinstance(value, tuple | list) for value in column.known):
        return f"{text}[0]"
    repeats = not is_whole and not any(isinstance(value, tuple | list) for value in shown(column))
    if isinstance(first, tuple | list) and repeats:
        return f"({', '.join([text] * len(first))})"
    return text


def equal(one: Sequence[Any], other: Sequence[Any], as_truth: bool) -> bool:
    if as_truth:
        return [bool(value) for value in one] == list(other)
    return all(
        any(type(form) is type(b) and form == b for form in (a, scalar(a)))
        for a, b in zip(one, other, strict=True)
    )


def agree(group: list[tuple[str, Column]], column: Column) -> bool:
    both = False
    for _, other in group:
        for one, two in zip(shown(other), shown(column), strict=True):
            if one is not MISSING and two is not MISSING:
                both = True
                if type(one) is not type(two) or one != two:
                    return False
    return both


def eithers(trees: Sequence[Tree]) -> Iterator[Either]:
    for tree in trees:
        if isinstance(tree, Either):
            yield tree
            yield from eithers([tree.then])
        elif isinstance(tree, Items):
            yield from eithers(tree.items)
