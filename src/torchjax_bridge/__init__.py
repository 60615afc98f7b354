"""torchjax-bridge: PyTorch and JAX share tensors, weights and code.

``to_*`` moves data: the result lives in the other framework. ``as_*`` wraps code: it is called from the other
framework and still runs in its own. Importing this module changes no setting and is cheap: a name imports torch,
jax and what else it needs when it is first used.
"""

from typing import TYPE_CHECKING

from . import errors
from ._lazy import lazy_attributes

if TYPE_CHECKING:
    from .exchange import jax_device as jax_device
    from .exchange import jax_dtype as jax_dtype
    from .exchange import jax_mesh as jax_mesh
    from .exchange import jax_sharding as jax_sharding
    from .exchange import to_jax as to_jax
    from .exchange import to_torch as to_torch
    from .exchange import torch_device as torch_device
    from .exchange import torch_dtype as torch_dtype
    from .exchange import torch_mesh as torch_mesh
    from .exchange import torch_placements as torch_placements
    from .porting import port as port
    from .weights import audit as audit
    from .weights import link as link
    from .weights import parity as parity
    from .weights import plan as plan
    from .weights import to_flax as to_flax
    from .weights import to_optax as to_optax
    from .weights import to_optimizer_state as to_optimizer_state
    from .weights import to_state_dict as to_state_dict
    from .wrap import as_jax_function as as_jax_function
    from .wrap import as_jax_module as as_jax_module
    from .wrap import as_torch_function as as_torch_function
    from .wrap import as_torch_module as as_torch_module

__version__ = "0.1.0"

# The package that holds each name; it is imported when the name is first used (PEP 562).
_LAZY = {
    "jax_device": "exchange",
    "jax_dtype": "exchange",
    "jax_mesh": "exchange",
    "jax_sharding": "exchange",
    "to_jax": "exchange",
    "to_torch": "exchange",
    "torch_device": "exchange",
    "torch_dtype": "exchange",
    "torch_mesh": "exchange",
    "torch_placements": "exchange",
    "as_torch_function": "wrap",
    "as_torch_module": "wrap",
    "as_jax_function": "wrap",
    "as_jax_module": "wrap",
    "audit": "weights",
    "link": "weights",
    "parity": "weights",
    "plan": "weights",
    "port": "porting",
    "to_flax": "weights",
    "to_optax": "weights",
    "to_optimizer_state": "weights",
    "to_state_dict": "weights",
}

__all__ = [
    "as_jax_function",
    "as_jax_module",
    "as_torch_function",
    "as_torch_module",
    "audit",
    "errors",
    "jax_device",
    "jax_dtype",
    "jax_mesh",
    "jax_sharding",
    "link",
    "parity",
    "plan",
    "port",
    "to_flax",
    "to_jax",
    "to_optax",
    "to_optimizer_state",
    "to_state_dict",
    "to_torch",
    "torch_device",
    "torch_dtype",
    "torch_mesh",
    "torch_placements",
]

if not TYPE_CHECKING:  # a type checker knows the names from above, and should complain of others
    __getattr__, __dir__ = lazy_attributes(__name__, _LAZY)
