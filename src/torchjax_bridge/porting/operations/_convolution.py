"""Convolutions that are called as functions: with a layer's own tensors they are that layer."""

from typing import Any

from torch import nn

from torchjax_bridge.recording import Node, Value

from .._layers import call_layer
from .._lowering import Lowering
from .._placed import Placed, RefusedError, channels_last, torch_order
from ._products import as_layer
from ._table import operation

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
    name = node.function.rpartition(".")[2]
    if name != f"conv{space}d":
        raise RefusedError(f"{name} of an input without a batch")
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
    kernel = at.at(weight)
    kernel_order = kernel.order if kernel.order != torch_order(rank) else torch_order(rank)
    kernel_letters = "".join(f"OI{letters}"[axis] for axis in kernel_order)
    text = (
        f"jax.lax.conv_general_dilated({at.read(input, order)}, {kernel.text}, {at.number(settings[0])}, "
        f"{at.number(widths)}, rhs_dilation={at.number(settings[1])}, "
        f"dimension_numbers=('N{letters}C', {kernel_letters!r}, 'N{letters}C'), "
        f"feature_group_count={at.number(groups)})"
    )
    return Placed(text if bias is None else f"({text} + {at.read(bias)})", order)


@operation("embedding")
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
        raise RefusedError("F.embedding with max_norm, scale_grad_by_freq or sparse")
    return Placed(
        f"{at.in_torch_order(weight)}[{at.in_torch_order(input)}]", torch_order(len(node.result.shape))
    )


@operation("one_hot")
def one_hot(at: Lowering, node: Node, input: Value, num_classes: Any = -1) -> Placed:
    if num_classes == -1:
        raise RefusedError("F.one_hot without num_classes gives an output whose shape depends on values")
    text = f"jax.nn.one_hot({at.in_torch_order(input)}, {at.number(num_classes)}, dtype=jnp.int32)"
    return Placed(text, torch_order(len(node.result.shape)))
