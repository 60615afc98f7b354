"""Functions that make tensors: constants, ranges, one-hot vectors. An empty tensor is one of zeros."""

from typing import Any

import numpy as np
import torch

from torchjax_bridge.recording import Node, Value

from .._constants import constant_text
from .._lowering import Lowering
from .._placed import Axes, Placed, RefusedError, channels_last, torch_order
from ._operands import listed
from ._table import last_name, operation

__all__ = ["spread_order"]

# What an array has nothing of, or has by default.
_IGNORED = {"device", "layout", "pin_memory", "requires_grad", "dtype", "memory_format"}


def _known(node: Node, kwargs: dict[str, Any], *more: str) -> None:
    unknown = kwargs.keys() - _IGNORED - set(more)
    if unknown:
        raise RefusedError(
            f"{node.function} with {', '.join(sorted(unknown))} has no translation; leave it out"
        )


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
def filled(at: Lowering, node: Node, *args: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs, "size", "names")
    return _made(at, node, last_name(node).replace("empty", "zeros"), listed(args, kwargs, "size"))


@operation("full")
def full(at: Lowering, node: Node, size: Any, fill_value: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs)
    return _made(at, node, "full", listed((size,), {}), f"{at.read(fill_value)}, ")


@operation("new_zeros", "new_ones", "new_empty")
def new_filled(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs, "size")
    name = last_name(node).removeprefix("new_").replace("empty", "zeros")
    return _made(at, node, name, listed(args, kwargs, "size"))


@operation("new_full")
def new_full(at: Lowering, node: Node, input: Value, size: Any, fill_value: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs)
    return _made(at, node, "full", listed((size,), {}), f"{at.read(fill_value)}, ")


@operation("zeros_like", "ones_like", "empty_like")
def filled_like(at: Lowering, node: Node, input: Value, **kwargs: Any) -> Placed:
    _known(node, kwargs)
    placed = at.at(input)
    dtype = "" if node.result.dtype == input.dtype else f", dtype={at.number(node.result.dtype)}"
    return placed.with_text(f"jnp.{last_name(node).replace('empty', 'zeros')}({placed.text}{dtype})")


@operation("full_like")
def full_like(at: Lowering, node: Node, input: Value, fill_value: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs)
    placed = at.at(input)
    dtype = "" if node.result.dtype == input.dtype else f", dtype={at.number(node.result.dtype)}"
    return placed.with_text(f"jnp.full_like({placed.text}, {at.read(fill_value)}{dtype})")


@operation("fill", "zero")
def fill(at: Lowering, node: Node, input: Value, value: Any = 0) -> Placed:
    placed = at.at(input)
    return placed.with_text(f"jnp.full_like({placed.text}, {at.read(value)})")


@operation("arange")
def arange(at: Lowering, node: Node, *ends: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs, "start", "end", "step")
    named = [kwargs[name] for name in ("start", "end", "step") if name in kwargs]
    items = ", ".join(map(at.number, (*ends, *named)))
    return Placed(f"jnp.arange({items}, dtype={at.number(node.result.dtype)})", (0,))


@operation("linspace")
def linspace(at: Lowering, node: Node, start: Any, end: Any, steps: Any, **kwargs: Any) -> Placed:
    _known(node, kwargs)
    items = ", ".join(map(at.read, (start, end, steps)))
    return Placed(f"jnp.linspace({items}, dtype={at.number(node.result.dtype)})", (0,))


@operation("logspace")
def logspace(
    at: Lowering, node: Node, start: Any, end: Any, steps: Any, base: Any = 10.0, **kwargs: Any
) -> Placed:
    _known(node, kwargs)
    items = ", ".join(map(at.read, (start, end, steps)))
    return Placed(
        f"jnp.logspace({items}, base={at.number(base)}, dtype={at.number(node.result.dtype)})", (0,)
    )


@operation("eye")
def eye(at: Lowering, node: Node, n: Any, m: Any = None, **kwargs: Any) -> Placed:
    _known(node, kwargs)
    sizes = ", ".join(at.number(size) for size in (n, m) if size is not None)
    return Placed(f"jnp.eye({sizes}, dtype={at.number(node.result.dtype)})", (0, 1))


@operation("tril_indices", "triu_indices")
def triangle_indices(at: Lowering, node: Node, row: Any, col: Any, offset: Any = 0, **kwargs: Any) -> Placed:
    _known(node, kwargs)
    sizes = f"{at.number(row)}, {at.number(offset)}, {at.number(col)}"
    return Placed(f"jnp.stack(jnp.{last_name(node)}({sizes}))", (0, 1))


@operation("tensor", "as_tensor", "scalar_tensor", "asarray", "from_numpy")
def tensor(
    at: Lowering, node: Node, data: Any, dtype: Any = None, device: Any = None, **kwargs: Any
) -> Placed:
    _known(node, kwargs, "copy")
    if isinstance(data, Value):
        if at.number(data.dtype) == at.number(node.result.dtype):
            return at.at(data)
        return at.at(data).with_text(f"{at.at(data).text}.astype({at.number(node.result.dtype)})")
    if isinstance(data, np.ndarray):
        values = torch.as_tensor(data).to(node.result.dtype)
        return Placed(constant_text(values, "a NumPy array"), torch_order(len(node.result.shape)))
    text = f"jnp.asarray({at.number(data)}, dtype={at.number(node.result.dtype)})"
    return Placed(text, torch_order(len(node.result.shape)))


@operation("new_tensor")
def new_tensor(at: Lowering, node: Node, input: Value, data: Any, **kwargs: Any) -> Placed:
    return tensor(at, node, data, **kwargs)


@operation("one_hot")
def one_hot(at: Lowering, node: Node, input: Value, num_classes: Any = -1) -> Placed:
    if int(num_classes) == -1:
        raise RefusedError(
            "F.one_hot without num_classes gives an output whose shape depends on values; pass num_classes"
        )
    placed = at.in_torch_map_order(input)
    text = f"jax.nn.one_hot({placed.text}, {at.number(num_classes)}, dtype=jnp.int32)"
    return Placed(text, (*placed.order, placed.rank))
