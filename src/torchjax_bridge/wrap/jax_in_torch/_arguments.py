"""The leaves of a call: which are values that JAX traces, and how one that is no tensor goes to JAX.

Refuses numbers and arrays that the two frameworks do not share, and JAX tracers.
"""

from typing import Any

import jax
import numpy as np
import torch

from torchjax_bridge.errors import ArgumentError, DtypeError
from torchjax_bridge.exchange import tensor_to_jax, torch_dtype

from .._call import CallStructure
from ._trace import ARRAYS

__all__ = ["as_jax_value", "is_value", "is_value_but_no_bool"]

_NUMBERS = (bool, int, float, complex)
_VALUES = (torch.Tensor, *ARRAYS)


def is_value(leaf: Any) -> bool:
    """Whether a leaf is a value that JAX traces. Any other leaf is static."""
    return isinstance(leaf, _VALUES)


def is_value_but_no_bool(leaf: Any) -> bool:
    """`is_value`, with bools static."""
    return is_value(leaf) and not isinstance(leaf, bool | np.bool_)


def as_jax_value(leaf: Any, structure: CallStructure, position: int) -> tuple[Any, Any]:
    """A leaf that is no tensor, as JAX takes it, and its type for the cache key."""
    if isinstance(leaf, np.generic):
        number = leaf.item()
        if not isinstance(number, _NUMBERS):
            raise ArgumentError(
                f"{structure.names()[position]} is a {type(leaf).__module__}.{type(leaf).__qualname__}, for which "
                "JAX has no dtype. Pass a Python value: str(...) of a text, float(...) of a number."
            )
        leaf = number
    elif isinstance(leaf, np.ndarray):
        leaf = _from_numpy(leaf, structure, position)
    if isinstance(leaf, _NUMBERS):
        return leaf, type(leaf)
    if isinstance(leaf, jax.core.Tracer):
        raise ArgumentError(
            f"{structure.names()[position]} is a JAX tracer ({leaf.aval}): a torch function is called inside "
            "jax.jit, grad or vmap. Call the JAX function itself there, or wrap the torch code with "
            "as_jax_function."
        )
    return leaf, jax.typeof(leaf)


def _from_numpy(array: np.ndarray, structure: CallStructure, position: int) -> jax.Array:
    """The array in JAX, by the rules for tensors, so that nothing is narrowed silently.

    A copy, because the backward pass reads it, too.
    """
    name = structure.names()[position]
    try:
        torch_dtype(array.dtype.newbyteorder("="))
    except DtypeError as err:
        raise ArgumentError(
            f"{name} is a numpy array of dtype {array.dtype}, which torch cannot hold. Pass jnp.asarray(...) "
            "of it, or a tensor."
        ) from err
    return tensor_to_jax(array.copy(), path=(name,))
