"""Fresh row-major memory for converted weights, filled with one copy.

A destination is taken from ``np.empty``: numpy asks the kernel for huge pages on large blocks (see
``numpy/_core/src/multiarray/alloc.c``), torch does not, and page faults are most of what a cold copy costs.
The block is over-allocated so that it starts on the 64-byte boundary that XLA's CPU client needs to share it.
"""

import numpy as np
import torch

from ._relayout import copy_into

__all__ = ["fresh"]

_ALIGNMENT = 64
# Below this a fault or two cost less than the detour through numpy.
_LARGE = 1 << 20


def fresh(tensor: torch.Tensor) -> torch.Tensor:
    """A row-major copy of a tensor of any strides, in memory that nothing else holds.

    Memory:
        Always a copy, on the tensor's own device; on the CPU 64-byte aligned.
    """
    if not tensor.is_cpu or tensor.numel() * tensor.element_size() < _LARGE:
        return tensor.clone(memory_format=torch.contiguous_format)
    return copy_into(_empty(tensor), tensor)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialised, aligned, row-major CPU tensor of the same shape and dtype."""
    size = tensor.numel() * tensor.element_size()
    block = np.empty(size + _ALIGNMENT, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return torch.from_numpy(block[start : start + size]).view(tensor.dtype).view(tensor.shape)
