"""Convolutions, patches and embeddings as functions: with a layer's own tensors they are that layer."""

from typing import Any

from torch import nn

from torchjax_bridge.recording import Node, Value

from .._layers import call_layer
from .._lowering import Lowering
from .._placed import Axes, Placed, RefusedError, channels_last, torch_order
from ._own_layer import is_own_layer
from ._products import as_layer
from ._table import last_name, operation

__all__: list[str] = []

_KINDS: dict[str, type[nn.Module]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


def per_axis(setting: Any, count: int) -> tuple[Any, ...]:
    """A setting for each axis of space."""
    if isinstance(setting, tuple | list):
        return tuple(setting) * count if len(setting) == 1 else tuple(setting)
    return (setting,) * count


@operation("conv1d", "conv2d", "conv3d")
def convolution(
    at: Lowering,
    node: Node,
    input: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> Placed | list[Placed]:
    rank = len(input.shape)
    space = rank - 2
    name = last_name(node)
    if name != f"conv{space}d":
        raise RefusedError(f"{name} of an input without a batch; add the axis with x[None]")
    layer = as_layer(at, _KINDS[name], weight, bias)
    settings = [per_axis(setting, space) for setting in (stride, dilation)]
    if layer is not None:
        path, owner = layer
        own = [tuple(owner.stride), tuple(owner.dilation)]  # type: ignore[arg-type]
        same_padding = padding == owner.padding or per_axis(padding, space) == owner.padding
        if own == settings and same_padding and groups == owner.groups and owner.padding_mode == "zeros":
            return call_layer(at, Node((input,), {}, node.source, node.result, module=owner, path=path))
    order = channels_last(rank)
    letters = "DHW"[3 - space :]
    widths = padding.upper() if isinstance(padding, str) else tuple((p, p) for p in per_axis(padding, space))
    kernel, kernel_order = _kernel(at, weight)
    kernel_letters = "".join(f"OI{letters}"[axis] for axis in kernel_order)
    text = (
        f"jax.lax.conv_general_dilated({at.read(input, order)}, {kernel}, {at.number(settings[0])}, "
        f"{at.number(widths)}, rhs_dilation={at.number(settings[1])}, "
        f"dimension_numbers=('N{letters}C', {kernel_letters!r}, 'N{letters}C'), "
        f"feature_group_count={at.number(groups)})"
    )
    return Placed(text if bias is None else f"({text} + {at.read(bias)})", order)


def _kernel(at: Lowering, weight: Value) -> tuple[str, Axes]:
    """A kernel and its order: JAX takes strides and padding in the order of its axes of space."""
    order = at.at(weight).order
    space = tuple(range(2, len(order)))
    if tuple(axis for axis in order if axis > 1) != space:
        order = (*space, 1, 0)
    return at.read(weight, order), order


@operation("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution_transposed(
    at: Lowering,
    node: Node,
    input: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: Any = 1,
    dilation: Any = 1,
) -> Placed:
    rank = len(input.shape)
    space = rank - 2
    name = last_name(node)
    if name != f"conv_transpose{space}d":
        raise RefusedError(f"{name} of an input without a batch; add the axis with x[None]")
    order, letters = channels_last(rank), "DHW"[3 - space :]
    strides, pads, more, gaps = (per_axis(s, space) for s in (stride, padding, output_padding, dilation))
    reach = [int(gap) * (size - 1) for gap, size in zip(gaps, weight.shape[2:], strict=True)]
    widths = tuple(
        (r - int(pad), r - int(pad) + int(extra)) for r, pad, extra in zip(reach, pads, more, strict=True)
    )
    kernel, kernel_order = _kernel(at, weight)
    if int(groups) != 1:
        kernel, kernel_order = at.in_torch_order(weight), torch_order(rank)
        inputs, outputs, *sides = weight.shape
        each = inputs // int(groups)
        shapes = [(int(groups), each, outputs, *sides), (each, int(groups) * outputs, *sides)]
        kernel = f"{kernel}.reshape{shapes[0]}.swapaxes(0, 1).reshape{shapes[1]}"
    flipped = tuple(place for place, axis in enumerate(kernel_order) if axis > 1)
    kernel_letters = "".join(f"IO{letters}"[axis] for axis in kernel_order)
    text = (
        f"jax.lax.conv_general_dilated({at.read(input, order)}, jnp.flip({kernel}, {flipped}), {(1,) * space}, "
        f"{widths}, lhs_dilation={at.number(strides)}, rhs_dilation={at.number(gaps)}, "
        f"dimension_numbers=('N{letters}C', {kernel_letters!r}, 'N{letters}C'), "
        f"feature_group_count={at.number(groups)})"
    )
    return Placed(text if bias is None else f"({text} + {at.read(bias)})", order)


@operation("F.unfold")
def patches(
    at: Lowering,
    node: Node,
    input: Value,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Placed:
    if len(input.shape) != 4:
        raise RefusedError("F.unfold of an input without a batch; add the axis with x[None]")
    kernel, gaps, pads, strides = (per_axis(s, 2) for s in (kernel_size, dilation, padding, stride))
    widths = tuple((pad, pad) for pad in pads)
    x = at.read(input, (0, 2, 3, 1))
    made = (
        f"jax.lax.conv_general_dilated_patches({x}, {at.number(kernel)}, {at.number(strides)}, "
        f"{at.number(widths)}, rhs_dilation={at.number(gaps)}, "
        "dimension_numbers=('NHWC', 'OIHW', 'NHWC'), precision=jax.lax.Precision.HIGHEST)"
    )
    return Placed(f"{made}.reshape({x}.shape[0], -1, {node.result.shape[1]})", (0, 2, 1))


@operation("F.embedding")
def embedding(
    at: Lowering,
    node: Node,
    input: Value,
    weight: Value,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: Any = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Placed:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise RefusedError(
            "F.embedding with max_norm, scale_grad_by_freq or sparse has no counterpart; leave it out"
        )
    index = at.in_torch_map_order(input)
    if is_own_layer(at, nn.Embedding, {}, weight):
        return Placed(f"super().__call__({index.text})", (*index.order, index.rank))
    table = at.in_torch_order(weight)
    return Placed(f"{table}[{index.text}]", (*index.order, index.rank))


@operation("torch.embedding")
def embedding_of_weight(
    at: Lowering,
    node: Node,
    weight: Value,
    indices: Value,
    padding_idx: Any = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Placed:
    return embedding(at, node, indices, weight, None, None, 2.0, scale_grad_by_freq, sparse)


@operation("F.embedding_bag")
def embedding_bag(
    at: Lowering,
    node: Node,
    input: Value,
    weight: Value,
    offsets: Any = None,
    max_norm: Any = None,
    norm_type: Any = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Value | None = None,
    include_last_offset: bool = False,
    padding_idx: Any = None,
) -> Placed:
    if len(input.shape) != 2 or offsets is not None:
        raise RefusedError("F.embedding_bag with offsets: bags of several sizes; pad them to (N, length)")
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise RefusedError(
            "F.embedding_bag with max_norm, scale_grad_by_freq or sparse has no counterpart; leave it out"
        )
    index = at.in_torch_order(input)
    text = f"{at.in_torch_order(weight)}[{index}]"
    if per_sample_weights is not None:
        text = f"({text} * {at.in_torch_order(per_sample_weights)}[..., None])"
    if padding_idx is None:
        return Placed(f"jnp.{mode}({text}, axis=1)", (0, 1))
    padding = int(padding_idx) % weight.shape[0]
    kept = at.variable(f"jnp.expand_dims({index} != {padding}, 2)", node.source)
    if mode == "max":
        largest = f"jnp.max({text}, axis=1, where={kept}, initial=-jnp.inf)"
        return Placed(f"jnp.where({kept}.any(1), {largest}, 0)", (0, 1))
    total = f"jnp.sum({text}, axis=1, where={kept})"
    if mode == "mean":
        total = f"({total} / jnp.maximum(jnp.sum({kept}, axis=1), 1))"
    return Placed(total, (0, 1))
