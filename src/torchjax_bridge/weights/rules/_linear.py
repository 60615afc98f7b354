"""Dense layers.

torch keeps ``(out, in)`` and multiplies by the transpose, Flax keeps ``(in, out)``
(https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html,
https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/linear.html).
"""

from collections.abc import Iterable
from math import prod

from torch import nn

from .._layout import Layout, Permute, Reshape, then
from ._rule import Entry, Layer, Rule

__all__ = ["LOOKALIKES", "RULES", "kernel_after_flatten"]


def kernel_after_flatten(out: int, features: tuple[int, ...]) -> Layout:
    """The layout of a kernel whose input is a flattened feature map.

    torch flattens ``(C, *space)`` channel by channel; a Flax model that flattens its ``(*space, C)`` does it
    position by position. The rows of the kernel move accordingly, and the model needs no transpose.
    """
    channels, *space = features
    ranks = len(space)
    return then(
        Reshape((out, prod(features)), (out, channels, *space)),
        Permute((*range(2, 2 + ranks), 1, 0)),
        Reshape((*space, channels, out), (prod(features), out)),
    )


def _entries(layer: Layer) -> Iterable[Entry]:
    kernel: Layout = Permute((1, 0))
    if layer.features is not None:
        kernel = kernel_after_flatten(layer.torch["weight"].shape[0], layer.features)
    return (Entry("weight", "kernel", kernel), Entry("bias", "bias", optional=True))


RULES = (
    Rule(
        nn.Linear,
        _entries,
        flax_types=("Dense", "Linear"),
        required=frozenset({"weight"}),
        settings="use_bias as in torch; behind a flatten say Flatten(path, (C, H, W))",
    ),
)

# Not layers of torch.nn: what the keys of a bare state_dict could mean just as well. The weight of the
# transformers library's Conv1D lies as Flax's kernel does.
LOOKALIKES = (
    Rule(
        (),
        (Entry("weight", "kernel"), Entry("bias", "bias", optional=True)),
        label="an input-major dense layer (transformers' Conv1D)",
    ),
)
