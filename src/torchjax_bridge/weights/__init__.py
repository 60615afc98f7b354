"""PARAMETERS CROSS: weight trees between torch modules and Flax, both ways, exactly.

Needs flax (the ``flax`` extra). Other rooms import from here and not from the files below.
"""

from ._convert import to_flax, to_state_dict
from ._layout import Each, Flip, Identity, Layout, Permute, Reshape, Split, Stack, Sum, then
from ._plan import Plan, plan
from ._report import Fault, Report
from .rules import RULES, Entry, Flatten, Layer, LayerType, Rename, Rule

__all__ = [
    "RULES",
    "Each",
    "Entry",
    "Fault",
    "Flatten",
    "Flip",
    "Identity",
    "Layer",
    "LayerType",
    "Layout",
    "Permute",
    "Plan",
    "Rename",
    "Report",
    "Reshape",
    "Rule",
    "Split",
    "Stack",
    "Sum",
    "plan",
    "then",
    "to_flax",
    "to_state_dict",
]
