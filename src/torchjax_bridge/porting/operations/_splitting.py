"""Functions that join tensors along an axis, or take one apart."""

from typing import Any

from torchjax_bridge.recording import Node, Value, tensors_of

from .._lowering import Lowering
from .._placed import Axes, Placed, RefusedError, Several, torch_order
from .._reserved import argument_name
from ._operands import axes_of, axis_text, is_fixed, operands, remaining
from ._table import last_name, operation

__all__: list[str] = []


def _common_order(at: Lowering, values: list[Value]) -> Axes:
    """The order in which most of the values stand; parameters and constants follow the others."""
    placed = [at.in_torch_map_order(value) for value in values]
    computed = [place.order for value, place in zip(values, placed, strict=True) if at.is_computed(value)]
    orders = computed or [placed[0].order]
    return max(orders, key=orders.count)


@operation("cat", "concat", "concatenate")
def concatenate(at: Lowering, node: Node, tensors: Any, dim: Any = 0) -> Placed:
    values = [value for value in tensors_of(tensors) if value.shape != (0,)]
    order = _common_order(at, values)
    result = Placed("", order)
    where = axis_text(result, axes_of(values[0], dim))
    whole = next(
        (
            argument_name(name)
            for name, tree in at.frame.inputs
            if isinstance(tree, list | tuple) and list(tree) == values
        ),
        "",
    )
    listed = whole if whole and all(at.at(value).order == order for value in values) else ""
    listed = listed or f"[{', '.join(at.read(value, order) for value in values)}]"
    return result.with_text(f"jnp.concatenate({listed}, axis={where})")


@operation("stack")
def stack(at: Lowering, node: Node, tensors: Any, dim: Any = 0) -> Placed:
    values = list(tensors_of(tensors))
    own = _common_order(at, values)
    axis = int(dim) % (len(own) + 1)
    order = [old + (old >= axis) for old in own]
    plain = own == torch_order(len(own))
    place = axis if plain else (order.index(axis - 1) + 1 if axis - 1 in order else 0)
    order.insert(place, axis)
    listed = ", ".join(at.read(value, own) for value in values)
    return Placed(f"jnp.stack([{listed}], axis={place})", tuple(order))


@operation("hstack", "vstack", "row_stack", "dstack", "column_stack")
def stack_along(at: Lowering, node: Node, tensors: Any) -> Placed:
    name = last_name(node).replace("row_stack", "vstack")
    listed = ", ".join(map(at.in_torch_order, tensors_of(tensors)))
    return Placed(f"jnp.{name}([{listed}])", torch_order(len(node.result.shape)))


@operation("split", "chunk", "split_with_sizes", "unsafe_chunk", "unsafe_split")
def split(
    at: Lowering,
    node: Node,
    input: Value,
    sections: Any = None,
    dim: Any = 0,
    *,
    chunks: Any = None,
    split_size: Any = None,
    split_sizes: Any = None,
    split_size_or_sections: Any = None,
) -> Several:
    placed = at.in_torch_map_order(input)
    (axis,) = axes_of(input, dim)
    outputs = list(tensors_of(node.result))
    sizes = [output.shape[axis] for output in outputs]
    wanted = sections if sections is not None else split_sizes or split_size_or_sections
    if len(set(sizes)) == 1:
        how = str(len(sizes))
    elif isinstance(wanted, tuple | list) and not all(map(is_fixed, wanted)):
        ends = [" + ".join(map(at.number, wanted[: place + 1])) for place in range(len(wanted) - 1)]
        how = f"[{', '.join(ends)}]"
    else:
        how = str([sum(sizes[: place + 1]) for place in range(len(sizes) - 1)])
    text = f"jnp.split({placed.text}, {how}, axis={axis_text(placed, (axis,))})"
    return Several(text, (placed.order,) * len(outputs))


@operation("tensor_split")
def tensor_split(
    at: Lowering, node: Node, input: Value, sections: Any = None, dim: Any = 0, **kwargs: Any
) -> Several:
    if not isinstance(sections, int):
        return split(at, node, input, dim=dim)
    placed = at.in_torch_map_order(input)
    where = axis_text(placed, axes_of(input, dim))
    text = f"jnp.array_split({placed.text}, {at.number(sections)}, axis={where})"
    return Several(text, (placed.order,) * len(node.result))


@operation("hsplit", "vsplit", "dsplit")
def split_along(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Several:
    axis = {"v": 0, "h": min(1, len(input.shape) - 1), "d": 2}[last_name(node)[0]]
    return split(at, node, input, dim=axis)


@operation("unbind", "iter")
def unbind(at: Lowering, node: Node, input: Value, dim: Any = 0) -> Several:
    placed = at.in_torch_map_order(input)
    (axis,) = axes_of(input, dim)
    place = placed.place(axis)
    text = placed.text if place == 0 else f"jnp.moveaxis({placed.text}, {place}, 0)"
    orders = (remaining(placed.order, (axis,), keepdim=False),) * len(node.result)
    items = (f"{placed.text}[{':, ' * place}{item}]" for item in range(len(node.result)))
    return Several(text, orders, tuple(items))


@operation("meshgrid")
def meshgrid(at: Lowering, node: Node, *tensors: Any, indexing: str = "ij") -> Several:
    values = list(tensors_of(tensors))
    if any(len(value.shape) != 1 for value in values):
        raise RefusedError("torch.meshgrid of tensors that have not one axis; use .reshape(-1)")
    text = f"jnp.meshgrid({', '.join(map(at.read, values))}, indexing={indexing!r})"
    return Several(text, (torch_order(len(values)),) * len(values))


@operation("broadcast_tensors")
def broadcast_tensors(at: Lowering, node: Node, *tensors: Any) -> Several:
    values = list(tensors_of(tensors))
    texts, placed = operands(at, values)
    return Several(f"jnp.broadcast_arrays({', '.join(texts)})", (placed.order,) * len(values))
