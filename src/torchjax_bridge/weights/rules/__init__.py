"""What is known about layers: one file for each family, and `RULES`, the table of them all.

Owns the layouts of every layer of torch.nn and the hints that a caller can give. Refuses, by a rule's
``ValueError``, a layer whose settings Flax cannot hold. Gives its rules to `pairing`, which applies them.

To add a family: write ``_family.py`` with a ``RULES`` tuple, list it below, add its tests, and an example to
``docs/make_layers.py``, which writes the page of layers. Users' own rules do not come here: they go into the
``rules`` of `to_flax` and are tried first. The order matters only between rules for the same class: a
parametrized layer is tried before the plain one.
"""

from . import _activation, _attention, _conv, _embedding, _linear, _norm, _recurrent
from ._attention import PARTS
from ._dense_axes import axes_of_equation, dense_kernel, possible_axes
from ._fused import Fused
from ._hints import Fill, Flatten, Keep, LayerType, Rename
from ._linear import in_input_order
from ._parametrized import parametrized
from ._recurrent import CELL_MARKS
from ._rule import Entry, Layer, Rule

__all__ = [
    "CELL_MARKS",
    "LOOKALIKES",
    "PARTS",
    "PLAIN",
    "RULES",
    "Entry",
    "Fill",
    "Flatten",
    "Fused",
    "Keep",
    "Layer",
    "LayerType",
    "Rename",
    "Rule",
    "axes_of_equation",
    "dense_kernel",
    "in_input_order",
    "possible_axes",
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

LOOKALIKES: tuple[Rule, ...] = _linear.LOOKALIKES
