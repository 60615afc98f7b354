"""Dense layers.

torch keeps ``(out, in)`` and multiplies by the transpose, Flax keeps ``(in, out)``
(https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html,
https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/linear.html). ``Bilinear`` has no layer in Flax;
its ``weight (out, in1, in2)`` and ``bias`` are parameters of the module that computes
``jnp.einsum("...i,oij,...j->...o", x1, weight, x2) + bias``
(https://docs.pytorch.org/docs/stable/generated/torch.nn.Bilinear.html), and cross as they are.

``LinearGeneral``, ``DenseGeneral`` and ``Einsum`` are dense layers with several axes for the inputs or the
outputs, such as the heads of an attention (``_dense_axes``). A ``Conv`` with a kernel of 1 is a dense layer
at every position. A ``Conv`` with a kernel as large as the map is a dense layer behind a flatten; the caller
gives its order (`Flatten`).

Settings for parity: ``use_bias``, and the order in which features were flattened (see `Flatten`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

from torch import nn

from ..layouts import Layout, Permute, Reshape, then
from ._dense_axes import DenseAxes, axes_of_equation, dense_kernel, possible_axes
from ._flattened import channels_last
from ._rule import Entry, Layer, Rule
from ._twin import Twin, changed, torch_uniform

__all__ = ["LOOKALIKES", "RULES", "in_input_order", "kernel_after_flatten"]


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
    equation = getattr(layer.flax_module, "einsum_str", None)
    is_einsum = layer.flax_kind == "Einsum" or equation is not None
    kernel = layer.flax.get(("kernel",))
    if kernel is None or (len(kernel) == 2 and not is_einsum):
        return _dense(layer)
    weight = _matrix(layer)
    if is_einsum:
        axes, assumed = _einsum_axes(layer, weight, kernel, equation)
    else:
        axes, assumed = _axes_by_shape(layer, weight, kernel), ""
    if len(kernel) == 2 and axes == _INPUTS_THEN_OUTPUTS:
        entries = tuple(_dense(layer))
        return (replace(entries[0], assumed=assumed), *entries[1:])
    assumed = assumed or _assumed_order(layer, kernel, axes)
    return _dense_general(layer, weight, kernel, axes, assumed)


def _matrix(layer: Layer) -> tuple[int, int]:
    if layer.torch["weight"].ndim != 2:
        raise ValueError("a dense layer has a weight of 2 axes")
    out, width = layer.torch["weight"].shape
    return out, width


def _dense(layer: Layer) -> Iterable[Entry]:
    if layer.features is None and layer.output is None:
        return _DENSE
    out, width = _matrix(layer)
    kernel = Permute((1, 0)) if layer.features is None else kernel_after_flatten(out, layer.features)
    if layer.output is None:
        return (Entry("weight", "kernel", kernel), _BIAS)
    rows, bias = (channels_last(layer.output, after=rest) for rest in ((width,), ()))
    return (Entry("weight", "kernel", then(rows, kernel)), Entry("bias", "bias", bias, optional=True))


# --- kernels of several axes --------------------------------------------------------------------------

_INPUTS_THEN_OUTPUTS = DenseAxes((0,), (1,))


def _einsum_axes(
    layer: Layer, weight: tuple[int, int], kernel: tuple[int, ...], equation: str | None
) -> tuple[DenseAxes, str]:
    """The axes by the equation, or by the shapes where there is none to read; and what was assumed."""
    if equation is not None:
        axes = axes_of_equation(equation)
        if axes is None:
            raise ValueError(
                f"its equation {equation!r} is not that of a dense layer, such as 'ab,bc->ac' or 'btd,dnh->btnh'; "
                "pass a Rule that says where the weight goes"
            )
        return axes, ""
    found = _possible(layer, weight, kernel)
    if len(found) < 2:
        return found[0], ""
    if found[0].inputs[0] != 0:
        raise ValueError(
            f"its equation is not seen, and a kernel {kernel} may be summed over several axes of it"
        )
    some = "the first axis" if len(found[0].inputs) == 1 else "the first axes"
    example = "ab,bc->ac" if len(kernel) == 2 else "btd,dnh->btnh"
    return found[0], f"taken to be summed over {some} of its kernel, as by {example!r}"


def _axes_by_shape(layer: Layer, weight: tuple[int, int], kernel: tuple[int, ...]) -> DenseAxes:
    """The axes of a layer without an equation: the inputs first, or as the shapes show."""
    theirs = layer.flax_module
    if getattr(theirs, "batch_axis", None):
        raise ValueError("it has batch axes, a kernel for each of which no nn.Linear has")
    contracted = getattr(theirs, "axis", ())
    if layer.flax_kind == "LinearGeneral" and contracted and not in_input_order(contracted):
        raise ValueError(
            f"axis={contracted} takes the axes of the input in another order than torch flattens them; list them "
            "in the order of the input"
        )
    if layer.flax_kind == "Conv" or (len(kernel) > 3 and prod(kernel[:-2]) > 1):
        _require_order(layer, weight, kernel)
    found = _possible(layer, weight, kernel)
    if found[0].inputs[0] != 0 and (len(found) > 1 or layer.flax_kind in _INPUTS_FIRST):
        raise ValueError(f"its weight {weight} does not divide into a kernel {kernel}, inputs first")
    return found[0]


_INPUTS_FIRST = ("LinearGeneral", "DenseGeneral", "Conv")


def in_input_order(axes: Sequence[int]) -> bool:
    """Whether contracted axes are listed in the order of the input, as far as their numbers show."""
    return all(one < other if (one < 0) == (other < 0) else one >= 0 for one, other in pairwise(axes))


def _possible(layer: Layer, weight: tuple[int, int], kernel: tuple[int, ...]) -> list[DenseAxes]:
    found = possible_axes(weight, kernel, layer.flax.get(("bias",)))
    if not found:
        raise ValueError(
            f"its weight {weight}, (outputs, inputs), does not divide into a kernel {kernel}"
            + (f" with a bias {layer.flax[('bias',)]}" if ("bias",) in layer.flax else "")
        )
    return found


def _require_order(layer: Layer, weight: tuple[int, int], kernel: tuple[int, ...]) -> None:
    """Raise if a kernel over a map needs the caller to say in which order torch flattens the map."""
    *space, channels, out = kernel
    map_ = (channels, *space)
    if weight != (out, prod(map_)) or prod(space) == 1:
        return  # not a convolution over the whole map
    if layer.features is not None and layer.features != map_:
        raise ValueError(f"Flatten says {layer.features}, and a kernel {kernel} reads a map {map_}")
    if layer.features is None and channels > 1 and "features" not in layer.told:
        raise ValueError(
            f"a kernel {kernel} is a dense layer over a map, which torch flattens as (C, H, W) or as (H, W, C): "
            f"say rules=[Flatten(<path>, {map_})] if as (C, H, W), as nn.Flatten and nn.Unfold do, or "
            "Flatten(<path>, None) if the channels are last in torch too"
        )


def _assumed_order(layer: Layer, kernel: tuple[int, ...], axes: DenseAxes) -> str:
    """The assumption for outputs of three axes or more: torch's rows are in the order of Flax's axes."""
    sizes = tuple(kernel[axis] for axis in axes.outputs)
    if sum(size > 1 for size in sizes) < 3 or "output" in layer.told:
        return ""
    return (
        f"taken to give its outputs in the order of Flax's axes {sizes}; Flatten(<path>, None, output=True) says "
        "that it does"
    )


def _dense_general(
    layer: Layer, weight: tuple[int, int], kernel: tuple[int, ...], axes: DenseAxes, assumed: str
) -> tuple[Entry, Entry]:
    """The entries of a kernel with several axes, with features in Flax's order."""
    out, width = weight
    rows = [] if layer.output is None else [channels_last(layer.output, after=(width,))]
    columns = [] if layer.features is None else [channels_last(layer.features, before=(out,))]
    layout = then(*rows, *columns, dense_kernel(weight, kernel, axes))
    bias = [] if layer.output is None else [channels_last(layer.output)]
    shape = layer.flax.get(("bias",), (out,))
    if shape != (out,) and prod(shape) == out:
        bias.append(Reshape((out,), shape))
    return (
        Entry("weight", "kernel", layout, assumed=assumed),
        Entry("bias", "bias", then(*bias), optional=True),
    )


