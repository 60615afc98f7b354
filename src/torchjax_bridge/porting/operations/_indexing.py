"""Indexing, and writing to a part of a tensor.

torch takes numbers and slices first, and indices of tensors then; NumPy takes a number beside an array for an
array. So the two kinds are two steps here.
"""

from dataclasses import dataclass
from typing import Any

import torch

from torchjax_bridge.recording import Node, Value, tensors_of

from .._lowering import Lowering, transposed
from .._placed import Axes, Placed, RefusedError, torch_order
from ._held_numbers import held_number
from ._operands import aligned, axes_of, axis_text
from ._table import last_name, operation

__all__: list[str] = []

_MASK = "an index by a mask gives an output whose shape depends on values; use torch.where"


@dataclass
class _Basic:
    """The first step: what stands at each place of the emitted array, and the order of what is left.

    Attributes:
        parts: The text of the index of each emitted axis.
        order: The order of the axes that are left.
        arrays: The indices that are left for the second step, by axis of what is left.
    """

    parts: list[str]
    order: Axes
    arrays: dict[int, Value | list[Any]]

    @property
    def text(self) -> str:
        """The index without trailing colons."""
        parts = list(self.parts)
        while len(parts) > 1 and parts[-1] == ":":
            parts.pop()
        plain = parts == self.parts and len(parts) > 2 and all(part == ":" for part in parts[:-1])
        return f"..., {parts[-1]}" if plain else ", ".join(parts)

    @property
    def is_all(self) -> bool:
        """Whether the first step does nothing."""
        return all(part == ":" for part in self.parts)


def _is_mask(item: Any) -> bool:
    if isinstance(item, list | tuple):
        return any(map(_is_mask, item))
    if isinstance(item, Value):
        return item.dtype in (torch.bool, torch.uint8)
    return isinstance(item, bool)


