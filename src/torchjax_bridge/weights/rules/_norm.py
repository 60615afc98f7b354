"""Normalisation layers.

Scale and bias lie the same way on both sides. BatchNorm's running statistics are buffers in torch and the
collection ``batch_stats`` (linen) or ``BatchStat`` variables (nnx) in Flax. ``num_batches_tracked`` has no
counterpart and stays in torch. A norm over several axes keeps one scale an element: torch's
``(C, H, W)`` lies as ``(H, W, C)`` in a model whose channels are last.

All compute ``(x - mean) / sqrt(var + eps) * scale + bias`` with the biased variance, each over its own axes:
S. Ioffe and C. Szegedy (2015) for BatchNorm, J. Ba et al. (2016) for LayerNorm, Y. Wu and K. He (2018) for
GroupNorm, D. Ulyanov et al. (2016) for InstanceNorm, B. Zhang and R. Sennrich (2019) for RMSNorm, which has
no mean and no bias.

Settings for parity: ``epsilon`` (torch has 1e-5, for RMSNorm ``torch.finfo(dtype).eps``; Flax 1e-6 outside
BatchNorm), ``use_fast_variance=False`` (the fast one loses its digits where the mean is large), ``use_scale``
and ``use_bias`` as torch's ``affine``, ``elementwise_affine`` and ``bias``, ``num_groups`` (Flax has 32).
BatchNorm: ``momentum=1 - momentum``, and ``use_running_average`` by mode. torch feeds its running variance
with the unbiased variance of the batch, Flax with the biased one. Evaluation is the same; further training is not,
except with the ``BatchNorm`` of `torchjax_bridge.weights.layers`.
"""

from collections.abc import Iterable
from dataclasses import replace
from math import prod

import torch
from torch import nn

from ..layouts import Constant, Identity, Layout, Permute
from ._flattened import per_feature
from ._rule import Entry, Layer, Rule
from ._twin import Twin, changed

__all__ = ["RULES"]


_AFFINE = (Entry("weight", "scale", optional=True), Entry("bias", "bias", optional=True))
_STATISTICS = (("running_mean", "mean", 0.0), ("running_var", "var", 1.0))
_ENTRIES = {buffer: Entry(buffer, leaf, collection="batch_stats") for buffer, leaf, _ in _STATISTICS}


@per_feature
def _batch_norm(layer: Layer) -> Iterable[Entry]:
    yield from _AFFINE
    cumulative = getattr(layer.module, "momentum", 0.1) is None
    note = "momentum=None averages over all batches, which Flax cannot: train on with a momentum"
    for buffer, leaf, neutral in _STATISTICS:
        if buffer in layer.torch or layer.module is None or (leaf,) not in layer.flax:
            entry = _ENTRIES[buffer]
            yield replace(entry, note=note) if cumulative else entry
        else:  # track_running_stats=False: Flax has the variable all the same, and never reads it
            fill = Constant(neutral, layer.flax[(leaf,)], torch.float32, fixed=False)
            yield Entry(
                (),
                leaf,
                fill,
                "batch_stats",
                note="the torch layer keeps no statistics: run the Flax layer with use_running_average=False",
            )


def _instance_norm(layer: Layer) -> Iterable[Entry]:
    yield from _AFFINE
    if "running_mean" not in layer.torch:
        return
    if ("mean",) not in layer.flax:
        raise ValueError(
            "track_running_stats=True evaluates with running statistics, which Flax's InstanceNorm does not "
            "keep; for evaluation use BatchNorm(use_running_average=True), which then computes the same"
        )
    note = "evaluation only: in training Flax's BatchNorm averages over the batch, InstanceNorm does not"
    yield from (replace(entry, note=note) for entry in _ENTRIES.values())


@per_feature
def _over_features(layer: Layer) -> Iterable[Entry]:
    for name, leaf in (("weight", "scale"), ("bias", "bias")):
        if name in layer.torch or (leaf,) in layer.flax:
            layout, note = _feature_axes(layer, name, leaf)
            yield Entry(name, leaf, layout, note=note)


def _feature_axes(layer: Layer, name: str, leaf: str) -> tuple[Layout, str]:
    """How a scale over several axes lies in the leaf: as it is, or with the first axis last."""
    weight, place = layer.torch.get(name), layer.flax.get((leaf,))
    if weight is None or place is None or weight.ndim < 2 or weight.numel() == 1:
        return Identity(), ""
    shape = tuple(weight.shape)
    axes = (*range(1, len(shape)), 0)
    last = tuple(shape[axis] for axis in axes)
    if place == shape == last:
        entries = ", ".join(f'Entry("{ours}", "{theirs}", Permute({axes}))' for ours, theirs in _PAIRS)
        raise ValueError(
            f"nothing says whether the axes {shape} of '{name}' lie the same way in Flax or with the channels "
            f"last; pass rules=[Rule(nn.{_name(layer)}, [{entries}])] for channels last, or the same without "
            "the Permute"
        )
    if place == (prod(shape),):
        raise ValueError(
            f"the flat '{leaf}' {place} does not say in which order {shape} lies in it; give the template's "
            f"leaf the shape {shape}, or {last} where the channels come last: "
            f"norm.{leaf} = nnx.Param(jnp.ones({shape}))"
        )
    if place == last:
        return Permute(axes), f"{shape} becomes {last}, channels last, as the template's shape says"
    return Identity(), ""


