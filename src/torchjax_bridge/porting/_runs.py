"""Layers in a row that one line makes: ``Block(64 + 32 * i) for i in range(depth)``.

Works on constructor trees. Says which settings of the layers follow their place; how many layers an instance has
is a setting of that instance.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from ._constructors import MISSING, Call, Code, Column, Given, Indexed, Items, Run, Tree

__all__ = ["DifferError", "run_of"]

_LONG = 3  # layers, from which on a setting that grows by steps is worth a formula


class DifferError(Exception):
    """The trees have not the same form."""


def run_of(lists: Sequence[Sequence[Any] | None], counted_by: str = "depth", *, merge: Any) -> Run:
    """One constructor for the layers of all instances.

    Args:
        lists: The layers of each instance; None where it lacks them.
        counted_by: What the number of layers is called.
        merge: Makes one tree of several.

    Raises:
        DifferError: They are not calls of one class, or a layer is optional.
    """
    lengths = [MISSING if items is None else len(items) for items in lists]
    every = [item for items in lists if items is not None for item in items]
    if not every or not all(isinstance(item, Call) for item in every):
        raise DifferError
    return Run(_split(merge(every), lengths), Column(lengths, counted_by, counted_by))


def _split(tree: Tree, lengths: Sequence[Any]) -> Tree:
    """The tree with the settings of each instance for those of each layer."""
    if isinstance(tree, Column):
        return _column(tree, lengths)
    if isinstance(tree, Call):
        kwargs = {name: _split(value, lengths) for name, value in tree.kwargs.items()}
        return replace(tree, args=[_split(arg, lengths) for arg in tree.args], kwargs=kwargs)
    if isinstance(tree, Items):
        return replace(tree, items=[_split(item, lengths) for item in tree.items])
    if isinstance(tree, Run | Indexed) or not hasattr(tree, "text"):
        raise DifferError
    return tree


def _column(column: Column, lengths: Sequence[Any]) -> Tree:
    rows: list[Any] = []
    start = 0
    for length in lengths:
        count = 0 if length is MISSING else length
        rows.append(column.values[start : start + count] or MISSING)
        start += count
    known = [row for row in rows if row is not MISSING]

    def of_each(value: Any, setting: str = column.setting) -> Column:
        values = [MISSING if row is MISSING else value(row) for row in rows]
        return replace(column, values=values, setting=setting)

    if any(value is MISSING for row in known for value in row):
        raise DifferError
    if all(repr(value) == repr(row[0]) for row in known for value in row):
        return of_each(lambda row: row[0])
    if all(type(value) is int for row in known for value in row):
        steps = {after - value for row in known for value, after in pairwise(row)}
        if len(steps) == 1 and max(map(len, known)) >= _LONG:
            return Indexed("steps", [of_each(lambda row: row[0])], steps.pop())
    if all(repr(value) == repr(row[1]) for row in known for value in row[1:]):
        later = [MISSING if row is MISSING or len(row) == 1 else row[1] for row in rows]
        return Indexed("first", [of_each(lambda row: row[0]), replace(column, values=later)])
    if any(isinstance(value, Given | Code) for row in known for value in row):
        raise DifferError
    return Indexed("listed", [of_each(tuple, f"{column.setting}s")])