def _items(index: Any, rank: int) -> list[Any]:
    """One item an axis of the input, and None where one comes in."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(map(_is_mask, items)):
        raise RefusedError(_MASK)
    rest = [slice(None)] * (rank - sum(item is not None and item is not Ellipsis for item in items))
    place = next((place for place, item in enumerate(items) if item is Ellipsis), None)
    return [*items, *rest] if place is None else [*items[:place], *rest, *items[place + 1 :]]


def _slice_text(at: Lowering, item: slice) -> str:
    ends = tuple(map(held_number, (item.start, item.stop, item.step)))
    if any(isinstance(end, Value) for end in ends):
        raise RefusedError("a slice with a tensor as its end; use a number, or torch.gather")
    start, stop, step = ("" if end is None else at.number(end) for end in ends)
    return f"{start}:{stop}" + (f":{step}" if step else "")


def _is_array(item: Any) -> bool:
    return isinstance(item, list | tuple) or (isinstance(item, Value) and bool(item.shape))


def _basic(at: Lowering, placed: Placed, items: list[Any]) -> _Basic:
    own = [item for item in items if item is not None]
    axes: dict[int, int] = {}  # of the input, and what becomes of it
    arrays: dict[int, Any] = {}
    news: list[int] = []
    old = 0
    for item in items:
        axis = len(axes) + len(news)
        if item is None:
            news.append(axis)
            continue
        if isinstance(item, slice) or _is_array(item):
            axes[old] = axis
        if _is_array(item):
            arrays[axis] = item
        old += 1
    entries: list[tuple[str, int | None]] = [(_part(at, own[old]), axes.get(old)) for old in placed.order]
    for new in news:  # behind the axis that it follows
        where = next((place + 1 for place, (_, axis) in enumerate(entries) if axis == new - 1), 0)
        entries.insert(where if new else 0, ("None", new))
    order = tuple(axis for _, axis in entries if axis is not None)
    return _Basic([part for part, _ in entries], order, arrays)


def _part(at: Lowering, item: Any) -> str:
    if isinstance(item, slice):
        return _slice_text(at, item)
    return ":" if _is_array(item) else at.read(item)


def _array_text(at: Lowering, item: Any) -> str:
    if isinstance(item, Value):
        return at.in_torch_order(item)
    if any(tensors_of(item)):
        raise RefusedError("an index by a list that holds tensors; stack them first")
    return f"jnp.asarray({list(map(int, item))})" if all(isinstance(i, int) for i in item) else _nested(item)


def _nested(item: Any) -> str:
    return f"jnp.asarray({torch.tensor(item).tolist()})"


@operation("getitem")
def getitem(at: Lowering, node: Node, input: Value, index: Any) -> Placed:
    if isinstance(index, Value) and _is_mask(index) and _is_put_back(at, node, index):
        return at.nowhere(len(node.result.shape))
    items = _items(index, len(input.shape))
    placed = at.in_torch_map_order(input)
    basic = _basic(at, placed, items)
    first = placed if basic.is_all else Placed(f"{placed.text}[{basic.text}]", basic.order)
    if not basic.arrays:
        return first
    if len(basic.arrays) == 1:
        ((axis, array),) = basic.arrays.items()
        place, text = first.place(axis), _array_text(at, array)
        rank = len(array.shape) if isinstance(array, Value) else torch.tensor(array).dim()
        order: list[int] = []
        for old in first.order:
            order += range(axis, axis + rank) if old == axis else [old + (rank - 1) * (old > axis)]
        return Placed(f"{first.text}[{', '.join([*[':'] * place, text])}]", tuple(order))
    if first.order != torch_order(first.rank):
        first = Placed(_in_order(first), torch_order(first.rank))
    parts = [
        _array_text(at, basic.arrays[axis]) if axis in basic.arrays else ":"
        for axis in range(max(basic.arrays) + 1)
    ]
    return Placed(f"{first.text}[{', '.join(parts)}]", torch_order(len(node.result.shape)))


def _in_order(placed: Placed) -> str:
    axes = tuple(placed.order.index(axis) for axis in range(placed.rank))
    return transposed(placed.text, axes)


# --- writing ------------------------------------------------------------------------------------------------


@operation("setitem")
def setitem(at: Lowering, node: Node, input: Value, index: Any, value: Any) -> Placed:
    items = list(index) if isinstance(index, tuple) else [index]
    if any(map(_is_mask, items)):
        return _masked(at, node, input, items, value)
    return _written(at, node, input, index, value, "set")


@operation("index_put")
def index_put(
    at: Lowering, node: Node, input: Value, indices: Any, values: Value, accumulate: bool = False
) -> Placed:
    return _written(at, node, input, tuple(indices), values, "add" if accumulate else "set")


def _written(at: Lowering, node: Node, input: Value, index: Any, value: Any, method: str) -> Placed:
    items = _items(index, len(input.shape))
    placed = at.in_torch_map_order(input)
    basic = _basic(at, placed, items)
    if not basic.arrays:
        new = value_text(at, node, input, value, basic.order)
        return placed.with_text(f"{placed.text}.at[{basic.text}].{method}({new})")
    chosen = [place for place, item in enumerate(items) if not isinstance(item, slice)]
    apart = chosen[-1] - chosen[0] >= len(chosen) and any(not _is_array(items[place]) for place in chosen)
    if len(items) > len(input.shape) or any(item is None for item in items) or apart:
        raise RefusedError(
            "an assignment by tensors and, apart from them, by numbers or None; take the part by the numbers "
            "first, and write to that"
        )
    order = torch_order(len(input.shape))
    parts = [_array_text(at, item) if _is_array(item) else _part(at, item) for item in items]
    while parts[-1] == ":":
        parts.pop()
    arrays = [item for item in items if _is_array(item)]
    ranks = [len(item.shape) if isinstance(item, Value) else torch.tensor(item).dim() for item in arrays]
    rank = sum(isinstance(item, slice) for item in items) + max(ranks)
    new = value_text(at, node, input, value, torch_order(rank))
    return Placed(f"{at.read(input, order)}.at[{', '.join(parts)}].{method}({new})", order)


def value_text(at: Lowering, node: Node, input: Value, value: Any, order: Axes) -> str:
    """What is written to a part of a tensor: of its dtype, and broadcast to that part's order."""
    wanted = at.number(input.dtype)
    if not isinstance(value, Value):
        exact = not isinstance(value, float) or "float" in wanted
        return at.number(value) if exact else f"jnp.asarray({at.number(value)}).astype({wanted})"
    if len(value.shape) > len(order):
        raise RefusedError(
            f"{node.function} of a value with more axes than the part it is written to; squeeze it"
        )
    at.in_torch_map_order(value)
    text = aligned(at, value, order)
    return text if at.number(value.dtype) == wanted else f"{text}.astype({wanted})"


