"""Parameters: weight trees between torch modules and Flax, both ways, exactly.

Needs flax (the ``flax`` extra). Other packages import from here, not from the files below.
"""

from typing import TYPE_CHECKING

from torchjax_bridge._lazy import lazy_attributes

from ._apply import to_flax, to_state_dict
from ._audit import audit
from ._audit_report import Audit, SettingFault, SettingsWarning
from ._example import require_tensors
from ._plan import PairingWarning, PartialWarning, Plan, UserRule, plan
from ._report import Fault, Report
from .compare import Cause, Parity, ParityRow, parity
from .files import (
    compare_checkpoints,
    convert,
    load_flax,
    load_state_dict,
    open_checkpoint,
    save_flax,
    save_state_dict,
)
from .layouts import Constant, Each, Flip, Identity, Layout, Permute, Reshape, Split, Stack, Sum, then
from .linking import Link, link
from .rules import (
    RULES,
    TWIN_RULES,
    Entry,
    Fill,
    Flatten,
    Fused,
    Initializer,
    Keep,
    Layer,
    LayerType,
    Pad,
    Rename,
    Rule,
    Symbol,
    Twin,
    twin_of,
)
from .trees import wrapped_module

if TYPE_CHECKING:
    from .optimizer import FrozenWarning as FrozenWarning
    from .optimizer import to_optax as to_optax
    from .optimizer import to_optimizer_state as to_optimizer_state

__all__ = [
    "RULES",
    "TWIN_RULES",
    "Audit",
    "Cause",
    "Constant",
    "Each",
    "Entry",
    "Fault",
    "Fill",
    "Flatten",
    "Flip",
    "FrozenWarning",
    "Fused",
    "Identity",
    "Initializer",
    "Keep",
    "Layer",
    "LayerType",
    "Layout",
    "Link",
    "Pad",
    "PairingWarning",
    "Parity",
    "ParityRow",
    "PartialWarning",
    "Permute",
    "Plan",
    "Rename",
    "Report",
    "Reshape",
    "Rule",
    "SettingFault",
    "SettingsWarning",
    "Split",
    "Stack",
    "Sum",
    "Symbol",
    "Twin",
    "UserRule",
    "audit",
    "compare_checkpoints",
    "convert",
    "link",
    "load_flax",
    "load_state_dict",
    "open_checkpoint",
    "parity",
    "plan",
    "require_tensors",
    "save_flax",
    "save_state_dict",
    "then",
    "to_flax",
    "to_optax",
    "to_optimizer_state",
    "to_state_dict",
    "twin_of",
    "wrapped_module",
]

if not TYPE_CHECKING:  # a type checker knows the names from above, and should complain of others
    # Only these need optax, which takes long to import.
    __getattr__, __dir__ = lazy_attributes(
        __name__, dict.fromkeys(("FrozenWarning", "to_optax", "to_optimizer_state"), "optimizer")
    )
