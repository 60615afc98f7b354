"""Normalizations that are called as functions."""

from typing import Any

import torch
from torch import nn

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Axes, Placed, RefusedError, channels_last, torch_order
from ._own_layer import is_own_layer
from ._table import operation

__all__: list[str] = []


def _scaled(at: Lowering, text: str, weight: Any, bias: Any) -> str:
    if weight is not None:
        text = f"({text} * {at.in_torch_order(weight)})"
    return text if bias is None else f"({text} + {at.in_torch_order(bias)})"


def _last_axes(at: Lowering, input: Value, count: int) -> tuple[str, Axes, str]:
    """The input with its last axes last, its order, and these axes as an argument."""
    rank = len(input.shape)
    order = at.in_torch_map_order(input).order
    if order[-count:] != torch_order(rank)[-count:]:
        order = torch_order(rank)
    return at.read(input, order), order, "-1" if count == 1 else str(tuple(range(-count, 0)))


@operation("F.layer_norm")
def layer_norm(
    at: Lowering,
    node: Node,
    input: Value,
    normalized_shape: Any,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
) -> Placed:
    x, order, axes = _last_axes(at, input, len(normalized_shape))
    if axes == "-1" and is_own_layer(at, nn.LayerNorm, {"eps": eps}, weight, bias):
        at.model.note_map(at.frame.path, None)
        return Placed(f"super().__call__({x})", order)
    at.body.helpers.add("normalize")
    return Placed(_scaled(at, f"normalize({x}, {axes}, {at.number(eps)})", weight, bias), order)


@operation("rms_norm")
def rms_norm(
    at: Lowering,
    node: Node,
    input: Value,
    normalized_shape: Any,
    weight: Value | None = None,
    eps: Any = None,
) -> Placed:
    text, order, axes = _last_axes(at, input, len(normalized_shape))
    x = at.variable(text, node.source)
    at.known[x] = input, Placed(x, order)
    mean = f"jnp.square({x}).mean({axes}, keepdims=True)"
    small = at.number(eps) if eps is not None else repr(torch.finfo(node.result.dtype).eps)
    return Placed(_scaled(at, f"({x} * jax.lax.rsqrt({mean} + {small}))", weight, None), order)


@operation("F.group_norm")
def group_norm(
    at: Lowering,
    node: Node,
    input: Value,
    num_groups: Any,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
) -> Placed:
    order = channels_last(len(input.shape))
    x = at.read(input, order)
    if is_own_layer(at, nn.GroupNorm, {"eps": eps, "num_groups": num_groups}, weight, bias):
        return Placed(f"super().__call__({x})", order)
    at.body.helpers.add("group_normalize")
    at.body.helpers.add("normalize")
    text = f"group_normalize({x}, {at.number(num_groups)}, {at.number(eps)})"
    return Placed(_scaled(at, text, weight, bias), order)


@operation("F.batch_norm")
def batch_norm(
    at: Lowering,
    node: Node,
    input: Value,
    running_mean: Value | None,
    running_var: Value | None,
    weight: Value | None = None,
    bias: Value | None = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Placed:
    order = channels_last(len(input.shape))
    x = at.read(input, order)
    if running_mean is not None and bool(training) is not at.model.recording.module.training:
        raise RefusedError(
            f"F.batch_norm(training={bool(training)}) whatever the mode of the model; pass training=self.training"
        )
    own = (running_mean, running_var, weight, bias)
    settings = {"eps": eps, **({"momentum": momentum} if training else {})}
    if is_own_layer(at, nn.modules.batchnorm._BatchNorm, settings, *own):
        return Placed(f"super().__call__({x})", order)
    if running_mean is None or running_var is None:
        return _by_its_own_statistics(at, input, weight, bias, eps)
    if training:
        raise RefusedError(
            "F.batch_norm(training=True) updates statistics that no layer owns; use nn.BatchNorm2d"
        )
    centred = f"({x} - {at.read(running_mean)})"
    text = f"({centred} * jax.lax.rsqrt({at.read(running_var)} + {at.number(eps)}))"
    return Placed(_scaled(at, text, weight, bias), order)


def _by_its_own_statistics(at: Lowering, input: Value, weight: Any, bias: Any, eps: float) -> Placed:
    """Mean 0 and variance 1 in each channel, where nothing keeps the statistics: as for a weight."""
    placed = at.in_torch_map_order(input)
    order = placed.order if weight is None and bias is None else channels_last(placed.rank)
    axes = tuple(place for place, axis in enumerate(order) if axis != 1)
    at.body.helpers.add("normalize")
    text = f"normalize({at.read(input, order)}, {axes if axes[1:] else axes[0]}, {at.number(eps)})"
    return Placed(_scaled(at, text, weight, bias), order)


@operation("F.instance_norm")
def instance_norm(
    at: Lowering,
    node: Node,
    input: Value,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Value | None = None,
    bias: Value | None = None,
    use_input_stats: Any = True,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Placed:
    if running_mean is not None and use_input_stats:
        raise RefusedError(
            "F.instance_norm updates running statistics, which no layer of Flax does; set track_running_stats=False"
        )
    rank = len(input.shape)
    order = channels_last(rank)
    if running_mean is not None:
        mean, spread = (
            at.in_torch_order(running_mean),
            f"jnp.sqrt({at.in_torch_order(running_var)} + {at.number(eps)})",
        )
        return Placed(_scaled(at, f"(({at.read(input, order)} - {mean}) / {spread})", weight, bias), order)
    at.body.helpers.add("normalize")
    axes = tuple(range(1, rank - 1))
    text = f"normalize({at.read(input, order)}, {axes}, {at.number(eps)})"
    return Placed(_scaled(at, text, weight, bias), order)


@operation("torch.layer_norm")
def layer_norm_of_torch(
    at: Lowering,
    node: Node,
    input: Value,
    normalized_shape: Any,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Placed:
    return layer_norm(at, node, input, normalized_shape, weight, bias, eps)


@operation("torch.group_norm")
def group_norm_of_torch(
    at: Lowering,
    node: Node,
    input: Value,
    num_groups: Any,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Placed:
    return group_norm(at, node, input, num_groups, weight, bias, eps)


@operation("torch.batch_norm")
def batch_norm_of_torch(
    at: Lowering,
    node: Node,
    input: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value | None,
    running_var: Value | None,
    training: Any,
    momentum: Any,
    eps: float,
    cudnn_enabled: bool = True,
) -> Placed:
    return batch_norm(at, node, input, running_mean, running_var, weight, bias, training, momentum, eps)


@operation("local_response_norm")
def local_response_norm(
    at: Lowering, node: Node, input: Value, size: Any, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Placed:
    order = channels_last(len(input.shape))
    at.body.helpers.add("local_response_norm")
    settings = ", ".join(map(at.number, (size, alpha, beta, k)))
    return Placed(f"local_response_norm({at.read(input, order)}, {settings})", order)
