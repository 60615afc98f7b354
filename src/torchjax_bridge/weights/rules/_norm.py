"""Normalisation layers.

Scale and bias lie the same way on both sides. BatchNorm's running statistics are buffers in torch and the
collection ``batch_stats`` (linen) or ``BatchStat`` variables (nnx) in Flax; ``num_batches_tracked`` has no
image there and stays on the torch side.
"""

from collections.abc import Iterable

import torch
from torch import nn

from .._layout import Constant
from ._rule import Entry, Layer, Rule

__all__ = ["RULES"]


def _batch_norm(layer: Layer) -> Iterable[Entry]:
    yield Entry("weight", "scale", optional=True)
    yield Entry("bias", "bias", optional=True)
    for buffer, leaf, neutral in (("running_mean", "mean", 0.0), ("running_var", "var", 1.0)):
        if buffer in layer.torch or layer.module is None or (leaf,) not in layer.flax:
            yield Entry(buffer, leaf, collection="batch_stats")
        else:  # track_running_stats=False: Flax has the variable all the same, and never reads it
            fill = Constant(neutral, layer.flax[(leaf,)], torch.float32)
            yield Entry(
                (),
                leaf,
                fill,
                "batch_stats",
                note="the torch layer keeps no statistics: run the Flax layer with use_running_average=False",
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
            "use_scale=use_bias=affine"
        ),
    ),
)
