"""Settings that arrays do not carry: those of a torch layer and those of its Flax twin.

One file a family, as for the rules. A check is a function of one live torch layer and the settings of one Flax
layer that yields every `Difference`; `differences` picks the checks. Flax's defaults differ from torch's, and a
model with right weights and a wrong epsilon is another model.

Owns the tables of settings. Matches no layers and moves nothing. Refuses nothing: a Flax class that it does not
know has no settings to compare. Gives the differences to the audit, and the settings of live layers to `trees`
and `compare`.
"""

from ._activation import activation_differences, is_activation
from ._difference import Difference, Effect
from ._einsum import einsum_differences
from ._layer import FlaxLayer, flax_layer, is_flaxs_layer, overridden_call
from ._others import recurrent_dropout
from ._table import differences, is_compared

__all__ = [
    "Difference",
    "Effect",
    "FlaxLayer",
    "activation_differences",
    "differences",
    "einsum_differences",
    "flax_layer",
    "is_activation",
    "is_compared",
    "is_flaxs_layer",
    "overridden_call",
    "recurrent_dropout",
]
