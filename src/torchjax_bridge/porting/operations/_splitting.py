"""Functions that join tensors along an axis, or take one apart."""

from typing import Any

from torchjax_bridge.recording import Node, Value, tensors_of

from .._lowering import Lowering
from .._placed import Placed, Several, torch_order
from ._reductions import axes_of, axis_text, remaining
from ._table import operation

__all__: list[str] = []


@operation("cat", "concat", "concatenate")
def concatenate(at: Lowering, node: Node, tensors: Any, dim: Any = 0, *, out: None = None) -> Placed:
    values = [value for value in tensors if value.shape != (0,)]
    placed = [at.in_torch_map_order(value) for value in values]
    computed = [place.order for value, place in zip(values, placed, strict=True) if at.is_computed(value)]
    orders = computed or [placed[0].order]
    order = max(orders, key=orders.count)
    result = Placed("", order)
    where = axis_text(result, axes_of(values[0], dim))
    whole = next(
        (name for name, tree in at.frame.inputs if isinstance(tree, list | tuple) and list(tree) == values),
        "",
    )
    listed = whole if whole and all(place.order == order for place in placed) else ""
    listed = listed or f"[{', '.join(at.read(value, order) for value in values)}]"
    return result.with_text(f"jnp.concatenate({listed}, axis={where})")


@operation("stack")
def stack(at: Lowering, node: Node, tensors: Any, dim: Any = 0, *, out: None = None) -> Placed:
    rank = len(tensors[0].shape) + 1
    listed = ", ".join(map(at.in_torch_order, tensors))
    return Placed(f"jnp.stack([{listed}], axis={int(dim) % rank})", torch_order(rank))


@operation("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def split(
    at: Lowering, node: Node, input: Value, sections: Any = None, dim: Any = 0, **kwargs: Any
) -> Several:
    placed = at.in_torch_map_order(input)
    (axis,) = axes_of(input, dim)
    outputs = list(tensors_of(node.result))
    sizes = [output.shape[axis] for output in outputs]
    if len(set(sizes)) == 1:
        how = str(len(sizes))
    else:
        how = str([sum(sizes[: place + 1]) for place in range(len(sizes) - 1)])
    text = f"jnp.split({placed.text}, {how}, axis={axis_text(placed, (axis,))})"
    return Several(text, (placed.order,) * len(outputs))


@operation("unbind", "iter")
def unbind(at: Lowering, node: Node, input: Value, dim: Any = 0) -> Several:
    placed = at.in_torch_map_order(input)
    (axis,) = axes_of(input, dim)
    place = placed.place(axis)
    text = placed.text if place == 0 else f"jnp.moveaxis({placed.text}, {place}, 0)"
    return Several(text, (remaining(placed.order, (axis,), keepdim=False),) * len(node.result))


@operation("meshgrid")
def meshgrid(at: Lowering, node: Node, *tensors: Any, indexing: str = "ij") -> Several:
    values = list(tensors_of(tensors))
    listed = ", ".join(map(at.read, values))
    return Several(
        f"jnp.meshgrid({listed}, indexing={indexing!r})", (torch_order(len(values)),) * len(values)
    )
