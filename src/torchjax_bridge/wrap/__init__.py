"""CODE CROSSES: functions and modules of one framework, called from the other.

One sub-room a direction: `jax_in_torch` and `torch_in_jax`, which do not know each other. What both use stays here:
how a call is taken apart (`_call`), the cache of what was compiled (`_cache`), the settings of JAX that decide what
tracing gives (`_settings`). Every name loads its file on first touch, so that one direction does not pay for the
other, and flax is imported only by what wraps flax modules.
"""

from typing import TYPE_CHECKING

from torchjax_bridge._lazy import on_first_touch

if TYPE_CHECKING:
    from .jax_in_torch import as_torch_function as as_torch_function
    from .jax_in_torch import as_torch_module as as_torch_module
    from .torch_in_jax import as_jax_function as as_jax_function
    from .torch_in_jax import as_jax_module as as_jax_module

# The sub-room that holds each name.
_LAZY = {
    "as_jax_function": "torch_in_jax",
    "as_jax_module": "torch_in_jax",
    "as_torch_function": "jax_in_torch",
    "as_torch_module": "jax_in_torch",
}

__all__ = [
    "as_jax_function",
    "as_jax_module",
    "as_torch_function",
    "as_torch_module",
]

if not TYPE_CHECKING:  # a type checker knows the names from above, and should complain of others
    __getattr__, __dir__ = on_first_touch(__name__, _LAZY)