_PAIRS = (("weight", "scale"), ("bias", "bias"))


def _name(layer: Layer) -> str:
    return type(layer.module).__name__ if layer.module is not None else "LayerNorm"


# --- the twins ---------------------------------------------------------------------------------------

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
_InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
_Norm = _BatchNorm | _InstanceNorm | nn.GroupNorm | nn.LayerNorm


def _batch_norm_twin(module: _BatchNorm) -> Twin:
    if module.momentum is None:
        raise ValueError("momentum=None averages over all batches, which Flax cannot; give it a momentum")
    keeps = module.running_mean is not None
    if keeps and not module.track_running_stats:
        raise ValueError(
            "track_running_stats=False of a layer that has running statistics: it evaluates with them and does not "
            "update them in training, which no Flax layer does"
        )
    settings = changed(momentum=(round(1 - module.momentum, 12), 0.99)) | _settings(module, 1e-5)
    if keeps:
        return Twin("BatchNorm", {"num_features": module.num_features}, settings)
    return Twin(
        "BatchNorm",
        {"num_features": module.num_features},
        settings,
        call={"use_running_average": False},  # where .eval() would turn it on
    )


def _instance_norm_twin(module: _InstanceNorm) -> Twin:
    if module.track_running_stats:
        raise ValueError(
            "track_running_stats=True: Flax's InstanceNorm keeps no running statistics. For evaluation alone, "
            "BatchNorm(use_running_average=True) computes the same"
        )
    return Twin("InstanceNorm", {"num_features": module.num_features}, _settings(module))


def _group_norm_twin(module: nn.GroupNorm) -> Twin:
    sizes = {"num_features": module.num_channels, "num_groups": module.num_groups}
    return Twin("GroupNorm", sizes, _settings(module))


def _layer_norm_twin(module: nn.LayerNorm) -> Twin:
    return _over_shape("LayerNorm", module, _settings(module))


def _rms_norm_twin(module: nn.RMSNorm) -> Twin:
    eps = module.eps
    if eps is None:
        dtype = torch.get_default_dtype() if module.weight is None else module.weight.dtype
        eps = torch.finfo(dtype).eps
    settings = changed(epsilon=(eps, 1e-6), use_scale=(module.weight is not None, True))
    return _over_shape("RMSNorm", module, settings)


def _over_shape(name: str, module: nn.LayerNorm | nn.RMSNorm, settings: dict[str, object]) -> Twin:
    """The twin of a norm over the last axes. nnx's own makes a flat scale, whatever the number of axes."""
    shape = tuple(module.normalized_shape)
    if len(shape) == 1:
        return Twin(name, {"num_features": shape[0]}, settings)
    axes = tuple(range(-len(shape), 0))
    settings = {"reduction_axes": axes, "feature_axes": axes} | settings
    return Twin(name, {"num_features": shape}, settings, own=True)


def _settings(module: _Norm, epsilon: float = 1e-6) -> dict[str, object]:
    """What norms have in common, where it is not Flax's default. torch's variance is never the fast one."""
    return changed(
        epsilon=(module.eps, epsilon),
        use_scale=(module.weight is not None, True),
        use_bias=(module.bias is not None, True),
        use_fast_variance=(False, True),
    )


RULES = (
    Rule(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        _batch_norm,
        flax_types=("BatchNorm",),
        keeps=("num_batches_tracked",),
        required=frozenset({"running_mean", "running_var"}),
        settings=(
            "epsilon=eps, momentum=1-momentum, use_running_average by mode, use_fast_variance=False, "
            "use_scale=use_bias=affine; SyncBatchNorm also axis_name. Flax feeds its running variance with "
            "the biased variance: to train on as torch does, use weights.layers' BatchNorm"
        ),
        twin=_batch_norm_twin,
    ),
    Rule(
        nn.LayerNorm,
        _over_features,
        flax_types=("LayerNorm",),
        required=frozenset({"weight"}),
        settings=(
            "epsilon=eps, use_fast_variance=False, use_scale=elementwise_affine, use_bias=bias; over several "
            "axes reduction_axes=feature_axes"
        ),
        twin=_layer_norm_twin,
    ),
    Rule(
        nn.GroupNorm,
        _AFFINE,
        flax_types=("GroupNorm",),
        required=frozenset({"weight", "bias"}),
        settings="num_groups, epsilon=eps, use_fast_variance=False, use_scale=use_bias=affine",
        twin=_group_norm_twin,
    ),
    Rule(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        _instance_norm,
        flax_types=("InstanceNorm", "GroupNorm", "BatchNorm"),
        keeps=("num_batches_tracked",),
        required=frozenset({"weight", "bias"}),
        settings=(
            "epsilon=eps, use_fast_variance=False, use_scale=use_bias=affine (torch's default is False); with "
            "track_running_stats a BatchNorm, for evaluation"
        ),
        twin=_instance_norm_twin,
    ),
    Rule(
        nn.RMSNorm,
        _over_features,
        flax_types=("RMSNorm",),
        required=frozenset({"weight"}),
        settings="epsilon=eps, which is torch.finfo(dtype).eps where torch says None, use_scale",
        twin=_rms_norm_twin,
    ),
)
