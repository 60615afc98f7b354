"""Operands and axes: how values of several layouts are brought together, and where torch's axes stand."""

import math
from collections.abc import Sequence
from typing import Any

from torchjax_bridge.recording import Dim, Parameter, SizeOf, Value, is_size

from .._lowering import Lowering
from .._placed import Axes, Placed, torch_order
from ._held_numbers import held_number

__all__ = ["aligned", "axes_of", "axis_text", "is_fixed", "listed", "operands", "remaining", "sizes_of"]


def operands(at: Lowering, values: Sequence[Any]) -> tuple[list[str], Placed]:
    """The expressions of values that are broadcast against each other, and where the result stands."""
    tensors = [value for value in values if isinstance(value, Value)]
    if not tensors:  # torch.div(4, 2) gives a tensor
        return [f"jnp.asarray({at.number(value)})" for value in values], Placed("", ())
    rank = max(len(value.shape) for value in tensors)
    full = [value for value in tensors if len(value.shape) == rank]
    computed = [value for value in full if at.is_computed(value)]
    maps = {(at.at(v).map_axis, at.at(v).map_shape) for v in tensors if at.at(v).map_axis is not None}
    plain = [v for v in tensors if at.at(v).map_axis is None and not (_is_single(v) and len(v.shape) < rank)]
    if len(maps) > 1 or (maps and plain):
        for value in tensors:
            at.in_torch_map_order(value)
        maps = set()

    def weight(value: Value) -> tuple[int, bool]:
        # Maps keep their channels last; matrices and ``(N, length, features)`` are as in torch.
        return math.prod(value.shape), (at.at(value).order != torch_order(rank)) is (rank > 3)

    order = at.at(max(computed or full, key=weight)).order
    texts = [aligned(at, v, order) if isinstance(v, Value) else at.number(v) for v in values]
    map_axis, map_shape = next(iter(maps), (None, ()))
    return texts, Placed("", order, map_axis, map_shape)


def aligned(at: Lowering, value: Value, order: Axes) -> str:
    """The expression of a value, of the same or a lower rank, so that it broadcasts against one in this order."""
    placed, rank = at.at(value), len(value.shape)
    if _is_single(value) and rank < len(order):
        return placed.text if rank == 0 else f"{placed.text}.reshape(())"
    missing = len(order) - rank
    own = tuple(axis - missing for axis in order if axis >= missing)
    text = placed.text if placed.map_axis is not None else at.read(value, own)
    present = [axis >= missing for axis in order]
    if all(present) or all(present[present.index(True) :]):
        return text  # trailing axes, as NumPy broadcasts
    items = ", ".join(":" if here else "None" for here in present[present.index(True) :])
    return f"{text}[{items}]"


def _is_single(value: Value) -> bool:
    """Whether a value has one element at any batch size."""
    return not value.shape or (isinstance(value.origin, Parameter) and math.prod(value.shape) == 1)


def is_fixed(number: Any) -> bool:
    """Whether a number is the same for inputs of any size."""
    return not is_size(number)


def sizes_of(value: Value) -> list[Any]:
    """The sizes of a value, with their origin."""
    return [Dim(size, SizeOf(value, axis)) for axis, size in enumerate(value.shape)]


def listed(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """``view(2, 3)``, ``view((2, 3))`` and ``view(size=(2, 3))`` alike."""
    given = args or tuple(kwargs[name] for name in names if name in kwargs)
    items = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
    return list(map(held_number, items))


# --- axes ---------------------------------------------------------------------------------------------------


def axes_of(value: Value, dim: Any) -> tuple[int, ...]:
    """The torch axes that ``dim`` names; all of them for None or an empty tuple."""
    rank = len(value.shape)
    if dim is None or (isinstance(dim, tuple | list) and not dim):
        return tuple(range(rank))
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    return tuple(sorted(int(axis) % rank for axis in dims)) if rank else ()


def axis_text(placed: Placed, axes: tuple[int, ...]) -> str:
    """Where axes stand, as an argument."""
    places = sorted(placed.place(axis) for axis in axes)
    if len(places) == 1:
        return "-1" if places[0] == placed.rank - 1 and placed.rank > 1 else str(places[0])
    return str(tuple(places))


def remaining(order: Axes, gone: tuple[int, ...], keepdim: bool) -> Axes:
    """The order of the axes that are left."""
    if keepdim:
        return order
    left = [axis for axis in order if axis not in gone]
    return tuple(sorted(left).index(axis) for axis in left)
