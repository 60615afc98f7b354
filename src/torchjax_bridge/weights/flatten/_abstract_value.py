"""Abstract values: what is known of a tensor while a ``forward`` is interpreted, and how operations change that.

Knows no syntax and no settings of modules: ``_interpreter`` decides which operation happens where.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..trees import TorchNode

__all__ = [
    "CONSTANT",
    "PLAIN",
    "AbstractTensor",
    "AbstractValue",
    "concatenated",
    "elementwise",
    "flattened",
    "join",
    "part_of",
    "pooled",
    "viewed",
]


@dataclass(frozen=True)
class AbstractTensor:
    """What is known of a tensor.

    Attributes:
        kind: ``map``: a feature map; ``columns``: a map with only its positions flattened; ``flat``: a flattened
            map; ``plain``: features in the same order as in Flax, such as a Linear's output; ``viewed``: a view of
            plain features; ``constant``: a parameter, buffer or number of the model.
        channels: The channels of the map; 0 where they are not known.
        point: Whether the map has a single position.
        rows: Whether it is viewed with three axes: a sequence, or a map over one axis.
        linears: The ids of the nodes of Linears. It is the sum of their outputs.
        sure: Whether nothing unknown was added to it.
    """

    kind: Literal["map", "columns", "flat", "plain", "viewed", "constant"]
    channels: int = 0
    point: bool = False
    rows: bool = False
    linears: frozenset[int] = frozenset()
    sure: bool = True


AbstractValue = AbstractTensor | TorchNode | None
"""A tensor, a module, or None for what is not known."""

_UNKNOWN_MAP = AbstractTensor("map")
PLAIN = AbstractTensor("plain")
CONSTANT = AbstractTensor("constant")


def flattened(value: AbstractValue) -> AbstractValue:
    """The value with all axes but the batch flattened."""
    if not isinstance(value, AbstractTensor):
        return AbstractTensor("flat")
    if value.kind == "constant":
        return value
    if value.kind in ("plain", "viewed"):
        return replace(value, kind="plain", rows=False)
    return replace(value, kind="flat")


def viewed(value: AbstractValue, *, rows: bool = False) -> AbstractValue:
    """The value in another shape. A Linear's output may become a map."""
    known = isinstance(value, AbstractTensor) and value.linears and value.kind in ("plain", "viewed")
    return replace(value, kind="viewed", rows=rows) if known and isinstance(value, AbstractTensor) else None


def part_of(value: AbstractValue) -> AbstractValue:
    """A part or a mean of the value. Features stay on the last axis; of a map, nothing is known any more."""
    if value == CONSTANT:
        return value
    if isinstance(value, AbstractTensor) and (
        value.kind == "plain" or (value.kind == "viewed" and value.rows)
    ):
        return replace(value, kind="plain", rows=False, linears=frozenset())
    return None


def concatenated(values: Sequence[AbstractValue]) -> AbstractValue:
    """A tuple of values, or their concatenation: plain features if all of them are."""
    parts = [part_of(value) for value in values]
    computed = [value for value in parts if value != CONSTANT]
    return join(computed or parts) if all(value is not None for value in parts) else None


def pooled(value: AbstractValue, *, point: bool) -> AbstractValue:
    """The value after pooling, to a single position if ``point``."""
    if not point:
        return value
    return replace(value if isinstance(value, AbstractTensor) else _UNKNOWN_MAP, point=True)


def elementwise(one: AbstractValue, other: AbstractValue) -> AbstractValue:
    """A sum or product: takes the operand of which more is known, since shapes are broadcast."""
    if CONSTANT in (one, other):
        return other if one == CONSTANT else one
    seen = [value for value in (one, other) if isinstance(value, AbstractTensor)]
    if len(seen) < 2:
        return replace(seen[0], sure=False) if seen else None
    kinds = ("flat", "map", "columns", "viewed", "plain")
    first, second = sorted(seen, key=lambda value: (kinds.index(value.kind), value.point, -value.channels))
    linears = first.linears | second.linears if first.kind in ("plain", "viewed") else first.linears
    return replace(first, sure=first.sure and second.sure, linears=linears)


def join(values: Sequence[AbstractValue]) -> AbstractValue:
    """The join of the values of several branches: their value if they agree, else unknown."""
    if not values or not all(_as_sure(value) == _as_sure(values[0]) for value in values):
        return None
    unsure = [value for value in values if isinstance(value, AbstractTensor) and not value.sure]
    return unsure[0] if unsure else values[0]


def _as_sure(value: AbstractValue) -> AbstractValue:
    return replace(value, sure=True) if isinstance(value, AbstractTensor) else value
