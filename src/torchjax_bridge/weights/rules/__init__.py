"""One file per layer family; `RULES` is all of them, and the only table.

To add a layer family: write ``_family.py`` with a ``RULES`` tuple, add it here, add its tests. The layer
table of the documentation is generated from `RULES`.
"""

from . import _conv, _linear, _norm
from ._hints import Flatten, LayerType, Rename
from ._rule import Entry, Layer, Rule

__all__ = ["LOOKALIKES", "RULES", "Entry", "Flatten", "Layer", "LayerType", "Rename", "Rule"]

RULES: tuple[Rule, ...] = (*_linear.RULES, *_conv.RULES, *_norm.RULES)

LOOKALIKES: tuple[Rule, ...] = _linear.LOOKALIKES
