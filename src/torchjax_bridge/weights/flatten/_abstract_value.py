"""What is known of a tensor while a ``forward`` is read, and what becomes of that along the way.

Values alone, without syntax and without modules' settings: ``_interpreter`` says which of these happens where.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..trees import TorchNode

__all__ = [
    "OWN",
    "PLAIN",
    "Seen",
    "Value",
    "agreed",
    "all_features",
    "flattened",
    "part_of",
    "pointed",
    "together",
    "viewed",
]


@dataclass(frozen=True)
class Seen:
    """What is known of a tensor.

    Attributes:
        kind: A map, one whose positions alone were flattened, a flattened map, features that lie as they do in Flax
            (what a Linear gives), a view of those, or a parameter or number of the model's own.
        channels: The channels of the map; 0 where they are not known.
        point: Whether the map has a single position.
        rows: Whether it is viewed with three axes, as a sequence is, though a map over one axis may be.
        by: The ids of the nodes of the Linears whose outputs it is the sum of.
        sure: Whether nothing that is not known was added to it.
    """

    kind: Literal["map", "columns", "flat", "plain", "viewed", "own"]
    channels: int = 0
    point: bool = False
    rows: bool = False
    by: frozenset[int] = frozenset()
    sure: bool = True


Value = Seen | TorchNode | None  # a tensor, a module that a name stands for, or what is not known
_UNKNOWN_MAP = Seen("map")
PLAIN = Seen("plain")
OWN = Seen("own")


def flattened(value: Value) -> Value:
    """What flattening all but the batch makes of it."""
    if not isinstance(value, Seen):
        return Seen("flat")
    if value.kind == "own":
        return value
    if value.kind in ("plain", "viewed"):
        return replace(value, kind="plain", rows=False)
    return replace(value, kind="flat")


def viewed(value: Value, *, rows: bool = False) -> Value:
    """What another shape makes of it: perhaps a map, of what a Linear gives."""
    known = isinstance(value, Seen) and value.by and value.kind in ("plain", "viewed")
    return replace(value, kind="viewed", rows=rows) if known and isinstance(value, Seen) else None


def part_of(value: Value) -> Value:
    """What a part of it is, or a mean: features are on the last axis as before, and of a map nothing is known."""
    if value == OWN:
        return value
    if not isinstance(value, Seen) or not (value.kind == "plain" or (value.kind == "viewed" and value.rows)):
        return None
    return replace(value, kind="plain", rows=False, by=frozenset())


def all_features(values: Sequence[Value]) -> Value:
    """What a tuple is, or what is joined of it: features, if all parts are."""
    seen = [part_of(value) for value in values]
    given = [value for value in seen if value != OWN]
    return agreed(given or seen) if all(value is not None for value in seen) else None


def pointed(value: Value, *, point: bool) -> Value:
    """The same, pooled to a single position if ``point``."""
    if not point:
        return value
    return replace(value, point=True) if isinstance(value, Seen) else replace(_UNKNOWN_MAP, point=True)


def together(one: Value, other: Value) -> Value:
    """What a sum or a product of two is: what says more of the two, since shapes are broadcast."""
    if OWN in (one, other):  # which says nothing of the other
        return other if one == OWN else one
    seen = [value for value in (one, other) if isinstance(value, Seen)]
    if len(seen) < 2:
        return replace(seen[0], sure=False) if seen else None
    kinds = ("flat", "map", "columns", "viewed", "plain")
    first, second = sorted(seen, key=lambda value: (kinds.index(value.kind), value.point, -value.channels))
    first = replace(first, sure=first.sure and second.sure)
    return replace(first, by=first.by | second.by) if first.kind in ("plain", "viewed") else first


def agreed(values: Sequence[Value]) -> Value:
    """What several ways come to, if it is the same for all."""
    if not values or not all(_but_sure(value) == _but_sure(values[0]) for value in values):
        return None
    unsure = [value for value in values if isinstance(value, Seen) and not value.sure]
    return unsure[0] if unsure else values[0]


def _but_sure(value: Value) -> Value:
    return replace(value, sure=True) if isinstance(value, Seen) else value
