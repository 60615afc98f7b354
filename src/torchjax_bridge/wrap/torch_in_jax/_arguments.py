"""The arguments of a call: from leaves to JAX arrays, and the device on which torch will run.

Refuses tensors, dtypes that the other side does not have, and 64-bit integers that do not fit with x64 off.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge.errors import ArgumentError, DtypeError, NarrowingError
from torchjax_bridge.exchange import torch_device, torch_dtype

from .._call import CallStructure
from ._graph import Spec

__all__ = ["as_arrays", "device_of", "is_array"]


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced (or refused, as a tensor is). Any other leaf is static."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | torch.Tensor)


def as_arrays(leaves: Sequence[Any], structure: CallStructure) -> tuple[list[Any], tuple[Spec, ...]]:
    """The leaves as JAX arrays, and the shape and dtype that each has in torch."""
    arrays, specs = [], []
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, jax.Array):
            leaf = _as_array(leaf, i, structure)
        try:
            specs.append(Spec(leaf.shape, torch_dtype(leaf.dtype)))
        except DtypeError as err:
            raise DtypeError(f"cannot pass {structure.names()[i]} to a torch function: {err}") from None
        arrays.append(leaf)
    return arrays, tuple(specs)


def _as_array(leaf: Any, index: int, structure: CallStructure) -> Any:
    if isinstance(leaf, torch.Tensor):
        raise ArgumentError(
            f"{structure.names()[index]} is a torch.Tensor; a wrapped function takes JAX arrays. Pass "
            "torchjax_bridge.to_jax(tensor), or close over the tensor."
        )
    try:
        array = jnp.asarray(leaf)
    except TypeError as err:
        raise ArgumentError(
            f"{structure.names()[index]} is a numpy array of dtype {leaf.dtype}, which JAX has no counterpart for. "
            "Pass numbers or booleans."
        ) from err
    if array.dtype != leaf.dtype and leaf.dtype.kind in "iu" and not np.array_equal(np.asarray(array), leaf):
        raise NarrowingError(
            f"{structure.names()[index]} holds {leaf.dtype} values that do not fit in {array.dtype}, and x64 is "
            "off. Set jax_enable_x64, or pass another dtype."
        )
    return array


def device_of(arrays: Sequence[Any]) -> torch.device:
    """The device on which torch will run: that of the arrays, or JAX's default."""
    if _only_cpu():
        return _CPU
    for array in arrays:
        if not isinstance(array, jax.core.Tracer):
            return torch_device(next(iter(array.devices())))
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    return torch_device(default or jax.local_devices()[0])


_CPU = torch.device("cpu")


@functools.cache
def _only_cpu() -> bool:
    return {device.platform for device in jax.local_devices()} == {"cpu"}
