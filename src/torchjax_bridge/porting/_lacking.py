"""Lists of layers of which some instances lack one: which layer of the longest list each of theirs is.

Works on constructor trees. A layer fits where its class stands, in the same order; of several such places it is
the one where the settings agree most.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from ._constructors import Call, Items, Text, Tree, columns

__all__ = ["laid_over"]


def laid_over(items: Sequence[Tree], longest: Sequence[Tree]) -> list[Tree | None] | None:
    """The items at the places of the longest list, None at the others; None if they do not fit.

    Args:
        items: The layers of an instance.
        longest: Those of the instance that has the most.
    """

    @cache
    def best(at: int, place: int) -> tuple[int, tuple[int, ...]] | None:
        """The agreement of ``items[at:]`` laid over ``longest[place:]``, and their places."""
        if at == len(items):
            return 0, ()
        if len(items) - at > len(longest) - place:
            return None
        skipped = best(at, place + 1)
        if _kind(items[at]) != _kind(longest[place]):
            return skipped
        rest = best(at + 1, place + 1)
        if rest is None:
            return skipped
        taken = (rest[0] + _agreement(items[at], longest[place]), (place, *rest[1]))
        return taken if skipped is None or taken[0] >= skipped[0] else skipped

    found = best(0, 0)
    if found is None:
        return None
    laid: list[Tree | None] = [None] * len(longest)
    for item, place in zip(items, found[1], strict=True):
        laid[place] = item
    return laid


def _kind(tree: Tree) -> tuple[Any, ...]:
    if isinstance(tree, Call):
        return (tree.function, tree.ends)
    if isinstance(tree, Items):
        return (tree.start, tree.end, *map(_kind, tree.items))
    return (tree.text,) if isinstance(tree, Text) else (type(tree),)


def _agreement(one: Tree, other: Tree) -> int:
    """How many settings are given to both, and how many have equal values."""
    first, second = (_settings(tree) for tree in (one, other))
    names = {name for name, _ in first} & {name for name, _ in second}
    lacking = {name for name, _ in first} ^ {name for name, _ in second}
    return len(first & second) + len(names) - len(lacking)


def _settings(tree: Tree) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    seen: Counter[str] = Counter()
    for column in columns(tree):
        seen[column.setting] += 1
        found.add((f"{column.setting} {seen[column.setting]}", repr(column.values[0])))
    return found
