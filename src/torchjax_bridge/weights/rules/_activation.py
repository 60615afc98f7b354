"""Activations with a parameter.

``PReLU`` is ``x`` where ``x >= 0`` and ``slope * x`` elsewhere on both sides (K. He et al., "Delving deep into
rectifiers", 2015, equation 1). torch holds ``(1,)`` or one slope a channel, Flax a single number. One slope a
channel needs the layer of `torchjax_bridge.weights.layers`.

Settings for parity: none. Initial slopes differ: 0.25 in torch, 0.01 in Flax.
"""

from collections.abc import Iterable

from torch import nn

from ..layouts import Identity, Layout, Reshape
from ._flattened import per_feature
from ._rule import Entry, Layer, Rule
from ._twin import Twin

__all__ = ["RULES"]


@per_feature
def _slope(layer: Layer) -> Iterable[Entry]:
    (count,) = layer.torch["weight"].shape
    place = layer.flax.get(("negative_slope",))
    layout: Layout = Identity()
    if place == ():
        if count > 1:
            flavour = "linen" if layer.flax_module is None else "nnx"
            raise ValueError(
                f"it has {count} slopes, one a channel, and Flax's PReLU has one; use "
                f"torchjax_bridge.weights.layers.{flavour}.PReLU({count})"
            )
        layout = Reshape((1,), ())
    return (Entry("weight", "negative_slope", layout),)


def _twin(module: nn.PReLU) -> Twin:
    if module.num_parameters == 1:
        return Twin("PReLU", settings={"negative_slope_init": 0.25})
    return Twin("PReLU", {"features": module.num_parameters}, own=True)


RULES = (
    Rule(
        nn.PReLU,
        _slope,
        flax_types=("PReLU",),
        required=frozenset({"weight"}),
        settings="one slope; for one a channel weights.layers.nnx.PReLU or weights.layers.linen.PReLU",
        twin=_twin,
    ),
)
