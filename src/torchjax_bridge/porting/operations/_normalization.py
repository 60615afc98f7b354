"""Normalizations that are called as functions."""

from typing import Any

from torch import nn

from torchjax_bridge.recording import Node, Parameter, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError, channels_last, torch_order
from ._table import operation

__all__: list[str] = []


def _is_own_layer(at: Lowering, kind: type[nn.Module] | tuple[type[nn.Module], ...], *tensors: Any) -> bool:
    """Whether these are all the tensors of the running module, so that its base class computes this."""
    module = at.frame.module
    if not isinstance(module, kind):
        return False
    owners = [tensor.origin for tensor in tensors if isinstance(tensor, Value)]
    count = sum(tensor is not None for tensor in module._parameters.values())
    mine = [origin for origin in owners if isinstance(origin, Parameter) and origin.owner is module]
    parameters = [origin for origin in mine if not origin.is_buffer]
    if len(mine) != len(owners) or len(parameters) != count or module._modules:
        return False
    at.model.base_twin(at.frame.path, module)  # refuses settings without a counterpart
    at.body.base_call = True
    return True


def _scaled(at: Lowering, text: str, weight: Any, bias: Any) -> str:
    if weight is not None:
        text = f"({text} * {at.read(weight)})"
    return text if bias is None else f"({text} + {at.read(bias)})"


@operation("layer_norm")
def layer_norm(
    at: Lowering,
    node: Node,
    input: Value,
    normalized_shape: Any,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
) -> Placed:
    if len(normalized_shape) != 1:
        raise RefusedError("F.layer_norm over several axes")
    rank = len(input.shape)
    placed = at.in_torch_map_order(input)
    order = placed.order if placed.order[-1] == rank - 1 else torch_order(rank)
    x = at.read(input, order)
    if _is_own_layer(at, nn.LayerNorm, weight, bias):
        return Placed(f"super().__call__({x})", order)
    at.body.helpers.add("normalize")
    return Placed(_scaled(at, f"normalize({x}, -1, {at.number(eps)})", weight, bias), order)


@operation("rms_norm")
def rms_norm(
    at: Lowering,
    node: Node,
    input: Value,
    normalized_shape: Any,
    weight: Value | None = None,
    eps: Any = None,
) -> Placed:
    if len(normalized_shape) != 1 or eps is None:
        raise RefusedError("F.rms_norm over several axes or without eps")
    rank = len(input.shape)
    placed = at.in_torch_map_order(input)
    order = placed.order if placed.order[-1] == rank - 1 else torch_order(rank)
    x = at.variable(at.read(input, order), node.source)
    mean = f"jnp.square({x}).mean(-1, keepdims=True)"
    return Placed(_scaled(at, f"({x} * jax.lax.rsqrt({mean} + {at.number(eps)}))", weight, None), order)


@operation("group_norm")
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
    if _is_own_layer(at, nn.GroupNorm, weight, bias):
        return Placed(f"super().__call__({x})", order)
    at.body.helpers.add("group_normalize")
    at.body.helpers.add("normalize")
    text = f"group_normalize({x}, {at.number(num_groups)}, {at.number(eps)})"
    return Placed(_scaled(at, text, weight, bias), order)


@operation("batch_norm")
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
        raise RefusedError(f"F.batch_norm(training={bool(training)}) whatever the mode of the model")
    if _is_own_layer(at, nn.modules.batchnorm._BatchNorm, running_mean, running_var, weight, bias):
        return Placed(f"super().__call__({x})", order)
    if training or running_mean is None or running_var is None:
        raise RefusedError(
            "F.batch_norm(training=True) updates statistics that no layer owns; use nn.BatchNorm2d"
        )
    centred = f"({x} - {at.read(running_mean)})"
    text = f"({centred} * jax.lax.rsqrt({at.read(running_var)} + {at.number(eps)}))"
    return Placed(_scaled(at, text, weight, bias), order)


@operation("instance_norm")
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
    if running_mean is not None or not use_input_stats:
        raise RefusedError("F.instance_norm with running statistics")
    rank = len(input.shape)
    order = channels_last(rank)
    at.body.helpers.add("normalize")
    axes = tuple(range(1, rank - 1))
    text = f"normalize({at.read(input, order)}, {axes}, {at.number(eps)})"
    return Placed(_scaled(at, text, weight, bias), order)


@operation("local_response_norm")
def local_response_norm(
    at: Lowering, node: Node, input: Value, size: Any, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Placed:
    order = channels_last(len(input.shape))
    at.body.helpers.add("local_response_norm")
    settings = ", ".join(map(at.number, (size, alpha, beta, k)))
    return Placed(f"local_response_norm({at.read(input, order)}, {settings})", order)