def _masked(at: Lowering, node: Node, input: Value, items: list[Any], value: Any) -> Placed:
    mask = items[0]
    if isinstance(value, Value) and isinstance(mask, Value) and _is_chosen_by(value, mask):
        other = value.origin.args[0]  # type: ignore[union-attr]
        placed = at.in_torch_map_order(input)
        where = _over_axes(at, mask, placed.order)
        return placed.with_text(f"jnp.where({where}, {at.read(other, placed.order)}, {placed.text})")
    if len(items) > 1 or not isinstance(mask, Value) or (isinstance(value, Value) and value.shape):
        raise RefusedError(
            "an assignment by a mask is translated for one mask and one number; use torch.where"
        )
    placed = at.in_torch_map_order(input)
    new = at.read(value) if isinstance(value, Value) else at.number(value)
    return placed.with_text(f"jnp.where({_over_axes(at, mask, placed.order)}, {new}, {placed.text})")


def _over_axes(at: Lowering, mask: Value, order: Axes) -> str:
    """A mask of the first axes, beside an array whose axes stand in an order."""
    text = at.read(mask, tuple(axis for axis in order if axis < len(mask.shape)))
    items = [":" if axis < len(mask.shape) else "None" for axis in order]
    if "None" in items:
        text += f"[{', '.join(items)}]"
    return text if mask.dtype == torch.bool else f"({text} != 0)"


def _is_chosen_by(value: Value, mask: Value) -> bool:
    """Whether a value is what a mask chooses of a tensor, as in ``y[mask] = x[mask]``."""
    made = value.origin
    return isinstance(made, Node) and last_name(made) == "getitem" and made.args[1] is mask


def _is_put_back(at: Lowering, node: Node, mask: Value) -> bool:
    """Whether what a mask chooses is assigned to the places of the same mask, in a tensor of the same shape."""
    value, shape = node.result, node.args[0].shape
    readers = [one for one in at.frame.nodes if value in tensors_of((one.args, one.kwargs))]
    return bool(readers) and all(
        last_name(one) == "setitem"
        and one.args[1] is mask
        and one.args[2] is value
        and one.args[0].shape == shape
        for one in readers
    )


# --- along one axis -----------------------------------------------------------------------------------------


@operation("select")
def select(at: Lowering, node: Node, input: Value, dim: Any, index: Any) -> Placed:
    (axis,) = axes_of(input, dim)
    return getitem(at, node, input, (*[slice(None)] * axis, index))


@operation("narrow")
def narrow(at: Lowering, node: Node, input: Value, dim: Any, start: Any, length: Any) -> Placed:
    (axis,) = axes_of(input, dim)
    if isinstance(start, Value):
        raise RefusedError("torch.narrow that starts at a tensor; pass a number")
    end = start + length
    if int(start) < 0 <= int(end):
        end = None
    return getitem(at, node, input, (*[slice(None)] * axis, slice(start, end)))


@operation("index_select")
def index_select(at: Lowering, node: Node, input: Value, dim: Any, index: Value) -> Placed:
    placed = at.in_torch_map_order(input)
    text = at.read(index) if index.shape else f"{at.read(index)}.reshape(1)"
    where = axis_text(placed, axes_of(input, dim))
    return placed.with_text(f"jnp.take({placed.text}, {text}, axis={where})")


@operation("take")
def take(at: Lowering, node: Node, input: Value, index: Value) -> Placed:
    placed = at.in_torch_map_order(index)
    return placed.with_text(f"{at.in_torch_order(input)}.reshape(-1)[{placed.text}]")
