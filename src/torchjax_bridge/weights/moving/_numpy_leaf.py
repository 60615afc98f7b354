"""A leaf of a Flax model that ``to_torch`` does not take, on its way to torch: a numpy array, one of many devices.

A checkpoint reader hands numpy arrays out, and an nnx module may hold one. They are copied: a numpy array may be
read-only, and torch has no such tensors. An array over several devices is gathered on the host, one leaf at a time.
"""

from typing import Any

import jax
import numpy as np
import torch

from torchjax_bridge.exchange import torch_dtype

__all__ = ["crossing"]


def crossing(value: Any, copy: bool | None = None) -> Any:
    """The value, as something that crosses to torch; with ``copy=False`` nothing is gathered."""
    if isinstance(value, jax.Array) and copy is not False and value.is_fully_addressable:
        if len(value.sharding.device_set) == 1:
            return value
        value = np.asarray(value)
    if not isinstance(value, np.ndarray | np.generic):
        return value
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return torch.from_numpy(flat.copy()).view(torch_dtype(value.dtype)).view(value.shape)
