"""Indexing, gathering, and writing to a part of a tensor."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError, torch_order
from ._reductions import axes_of, axis_text
from ._table import operation

__all__: list[str] = []


def _index_text(at: Lowering, index: Any) -> str:
    if isinstance(index, slice):
        start, stop, step = (
            "" if end is None else at.number(end) for end in (index.start, index.stop, index.step)
        )
        return f"{start}:{stop}" + (f":{step}" if step else "")
    if index is None or index is Ellipsis:
        return "None" if index is None else "..."
    if isinstance(index, Value):
        return at.in_torch_order(index)
    if isinstance(index, list | tuple):
        return f"jnp.asarray({at.number(list(index))})"
    return at.number(index)


def _items(index: Any) -> list[Any]:
    return list(index) if isinstance(index, tuple) else [index]


def _is_bool_mask(index: Any) -> bool:
    return isinstance(index, Value) and str(index.dtype) in ("torch.bool", "torch.uint8")


@operation("getitem")
def getitem(at: Lowering, node: Node, input: Value, index: Any) -> Placed:
    items = _items(index)
    if any(map(_is_bool_mask, items)):
        raise RefusedError(
            "an index by a mask gives an output whose shape depends on values; use torch.where"
        )
    if any(isinstance(item, bool) for item in items):
        raise RefusedError("an index by True or False")
    rank = len(input.shape)
    named = sum(item is not None and item is not Ellipsis for item in items)
    if any(item is Ellipsis for item in items):
        place = next(place for place, item in enumerate(items) if item is Ellipsis)
        items[place : place + 1] = [slice(None)] * (rank - named)
    else:
        items += [slice(None)] * (rank - named)
    if all(isinstance(item, slice | int) for item in items):
        placed = at.in_torch_map_order(input)
        kept = [axis for axis in placed.order if isinstance(items[axis], slice)]
        order = tuple(sorted(kept).index(axis) for axis in kept)
        parts = [_index_text(at, items[axis]) for axis in placed.order]
        if all(part == ":" for part in parts):
            return placed
        while len(parts) > 1 and parts[-1] == ":":
            parts.pop()
        if len(parts) > 2 and len(parts) == rank and all(part == ":" for part in parts[:-1]):
            parts = ["...", parts[-1]]
        return Placed(f"{placed.text}[{', '.join(parts)}]", order)
    parts = [_index_text(at, item) for item in items]
    while len(parts) > 1 and parts[-1] == ":":
        parts.pop()
    return Placed(f"{at.in_torch_order(input)}[{', '.join(parts)}]", torch_order(len(node.result.shape)))


@operation("setitem")
def setitem(at: Lowering, node: Node, input: Value, index: Any, value: Any) -> Placed:
    items = _items(index)
    if any(map(_is_bool_mask, items)):
        if len(items) > 1 or (isinstance(value, Value) and value.shape):
            raise RefusedError("an assignment by a mask is translated for one number")
        text = f"jnp.where({at.in_torch_order(items[0])}, {at.read(value)}, {at.in_torch_order(input)})"
        if len(items[0].shape) != len(input.shape):
            raise RefusedError("an assignment by a mask of fewer axes")
        return Placed(text, torch_order(len(input.shape)))
    parts = ", ".join(_index_text(at, item) for item in items)
    text = f"{at.in_torch_order(input)}.at[{parts}].set({at.in_torch_order(value)})"
    return Placed(text, torch_order(len(input.shape)))


@operation("select")
def select(at: Lowering, node: Node, input: Value, dim: Any, index: Any) -> Placed:
    (axis,) = axes_of(input, dim)
    return getitem(at, node, input, (*[slice(None)] * axis, index))


@operation("narrow")
def narrow(at: Lowering, node: Node, input: Value, dim: Any, start: Any, length: Any) -> Placed:
    (axis,) = axes_of(input, dim)
    return getitem(at, node, input, (*[slice(None)] * axis, slice(start, start + length)))


@operation("index_select")
def index_select(at: Lowering, node: Node, input: Value, dim: Any, index: Value) -> Placed:
    placed = at.in_torch_map_order(input)
    where = axis_text(placed, axes_of(input, dim))
    return placed.with_text(f"jnp.take({placed.text}, {at.read(index)}, axis={where})")


@operation("gather", "take_along_dim")
def gather(
    at: Lowering, node: Node, input: Value, dim: Any, index: Value, *, sparse_grad: bool = False
) -> Placed:
    if isinstance(dim, Value):
        dim, index = index, dim  # Tensor.take_along_dim(indices, dim)
    if any(
        a != b
        for axis, (a, b) in enumerate(zip(input.shape, index.shape, strict=True))
        if axis != int(dim) % len(input.shape)
    ):
        raise RefusedError("torch.gather whose index is smaller than the input along another axis")
    (axis,) = axes_of(input, dim)
    text = f"jnp.take_along_axis({at.in_torch_order(input)}, {at.in_torch_order(index)}, axis={axis})"
    return Placed(text, torch_order(len(input.shape)))
