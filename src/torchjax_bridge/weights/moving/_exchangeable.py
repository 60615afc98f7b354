"""The leaves of a Flax model that ``to_torch`` does not take: NumPy arrays, and arrays over several devices.

A checkpoint reader returns NumPy arrays, and an nnx module may hold one. They are copied, because a NumPy array may
be read-only and a torch tensor cannot be. An array over several devices is gathered on the host, leaf by leaf.
"""

from typing import Any

import jax
import numpy as np
import torch

from torchjax_bridge.exchange import torch_dtype

__all__ = ["WIDER", "as_exchangeable"]

WIDER = {torch.int32: torch.int64, torch.uint32: torch.uint64}
"""The 64-bit integers that JAX holds in 32 bits with x64 off, by what it holds them in."""


def as_exchangeable(value: Any, copy: bool | None = None) -> Any:
    """The value in a form that ``to_torch`` takes; with ``copy=False`` nothing is gathered."""
    if isinstance(value, jax.core.Tracer):  # refused later, by name
        return value
    if isinstance(value, jax.Array) and copy is not False and value.is_fully_addressable:
        if len(value.sharding.device_set) == 1:
            return value
        value = np.asarray(value)
    if not isinstance(value, np.ndarray | np.generic):
        return value
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return torch.from_numpy(flat.copy()).view(torch_dtype(value.dtype)).view(value.shape)
