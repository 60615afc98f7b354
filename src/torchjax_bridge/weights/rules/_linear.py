"""Dense layers.

torch keeps ``(out, in)`` and multiplies by the transpose, Flax keeps ``(in, out)``
(https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html,
https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/linear.html). ``Bilinear`` has no layer in Flax;
its ``weight (out, in1, in2)`` and ``bias`` are parameters of the module that computes
``jnp.einsum("...i,oij,...j->...o", x1, weight, x2) + bias``
(https://docs.pytorch.org/docs/stable/generated/torch.nn.Bilinear.html), and cross as they are.

An ``Einsum`` with a kernel of two axes is a dense layer too; its equation says which of them is summed over
(``"ab,bc->ac"``: Flax's layout, ``"ab,cb->ac"``: torch's).

Settings for parity: ``use_bias``, and the order in which features were flattened (see `Flatten`).
"""

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from torch import nn

from .._layout import Identity, Layout, Permute, Reshape, then
from ._flattened import channels_last
from ._rule import Entry, Layer, Rule

__all__ = ["LOOKALIKES", "RULES", "kernel_after_flatten", "summed_axis"]


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
    if layer.flax_kind == "Einsum" or hasattr(layer.flax_module, "einsum_str"):
        return _einsum(layer)
    return _dense(layer)


def _dense(layer: Layer) -> Iterable[Entry]:
    if layer.features is None and layer.output is None:
        return _DENSE
    out, width = layer.torch["weight"].shape
    kernel = Permute((1, 0)) if layer.features is None else kernel_after_flatten(out, layer.features)
    if layer.output is None:
        return (Entry("weight", "kernel", kernel), _BIAS)
    rows, bias = (channels_last(layer.output, after=rest) for rest in ((width,), ()))
    return (Entry("weight", "kernel", then(rows, kernel)), Entry("bias", "bias", bias, optional=True))


def _einsum(layer: Layer) -> Iterable[Entry]:
    """The kernel as a dense layer has it, with its axes changed where the equation has the outputs first."""
    equation = getattr(layer.flax_module, "einsum_str", None)
    out, width = layer.torch["weight"].shape
    kernel, bias = _dense(layer)
    axis: int | None = 0
    if equation is not None:
        axis = summed_axis(equation)
        if axis is None:
            raise ValueError(
                f"its equation {equation!r} is not that of a dense layer, 'ab,bc->ac' or 'ab,cb->ac'; pass a Rule "
                "that says where the weight goes"
            )
    elif out == width:
        assumed = "taken to be summed over the first axis of its kernel, as by 'ab,bc->ac'"
        kernel = replace(kernel, assumed=assumed)
    elif layer.flax.get(("kernel",)) == (out, width):
        axis = 1
    if axis == 1:
        plain = kernel.layout == Permute((1, 0))
        kernel = replace(kernel, layout=Identity() if plain else then(kernel.layout, Permute((1, 0))))
    return kernel, bias


def summed_axis(equation: str) -> int | None:
    """Which axis of a kernel of two an einsum sums over; None where the equation is no dense layer's."""
    operands, arrow, out = equation.replace(" ", "").partition("->")
    inputs, comma, kernel = operands.partition(",")
    if not (arrow and comma and len(kernel) == 2):
        return None
    for axis in (0, 1):
        summed, kept = kernel[axis], kernel[1 - axis]
        if summed in inputs and summed not in out and kept in out and kept not in inputs:
            return axis
    return None


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
        flax_types=("Dense", "Linear", "Einsum"),
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
