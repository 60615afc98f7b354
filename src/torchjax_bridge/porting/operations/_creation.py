"""Functions that make tensors: constants, ranges, triangles."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Axes, Placed, RefusedError, channels_last, torch_order
from ._shapes import flat_arguments
from ._table import operation

__all__ = ["spread_order"]

# What an array has nothing of, or has by default.
_IGNORED = {"device", "layout", "pin_memory", "requires_grad", "dtype", "memory_format"}


def _known(node: Node, kwargs: dict[str, Any], *more: str) -> None:
    unknown = kwargs.keys() - _IGNORED - set(more)
    if unknown or kwargs.get("out") is not None:
        raise RefusedError(f"{node.function} with {', '.join(sorted(unknown)) or 'out'}")


def spread_order(sizes: Any) -> Axes:
    """The order of a tensor of these sizes: that of images if it holds one number for each example."""
    rank = len(sizes)
    images = rank > 3 and all(type(size) is int and size == 1 for size in sizes[1:])
    return channels_last(rank) if images else torch_order(rank)


def _made(at: Lowering, node: Node, function: str, sizes: Any, fill: str = "") -> Placed:
    dtype = at.number(node.result.dtype)
    shape = at.number(tuple(sizes))
    return Placed(f"jnp.{function}({shape}, {fill}dtype={dtype})", spread_order(sizes))


@operation("zeros", "ones", "empty")
def filled(at: Lowering, node: Node, *size: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs, "size", "names")
    name = node.function.rpartition(".")[2]
    sizes = flat_arguments(size) if size else kwargs["size"]
    return _made(at, node, "zeros" if name == "empty" else name, sizes)


@operation("full")
def full(at: Lowering, node: Node, size: Any, fill_value: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs)
    return _made(at, node, "full", flat_arguments((size,)), f"{at.read(fill_value)}, ")


@operation("new_zeros", "new_ones", "new_empty")
def new_filled(at: Lowering, node: Node, input: Value, *size: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs, "size")
    name = node.function.rpartition("new_")[2]
    return _made(
        at, node, "zeros" if name == "empty" else name, flat_arguments(size) if size else kwargs["size"]
    )


@operation("new_full")
def new_full(at: Lowering, node: Node, input: Value, size: Any, fill_value: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs)
    return _made(at, node, "full", size, f"{at.number(fill_value)}, ")


@operation("zeros_like", "ones_like", "empty_like", "full_like")
def filled_like(at: Lowering, node: Node, input: Value, *fill: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs, "fill_value")
    name = node.function.rpartition(".")[2].replace("empty", "zeros")
    value = fill[0] if fill else kwargs.get("fill_value")
    placed = at.at(input)
    dtype = "" if node.result.dtype == input.dtype else f", dtype={at.number(node.result.dtype)}"
    extra = "" if value is None else f", {at.number(value)}"
    return placed.with_text(f"jnp.{name}({placed.text}{extra}{dtype})")


@operation("fill", "zero")
def fill(at: Lowering, node: Node, input: Value, value: Any = 0) -> Placed:
    placed = at.at(input)
    return placed.with_text(f"jnp.full_like({placed.text}, {at.read(value)})")


@operation("arange")
def arange(at: Lowering, node: Node, *ends: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs, "start", "end", "step")
    named = [kwargs[name] for name in ("start", "end", "step") if name in kwargs]
    listed = ", ".join(map(at.number, (*ends, *named)))
    return Placed(f"jnp.arange({listed}, dtype={at.number(node.result.dtype)})", (0,))


@operation("linspace")
def linspace(at: Lowering, node: Node, start: Any, end: Any, steps: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs)
    listed = ", ".join(map(at.number, (start, end, steps)))
    return Placed(f"jnp.linspace({listed}, dtype={at.number(node.result.dtype)})", (0,))


@operation("eye")
def eye(at: Lowering, node: Node, *sizes: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs)
    listed = ", ".join(map(at.number, sizes))
    return Placed(f"jnp.eye({listed}, dtype={at.number(node.result.dtype)})", (0, 1))


@operation("tril", "triu")
def triangle(at: Lowering, node: Node, input: Value, diagonal: Any = 0) -> Placed:
    name = node.function.rpartition(".")[2].strip("_")
    shift = f", {at.number(diagonal)}" if not isinstance(diagonal, int) or diagonal != 0 else ""
    return Placed(f"jnp.{name}({at.in_torch_order(input)}{shift})", torch_order(len(input.shape)))


@operation("tensor", "as_tensor", "scalar_tensor", "new_tensor")
def tensor(at: Lowering, node: Node, *data: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs, "data")
    values = data[-1] if data else kwargs["data"]
    if isinstance(values, Value):
        return at.at(values)
    text = f"jnp.asarray({at.number(values)}, dtype={at.number(node.result.dtype)})"
    return Placed(text, torch_order(len(node.result.shape)))
