"""What is known about layers: one file for each family, and `RULES`, the table of them all.

Owns the layouts of every layer of torch.nn and the hints that a caller can give. Refuses, by a rule's
``ValueError``, a layer whose settings Flax cannot hold. Gives its rules to `pairing`, which applies them.

To add a family: write ``_family.py`` with a ``RULES`` tuple, list it below, add its tests, and an example to
``docs/make_layers.py``, which writes the page of layers. Users' own rules do not come here: they go into the
``rules`` of `to_flax` and are tried first. The order matters only between rules for the same class: a
parametrized layer is tried before the plain one.
"""

from torch import nn

from . import _activation, _attention, _conv, _dropout, _embedding, _linear, _norm, _recurrent
from ._attention import PARTS
from ._dense_axes import axes_of_equation, dense_kernel, possible_axes
from ._fused import Fused
from ._hints import Fill, Flatten, Keep, LayerType, Rename, matches_path
from ._linear import in_input_order
from ._padding import Convolution, Pads, Transposed, kernel_reach, same_pads, torch_pads, transposed_pads
from ._parametrized import parametrized
from ._recurrent import CELL_MARKS
from ._rule import Entry, Layer, Rule
from ._twin import Initializer, Pad, Symbol, Twin
from ._twin_of import find_twin, own_methods

__all__ = [
    "CELL_MARKS",
    "LOOKALIKES",
    "PARTS",
    "PLAIN",
    "RULES",
    "TWIN_RULES",
    "WEIGHTLESS",
    "Convolution",
    "Entry",
    "Fill",
    "Flatten",
    "Fused",
    "Initializer",
    "Keep",
    "Layer",
    "LayerType",
    "Pad",
    "Pads",
    "Rename",
    "Rule",
    "Symbol",
    "Transposed",
    "Twin",
    "axes_of_equation",
    "dense_kernel",
    "in_input_order",
    "kernel_reach",
    "matches_path",
    "own_methods",
    "possible_axes",
    "same_pads",
    "torch_pads",
    "transposed_pads",
    "twin_of",
]

# The layers as torch.nn has them.
PLAIN: tuple[Rule, ...] = (
    *_linear.RULES,
    *_conv.RULES,
    *_norm.RULES,
    *_embedding.RULES,
    *_attention.RULES,
    *_recurrent.RULES,
    *_activation.RULES,
)

RULES: tuple[Rule, ...] = (*map(parametrized, PLAIN), *PLAIN)

# Layers without weights: they have twins, and nothing to pair.
WEIGHTLESS: tuple[Rule, ...] = _dropout.RULES

# What arrays do not show of twins: rules for `to_flax` where a model of linen was made of twins.
TWIN_RULES: tuple[Rule, ...] = _conv.TWIN_RULES

LOOKALIKES: tuple[Rule, ...] = _linear.LOOKALIKES


def twin_of(module: nn.Module, *, exact_statistics: bool = False) -> Twin:
    """The Flax layer that computes what a torch layer computes, with the settings of that layer.

    Args:
        module: A live torch layer. Only settings and shapes are read, so it may be on the meta device.
        exact_statistics: Make ``BatchNorm`` the one of `torchjax_bridge.weights.layers`, which feeds its running
            variance with the unbiased variance of the batch, as torch does; Flax's takes the biased one.

    Returns:
        The twin, which holds no weights; `to_flax` fills what it builds (linen's variables with
        ``rules=TWIN_RULES``, since they do not show everything).

    Raises:
        SettingsError: Flax has no such layer, or none with these settings, or the class has a ``forward`` of its
            own; the message names the setting.

    >>> print(twin_of(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)).in_linen())
    linen.Conv(8, (3, 3), strides=2, padding=1, use_bias=False, \
kernel_init=initializers.variance_scaling(1 / 3, "fan_in", "uniform"))
    """
    return find_twin((*PLAIN, *WEIGHTLESS), module, exact_statistics)
