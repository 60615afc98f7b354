"""How far the arrays of a torch layer and of its Flax twin are apart, and whether that is rounding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from ._values import (
    Gap,
    Value,
    flax_layouts,
    gap,
    has_one_layout,
    nearest_layout,
    same_values,
    tolerance,
    without_causal_tail,
)

__all__ = ["Bounds", "ComparedArrays", "compare", "pair_arrays"]


@dataclass(frozen=True)
class Bounds:
    """The differences that pass for rounding: ``atol``, ``rtol`` of the largest value, or by the dtype."""

    atol: float | None = None
    rtol: float | None = None

    def allow(self, found: Gap, *dtypes: str) -> bool:
        """Whether a difference is within the bounds."""
        rtol = self.rtol
        if rtol is None:
            rtol = tolerance(*dtypes) if self.atol is None else 0.0
        return found.difference <= (self.atol or 0.0) or found.relative <= rtol


@dataclass(frozen=True, eq=False)
class ComparedArrays:
    """The outputs (or the inputs) of two layers, compared.

    Attributes:
        ours: torch's array in Flax's layout; None if no layout gives it Flax's shape.
        theirs: Flax's array.
        gap: How far they are apart.
        ok: Whether that is within the bounds.
        shapes: Both shapes.
    """

    ours: np.ndarray | None
    theirs: np.ndarray
    gap: Gap
    ok: bool
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


def compare(
    module: nn.Module, ours: Sequence[Value], theirs: Sequence[Value], bounds: Bounds, *, whole: bool = False
) -> ComparedArrays | None:
    """Compare what two layers took or gave: array by array, or torch's first array with the nearest of Flax's.

    Args:
        module: The torch layer.
        ours: What torch's took or gave.
        theirs: What Flax's did.
        bounds: What passes for rounding.
        whole: Whether they are the outputs of the models, which must have the same axes.
    """
    if not ours or not theirs:
        return None
    both = None if isinstance(module, _SEQUENCES) else pair_arrays(ours, theirs)
    if both is not None:
        pairs = [_compare_pair(module, one, other, bounds, whole=whole) for one, other in both]
        bad = [pair for pair in pairs if not pair.ok]
        return bad[0] if bad else max(pairs, key=lambda pair: pair.gap.relative)
    tried = [_compare_pair(module, ours[0], other, bounds, whole=whole) for other in theirs]
    return min(tried, key=lambda pair: pair.gap.difference)


def pair_arrays(
    ours: Sequence[Value], theirs: Sequence[Value], depth: int = 0
) -> list[tuple[Value, Value]] | None:
    """Pair the arrays of both sides: by name where both have names, else in order.

    None where they share no names and are not equally many.
    """
    one, other = _by_key(ours, depth), _by_key(theirs, depth)
    common = [key for key in one if key in other]
    named = all(isinstance(key, str) for key in (*one, *other))
    if common and (named or one.keys() == other.keys()) and None not in common:
        pairs: list[tuple[Value, Value]] = []
        for key in common:
            inner = pair_arrays(one[key], other[key], depth + 1)
            if inner is None and not named:
                break
            pairs += inner or zip(one[key], other[key], strict=False)
        else:
            rest, others = ([v for v in all_ if _key(v, depth) not in common] for all_ in (ours, theirs))
            return pairs + (list(zip(rest, others, strict=True)) if len(rest) == len(others) else [])
    return list(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else None


def _by_key(values: Sequence[Value], depth: int) -> dict[str | int | None, list[Value]]:
    found: dict[str | int | None, list[Value]] = {}
    for value in values:
        found.setdefault(_key(value, depth), []).append(value)
    return found


def _key(value: Value, depth: int) -> str | int | None:
    return value.path[depth] if len(value.path) > depth else None


# Their further outputs (states, attention weights) are elsewhere in Flax, or nowhere.
_SEQUENCES = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def _compare_pair(
    module: nn.Module, one: Value, other: Value, bounds: Bounds, *, whole: bool
) -> ComparedArrays:
    ways = flax_layouts(without_causal_tail(one.array, module, other.array.shape), module, other.array.shape)
    if has_one_layout(module):
        ways = ways[:1]
    found = nearest_layout(ways, other.array)
    shapes = (one.array.shape, other.array.shape)
    if found is None:
        for way, theirs in same_values(one.array, other.array, whole=whole):
            apart = gap(way, theirs)
            if bounds.allow(apart, one.dtype, other.dtype):
                return ComparedArrays(way, theirs, apart, True, shapes)
        return ComparedArrays(None, other.array, Gap(float("inf"), float("inf")), False, shapes)
    way, apart = found
    return ComparedArrays(way, other.array, apart, bounds.allow(apart, one.dtype, other.dtype), shapes)