def _input_major(layer: Layer) -> Iterable[Entry]:
    width, out = _matrix(layer)
    kernel = layer.flax.get(("kernel",), ())
    if len(kernel) == 2:
        return (Entry("weight", "kernel"), _BIAS)
    axes = _possible(layer, (out, width), kernel)[0]
    weight, bias = _dense_general(layer, (out, width), kernel, axes, "")
    return replace(weight, layout=then(Permute((1, 0)), weight.layout)), bias


def _bilinear(layer: Layer) -> Iterable[Entry]:
    if layer.torch["weight"].ndim != 3:
        raise ValueError("a bilinear layer has a weight of 3 axes")
    return (Entry("weight", "weight"), _BIAS)


def _linear_twin(module: nn.Linear) -> Twin:
    return Twin(
        "Linear",
        {"in_features": module.in_features, "out_features": module.out_features},
        changed(use_bias=(module.bias is not None, True)),
        {"kernel_init": torch_uniform()},
    )


def _bilinear_twin(module: nn.Bilinear) -> Twin:
    raise ValueError('Flax has no such layer; write jnp.einsum("...i,oij,...j->...o", x1, weight, x2) + bias')


RULES = (
    Rule(
        nn.Linear,
        _entries,
        flax_types=("Dense", "Linear", "DenseGeneral", "LinearGeneral", "Einsum", "Conv"),
        required=frozenset({"weight"}),
        settings=(
            "use_bias as in torch; behind a flatten say Flatten(path, (C, H, W)), and the same with output=True "
            "where a map is made of its output; several axes in the order in which torch flattens them; as a Conv "
            "padding='VALID', with strides of 1 at every position"
        ),
        twin=_linear_twin,
    ),
    Rule(
        nn.Bilinear,
        _bilinear,
        required=frozenset({"weight"}),
        settings='parameters weight and bias, and jnp.einsum("...i,oij,...j->...o", x1, weight, x2) + bias',
        twin=_bilinear_twin,
    ),
)

# Layers outside torch.nn that the keys of a bare state_dict could mean just as well. The weight of the
# transformers library's Conv1D lies as Flax's kernel does.
LOOKALIKES = (
    Rule(
        (),
        _input_major,
        required=frozenset({"weight"}),
        label="an input-major dense layer (transformers' Conv1D)",
    ),
)
