"""The order in which classes are written: each after those that its instances hold.

The instances of a torch class become one class. Where one is inside of another, those of each height are a group
of their own, as is a Sequential in a block of a Sequential.
"""

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TypeAlias

from torch import nn

from ._attributes import is_inside

__all__ = ["in_order"]

_Kind: TypeAlias = type[nn.Module]
_Group: TypeAlias = tuple[_Kind, int | None]  # a class, and the height of its instances if that matters


def in_order(paths: Sequence[str], kinds: Mapping[str, _Kind]) -> list[tuple[_Kind, list[str]]]:
    """The modules in groups that may become one class, each group after those that it holds.

    Args:
        paths: The modules.
        kinds: The torch class of each.
    """
    inside = {path: [other for other in paths if other != path and is_inside(path, other)] for path in paths}
    heights: dict[str, int] = {}
    for path in sorted(paths, key=lambda path: len(inside[path])):
        heights[path] = 1 + max((heights[other] for other in inside[path]), default=0)
    split = {kinds[path] for path in paths if any(kinds[other] is kinds[path] for other in inside[path])}
    while True:
        groups = {path: (kinds[path], heights[path] if kinds[path] in split else None) for path in paths}
        held: dict[_Group, set[_Group]] = {group: set() for group in groups.values()}
        for path in paths:
            held[groups[path]] |= {groups[other] for other in inside[path]}
        try:
            order = list(TopologicalSorter(held).static_order())
        except CycleError as err:
            split |= {kind for kind, _ in err.args[1]}
            continue
        depths: dict[_Group, int] = {}
        for group in order:
            depths[group] = 1 + max((depths[other] for other in held[group]), default=0)
        return [
            (group[0], [path for path in paths if groups[path] == group])
            for group in sorted(held, key=depths.__getitem__)
        ]
