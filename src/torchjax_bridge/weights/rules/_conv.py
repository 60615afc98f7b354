"""Convolutions.

torch keeps ``(out, in / groups, *space)``, Flax ``(*space, in / groups, out)``
(https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html,
https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/linear.html).
"""

from collections.abc import Iterable

from torch import nn

from .._layout import Permute
from ._rule import Entry, Layer, Rule

__all__ = ["RULES"]


def _entries(layer: Layer) -> Iterable[Entry]:
    ranks = layer.torch["weight"].ndim
    if not 3 <= ranks <= 5:
        raise ValueError(f"a convolution has a weight of 3 to 5 axes, not {ranks}")
    return (
        Entry("weight", "kernel", Permute((*range(2, ranks), 1, 0))),
        Entry("bias", "bias", optional=True),
    )


RULES = (
    Rule(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        _entries,
        flax_types=("Conv",),
        required=frozenset({"weight"}),
        settings=(
            "kernel_size as a tuple (an int is a 1-D convolution), strides, padding=((p, p), ...) and never "
            "'SAME' for a number, kernel_dilation, feature_group_count=groups, use_bias"
        ),
    ),
)
