"""Settings of normalisation layers.

torch's ``eps`` is added to the variance, as Flax's ``epsilon`` is. torch's ``momentum`` is the weight of the new
batch in a running statistic, Flax's the weight of the old value. ``use_fast_variance`` computes
``E[x^2] - E[x]^2``, which is the variance in exact arithmetic and loses its digits where the mean is large.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ._difference import Difference, differs
from ._layer import FlaxLayer

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
_InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "own_epsilon", "rms_norm"]


def batch_norm(module: _BatchNorm, layer: FlaxLayer) -> Iterator[Difference]:
    """``BatchNormNd`` or ``SyncBatchNorm`` beside ``BatchNorm``."""
    yield from _epsilon(module.eps, layer)
    yield from _affine(module.weight is not None, module.bias is not None, layer)
    yield from _channels("axis", layer)
    if module.momentum is None:
        fix = "no momentum does; give the torch layer one"
        yield Difference("momentum", "momentum", None, layer["momentum"], None, "training", fix)
    else:
        wanted, have = 1 - module.momentum, layer["momentum"]
        if not _close(wanted, have):
            pair = ("momentum", module.momentum)
            yield from differs("momentum", round(wanted, 12), have, torch=pair, effect="training")
    yield from _mode(module, layer)
    if module.training or not module.track_running_stats:
        yield from _fast_variance(layer)


def _mode(module: _BatchNorm, layer: FlaxLayer) -> Iterator[Difference]:
    """Which statistics are used, where the setting decides that and not the mode of the Flax model."""
    fixed = layer["use_running_average"]
    if fixed is None:
        return  # given in the call
    if not module.track_running_stats:
        pair = ("track_running_stats", False)
        yield from differs("use_running_average", False, fixed, torch=pair)
    elif layer.flavour == "linen":  # an nnx module follows .train() and .eval()
        effect: Any = "training" if module.training else "output"
        pair = ("training", module.training)
        fix = "use_running_average=None, and say it in the call"
        yield from differs(
            "use_running_average", not module.training, fixed, torch=pair, effect=effect, fix=fix
        )


def layer_norm(module: nn.LayerNorm, layer: FlaxLayer) -> Iterator[Difference]:
    """``LayerNorm`` beside ``LayerNorm``."""
    yield from _epsilon(module.eps, layer)
    yield from _affine(module.weight is not None, module.bias is not None, layer)
    yield from _axes(module, layer)
    yield from _fast_variance(layer)


def rms_norm(module: nn.RMSNorm, layer: FlaxLayer) -> Iterator[Difference]:
    """``RMSNorm`` beside ``RMSNorm``."""
    eps = module.eps
    if eps is None:  # torch takes the eps of the input's dtype
        dtype = torch.get_default_dtype() if module.weight is None else module.weight.dtype
        eps = torch.finfo(dtype).eps
    yield from _epsilon(eps, layer, module.eps)
    yield from _affine(module.weight is not None, False, layer)
    yield from _axes(module, layer)


def group_norm(module: nn.GroupNorm, layer: FlaxLayer) -> Iterator[Difference]:
    """``GroupNorm`` beside ``GroupNorm``."""
    yield from _epsilon(module.eps, layer)
    yield from _affine(module.weight is not None, module.bias is not None, layer)
    yield from _groups(module.num_groups, module.num_channels, ("num_groups", module.num_groups), layer)
    yield from _fast_variance(layer)


def instance_norm(module: _InstanceNorm, layer: FlaxLayer) -> Iterator[Difference]:
    """``InstanceNormNd`` beside ``InstanceNorm``, a ``GroupNorm`` with a group a channel, or a ``BatchNorm``."""
    yield from _epsilon(module.eps, layer)
    yield from _affine(module.weight is not None, module.bias is not None, layer)
    if layer.kind == "GroupNorm":
        count = module.num_features
        yield from _groups(count, count, ("num_features", count), layer)
    elif layer.kind == "InstanceNorm":
        yield from _channels("feature_axes", layer)
    if layer.kind != "BatchNorm":
        yield from _fast_variance(layer)


def own_epsilon(module: nn.Module, layer: FlaxLayer) -> Iterator[Difference]:
    """The epsilon of a norm of the caller's own, under one of its usual names."""
    for name in ("eps", "epsilon", "variance_epsilon", "norm_eps"):
        eps = getattr(module, name, None)
        if isinstance(eps, float) and "epsilon" in layer.values:
            if not _close(eps, layer["epsilon"]):
                yield from differs("epsilon", eps, layer["epsilon"], torch=(name, eps))
            return


# --- what several have ---------------------------------------------------------------------------------


def _epsilon(eps: float, layer: FlaxLayer, shown: Any = ...) -> Iterator[Difference]:
    if not _close(eps, layer["epsilon"]):
        pair = ("eps", eps if shown is ... else shown)
        yield from differs("epsilon", eps, layer["epsilon"], torch=pair)


def _close(ours: float, theirs: Any) -> bool:
    """Whether two numbers that went through different arithmetic were meant to be the same."""
    return isinstance(theirs, int | float) and abs(ours - theirs) <= 1e-6 * abs(ours)


def _affine(scale: bool, bias: bool, layer: FlaxLayer) -> Iterator[Difference]:
    for setting, wanted in (("use_scale", scale), ("use_bias", bias)):
        if setting in layer.values:
            yield from differs(setting, wanted, layer[setting], torch=("affine", wanted))


def _channels(setting: str, layer: FlaxLayer) -> Iterator[Difference]:
    value = layer[setting]
    have = value if isinstance(value, int) else next(iter(value), None) if len(value) == 1 else value
    pair = ("the axis of channels", 1)
    yield from differs(setting, -1, value, torch=pair, have=have, fix=f"{setting}=-1, where the channels lie")


def _axes(module: nn.LayerNorm | nn.RMSNorm, layer: FlaxLayer) -> Iterator[Difference]:
    """The axes that are averaged over: the last ones, as many as torch's shape has."""
    count = len(module.normalized_shape)
    wanted = tuple(range(-count, 0))
    value = layer["reduction_axes"]
    axes = (value,) if isinstance(value, int) else tuple(value)
    # Without an input, axes counted from the front cannot be compared with axes counted from the back.
    known = axes if all(axis < 0 for axis in axes) else wanted[-len(axes) :]
    pair = ("normalized_shape", tuple(module.normalized_shape))
    yield from differs("reduction_axes", wanted, value, torch=pair, have=tuple(sorted(known)))


def _groups(wanted: int, channels: int, pair: tuple[str, Any], layer: FlaxLayer) -> Iterator[Difference]:
    size, count = layer["group_size"], layer["num_groups"]
    if layer.flavour == "linen" and size is not None:
        count = channels // size
    yield from differs("num_groups", wanted, count, torch=pair)


def _fast_variance(layer: FlaxLayer) -> Iterator[Difference]:
    pair = ("the variance", "of the differences from the mean")
    yield from differs("use_fast_variance", False, layer["use_fast_variance"], torch=pair, effect="rounding")
