"""Dense layers.

torch keeps ``(out, in)`` and multiplies by the transpose, Flax keeps ``(in, out)``
(https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html,
https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/linear.html). ``Bilinear`` has no layer in Flax;
its ``weight (out, in1, in2)`` and ``bias`` are parameters of the module that computes
``jnp.einsum("...i,oij,...j->...o", x1, weight, x2) + bias``
(https://docs.pytorch.org/docs/stable/generated/torch.nn.Bilinear.html), and cross as they are.

Settings for parity: ``use_bias``, and the order in which features were flattened (see `Flatten`).
"""

from collections.abc import Iterable
from math import prod

from torch import nn

from .._layout import Layout, Permute, Reshape, then
from ._flattened import channels_last
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


_BIAS = Entry("bias", "bias", optional=True)
_DENSE = (Entry("weight", "kernel", Permute((1, 0))), _BIAS)


def _entries(layer: Layer) -> Iterable[Entry]:
    if layer.features is None and layer.output is None:
        return _DENSE
    out, width = layer.torch["weight"].shape
    kernel = Permute((1, 0)) if layer.features is None else kernel_after_flatten(out, layer.features)
    if layer.output is None:
        return (Entry("weight", "kernel", kernel), _BIAS)
    rows, bias = (channels_last(layer.output, after=rest) for rest in ((width,), ()))
    return (Entry("weight", "kernel", then(rows, kernel)), Entry("bias", "bias", bias, optional=True))


def _input_major(layer: Layer) -> Iterable[Entry]:
    if layer.torch["weight"].ndim != 2:
        raise ValueError("a dense layer has a weight of 2 axes")
    return (Entry("weight", "kernel"), _BIAS)


def _bilinear(layer: Layer) -> Iterable[Entry]:
    if layer.torch["weight"].ndim != 3:
        raise ValueError("a bilinear layer has a weight of 3 axes")
    return (Entry("weight", "weight"), _BIAS)


RULES = (
    Rule(
        nn.Linear,
        _entries,
        flax_types=("Dense", "Linear"),
        required=frozenset({"weight"}),
        settings=(
            "use_bias as in torch; behind a flatten say Flatten(path, (C, H, W)), and the same with output=True "
            "where a map is made of its output"
        ),
    ),
    Rule(
        nn.Bilinear,
        _bilinear,
        required=frozenset({"weight"}),
        settings='parameters weight and bias, and jnp.einsum("...i,oij,...j->...o", x1, weight, x2) + bias',
    ),
)

# Not layers of torch.nn: what the keys of a bare state_dict could mean just as well. The weight of the
# transformers library's Conv1D lies as Flax's kernel does.
LOOKALIKES = (
    Rule(
        (),
        _input_major,
        required=frozenset({"weight"}),
        label="an input-major dense layer (transformers' Conv1D)",
    ),
)
