"""Gathering along an axis by indices for each element, and writing the same way."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError, torch_order
from ._indexing import value_text
from ._operands import axes_of, sizes_of
from ._table import last_name, operation

__all__: list[str] = []

_REDUCTIONS = {
    "sum": "add",
    "prod": "multiply",
    "amax": "max",
    "amin": "min",
    "add": "add",
    "multiply": "multiply",
}


@operation("gather")
def gather(
    at: Lowering, node: Node, input: Value, dim: Any, index: Value, *, sparse_grad: bool = False
) -> Placed:
    if not input.shape:
        raise RefusedError("torch.gather of a tensor without axes; use .reshape(1)")
    (axis,) = axes_of(input, dim)
    order = at.in_torch_map_order(index).order
    x = at.read(input, order)
    cut = [
        f":{at.number(size)}" if other != axis and int(size) != input.shape[other] else ":"
        for other, size in enumerate(sizes_of(index))
    ]
    if any(part != ":" for part in cut):
        x += f"[{', '.join(cut[axis] for axis in order)}]"
    return Placed(f"jnp.take_along_axis({x}, {at.read(index)}, axis={order.index(axis)})", order)


@operation("take_along_dim")
def take_along_dim(at: Lowering, node: Node, input: Value, indices: Value, dim: Any = None) -> Placed:
    x, index = at.in_torch_order(input), at.in_torch_order(indices)
    if dim is None:
        return Placed(f"{x}.reshape(-1)[{index}.reshape(-1)]", (0,))
    order = torch_order(len(input.shape))
    return Placed(f"jnp.take_along_axis({x}, {index}, axis={axes_of(input, dim)[0]})", order)


@operation("scatter", "scatter_add", "scatter_reduce")
def scatter(
    at: Lowering,
    node: Node,
    input: Value,
    dim: Any,
    index: Value,
    src: Any = None,
    reduce: str | None = None,
    *,
    value: Any = None,
    include_self: bool = True,
) -> Placed:
    new = value if src is None else src
    method = "add" if last_name(node) == "scatter_add" else "set"
    if reduce is not None:
        if reduce not in _REDUCTIONS or not include_self:
            raise RefusedError(
                f"{node.function}(reduce={reduce!r}, include_self={include_self}) has no counterpart; use the sum, "
                "the product or the extremum of all, with include_self=True"
            )
        method = _REDUCTIONS[reduce]
    if not input.shape:
        raise RefusedError(f"{node.function} to a tensor without axes; use .reshape(1)")
    (axis,) = axes_of(input, dim)
    placed = at.in_torch_map_order(input)
    order = placed.order
    text = value_text(at, node, input, new, order)
    if isinstance(new, Value) and new.shape != index.shape:
        items = ", ".join(f":{at.number(sizes_of(index)[other])}" for other in order)
        text = f"{text}[{items}]"
    at.body.helpers.add("along_axis")
    where = f"along_axis({at.read(index, order)}, {order.index(axis)})"
    return placed.with_text(f"{placed.text}.at[{where}].{method}({text})")


@operation("index_add", "index_copy", "index_fill")
def index_write(
    at: Lowering,
    node: Node,
    input: Value,
    dim: Any,
    index: Value,
    source: Any = None,
    *,
    value: Any = None,
    alpha: Any = 1,
) -> Placed:
    (axis,) = axes_of(input, dim)
    placed = at.in_torch_map_order(input)
    method = "add" if last_name(node) == "index_add" else "set"
    new = value if source is None else source
    text = value_text(at, node, input, new, placed.order)
    if isinstance(new, Value) and new.shape and not input.shape:
        raise RefusedError(f"{node.function} to a tensor without axes; use .reshape(1)")
    if not (isinstance(alpha, int) and int(alpha) == 1):
        text = f"{at.number(alpha)} * {text}"
    where = at.read(index) if index.shape else f"{at.read(index)}.reshape(1)"
    items = ", ".join([*[":"] * placed.place(axis), where])
    return placed.with_text(f"{placed.text}.at[{items}].{method}({text})")
