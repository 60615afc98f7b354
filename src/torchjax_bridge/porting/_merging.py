"""What the constructor trees of several instances have in common: one tree, with a column where settings differ.

Where instances have layers in a row in different numbers, one constructor makes them all (`Run`).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ._constructors import MISSING, Call, Column, Either, Items, Numbered, Run, Start, Text, Tree, indexed
from ._lacking import laid_over
from ._runs import DifferError, run_of

__all__ = ["DifferError", "merge"]

_MOST_OPTIONAL = 3  # layers of one list


def merge(trees: Sequence[Tree | None], name: str) -> Tree:
    """One tree for all instances.

    Args:
        trees: The tree of each instance; None where it lacks the layer.
        name: The attribute that holds the layer.

    Raises:
        DifferError: They have not the same form.
    """
    poor = [tree is None or (isinstance(tree, Items) and not tree.items) for tree in trees]
    if all(poor):
        present = [tree for tree in trees if tree is not None]
        if len(present) not in (0, len(trees)):
            raise DifferError
        return present[0] if present else Text("None")
    if any(poor):
        empties = {
            f"{tree.start}{tree.end}" if isinstance(tree, Items) else None
            for tree, lacks in zip(trees, poor, strict=True)
            if lacks
        }
        if len(empties) > 1:
            raise DifferError
        flag = Column([not p for p in poor], f"has_{name}", name)
        return Either(
            flag,
            _merge([None if p else t for t, p in zip(trees, poor, strict=True)]),
            empties.pop() or "None",
        )
    return _merge(trees)


def _merge(trees: Sequence[Tree | None]) -> Tree:
    present = [tree for tree in trees if tree is not None]
    first = present[0]
    if any(type(tree) is not type(first) for tree in present):
        raise DifferError
    if isinstance(first, Text):
        if len({tree.text for tree in present}) > 1:  # type: ignore[union-attr]
            raise DifferError
        return first
    if isinstance(first, Column):
        values: list[Any] = []
        for tree in trees:
            values += [MISSING] if tree is None else tree.values  # type: ignore[union-attr]
        return replace(first, values=values)
    if isinstance(first, Numbered):
        rows = [tree.items if isinstance(tree, Numbered) else None for tree in trees]
        return run_of(rows, first.counted_by, merge=_merge)
    if isinstance(first, Start):
        return _merge_starts(first, trees)
    if isinstance(first, Items):
        return _merge_items(first, trees)
    if isinstance(first, Call):
        calls: list[Call] = present  # type: ignore[assignment]
        if len({(call.function, len(call.args), call.ends) for call in calls}) > 1:
            raise DifferError
        args = _merge_each([tree and tree.args for tree in trees])  # type: ignore[union-attr]
        kwargs: dict[str, Tree] = {}
        defaults = {name: value for call in calls for name, value in call.defaults.items()}
        for name in dict.fromkeys(name for call in calls for name in call.kwargs):
            column: list[Tree | None] = []
            for tree in trees:
                value = tree.kwargs.get(name) if isinstance(tree, Call) else None
                if isinstance(tree, Call) and value is None:
                    if name not in defaults:
                        raise DifferError
                    value = Column([defaults[name]], name)
                column.append(value)
            kwargs[name] = _merge(column)
        return Call(first.function, args, kwargs, defaults, first.ends)
    raise DifferError


def _merge_items(first: Items, trees: Sequence[Any]) -> Items:
    kinds = {(tree.start, tree.end, tree.between) for tree in trees if tree is not None}
    if len(kinds) > 1:
        raise DifferError
    return replace(first, items=_merge_each([tree and tree.items for tree in trees]))


def _merge_starts(first: Start, trees: Sequence[Any]) -> Tree:
    """One start for all; where each is made in its own way, that of the port's choice."""
    try:
        merged = _merge_items(first, trees)
    except DifferError:
        others = [tree and (tree.fallback or tree) for tree in trees]
        if all(one is other for one, other in zip(others, trees, strict=True)):
            raise
        return _merge(others)
    is_chosen = any(tree.is_chosen for tree in trees if tree is not None)
    fallbacks = [tree and tree.fallback for tree in trees]
    known = [tree for tree in fallbacks if tree is not None]
    fallback = _merge(fallbacks) if len(known) == len([t for t in trees if t is not None]) else None
    return replace(merged, is_chosen=is_chosen, fallback=fallback)  # type: ignore[call-arg]


def _merge_each(lists: Sequence[Any]) -> list[Tree]:
    """The merged items: each by its place, or where there are more in some instances than in others, a run."""
    length, *others = dict.fromkeys(len(items) for items in lists if items is not None)
    if not others:
        run = _grows(lists)
        return [run] if run else [_at(lists, place) for place in range(length)]
    for before, after in ((0, 0), (1, 0), (0, 1), (1, 1)):
        inner = [items and items[before : len(items) - after] for items in lists]
        try:
            run = run_of(inner, merge=_merge)
            return [
                *(_at(lists, place) for place in range(before)),
                run,
                *(_at(lists, -place - 1) for place in reversed(range(after))),
            ]
        except DifferError:
            continue
    return _with_optional(lists)


def _with_optional(lists: Sequence[Any]) -> list[Tree]:
    """The items of the longest list, those that some instances lack as optional ones."""
    longest = max((items for items in lists if items is not None), key=len)
    laid = [None if items is None else laid_over(items, longest) for items in lists]
    if any((one is None) != (items is None) for one, items in zip(laid, lists, strict=True)):
        raise DifferError
    lacking = {place for one in laid if one is not None for place, item in enumerate(one) if item is None}
    if len(lacking) > _MOST_OPTIONAL:
        raise DifferError  # two classes are easier to read
    found: list[Tree] = []
    for place in range(len(longest)):
        row = [None if one is None else one[place] for one in laid]
        has = [one is None or one[place] is not None for one in laid]
        merged = _merge(row)
        name = _question(merged)
        found.append(merged if all(has) else Either(Column(has, name), merged, "[]"))
    return found


def _question(tree: Tree) -> str:
    """What an argument that asks for an optional layer is called, by the class of the layer."""
    name = tree.function.rpartition(".")[2] if isinstance(tree, Call) else "first"
    return "has_" + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _at(lists: Sequence[Any], place: int) -> Tree:
    return _merge([items[place] if items is not None else None for items in lists])


def _grows(lists: Sequence[Any]) -> Run | None:
    """The items as a run, if a setting of theirs grows by steps, and all others follow from it."""
    try:
        run = run_of(lists, merge=_merge)
    except DifferError:
        return None
    kinds = {tree.kind for tree in indexed(run.item)}
    if isinstance(run.item, Call) and run.item.function.startswith("nnx."):
        return None  # plain layers with growing sizes are as well read one by one
    return run if "steps" in kinds and "listed" not in kinds else None
