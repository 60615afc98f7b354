"""Code: functions and modules of one framework, called from the other.

Each direction has a sub-package: `jax_in_torch` and `torch_in_jax`, which do not import each other. Both use the
files here: the structure of a call (`_call`), the cache of compiled programs (`_cache`), and the settings of
JAX on which programs depend (`_settings`). Every name loads its file on first use, so that one direction does
not load the other, and only the wrapping of Flax modules imports flax.
"""

from typing import TYPE_CHECKING

from torchjax_bridge._lazy import lazy_attributes

if TYPE_CHECKING:
    from .jax_in_torch import as_torch_function as as_torch_function
    from .jax_in_torch import as_torch_module as as_torch_module
    from .torch_in_jax import as_jax_function as as_jax_function
    from .torch_in_jax import as_jax_module as as_jax_module

# The sub-package that holds each name.
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
    __getattr__, __dir__ = lazy_attributes(__name__, _LAZY)
