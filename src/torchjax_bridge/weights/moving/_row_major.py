"""Row-major copies of converted weights, in new memory.

The memory comes from ``np.empty``. numpy asks the kernel for huge pages on large blocks (see
``numpy/_core/src/multiarray/alloc.c``), torch does not, and page faults are most of what a cold copy costs.
The block is over-allocated so that the copy starts on the 64-byte boundary that XLA's CPU client needs to share it.
Several large leaves are shared among torch's threads; a single one is split into slabs.
"""

from collections.abc import Sequence

import numpy as np
import torch

from . import _xla_copy
from ._executor import copy_threads
from ._relayout import copy_into

__all__ = ["row_major_copies"]

_ALIGNMENT = 64
# Below this, the page faults cost less than allocating through numpy.
_LARGE = 1 << 20


def row_major_copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Row-major copies of tensors of any strides, each in memory of its own.

    Memory:
        Always copies, on each tensor's own device; on the CPU 64-byte aligned.
    """
    copies: dict[int, torch.Tensor] = {}
    large = [index for index, tensor in enumerate(tensors) if _xla_copy.is_fastest_for(tensor)]
    if len(large) > 1 or torch.get_num_threads() == 1:
        large.sort(key=lambda index: tensors[index].nbytes, reverse=True)  # so that the threads end together
        results = copy_threads().map(_xla_copy.row_major_copy, (tensors[index] for index in large))
        copies = dict(zip(large, results, strict=True))
    return [copies[index] if index in copies else _copy_one(tensor) for index, tensor in enumerate(tensors)]


def _copy_one(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cpu or tensor.nbytes < _LARGE:
        return tensor.clone(memory_format=torch.contiguous_format)
    return copy_into(_empty(tensor), tensor)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialised, aligned, row-major CPU tensor of the same shape and dtype."""
    block = np.empty(tensor.nbytes + _ALIGNMENT, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return torch.from_numpy(block[start : start + tensor.nbytes]).view(tensor.dtype).view(tensor.shape)
