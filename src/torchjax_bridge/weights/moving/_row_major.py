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

__all__ = ["cast_to", "row_major_copies"]

_ALIGNMENT = 64
# Below this, the page faults cost less than allocating through numpy.
_LARGE = 1 << 20


def row_major_copies(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Row-major copies of tensors of any strides, each in memory of its own.

    Args:
        tensors: The tensors, on any devices.
        dtype: What floating-point tensors are cast to, in the same pass; None keeps every dtype.

    Memory:
        Always copies, on each tensor's own device; on the CPU 64-byte aligned.
    """
    copies: dict[int, torch.Tensor] = {}
    large = [
        index
        for index, tensor in enumerate(tensors)
        if _xla_copy.is_fastest_for(tensor) and cast_to(tensor.dtype, dtype) is tensor.dtype
    ]
    if len(large) > 1 or torch.get_num_threads() == 1:
        large.sort(key=lambda index: tensors[index].nbytes, reverse=True)  # so that the threads end together
        results = copy_threads().map(_xla_copy.row_major_copy, (tensors[index] for index in large))
        copies = dict(zip(large, results, strict=True))
    return [
        copies[index] if index in copies else _copy_one(tensor, cast_to(tensor.dtype, dtype))
        for index, tensor in enumerate(tensors)
    ]


def cast_to(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a value once floating-point values are cast to ``dtype``."""
    return dtype if dtype is not None and own.is_floating_point else own


def _copy_one(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_cpu or tensor.nbytes < _LARGE:
        if dtype is tensor.dtype:
            return tensor.clone(memory_format=torch.contiguous_format)
        return tensor.to(dtype, memory_format=torch.contiguous_format)
    return copy_into(_empty(tensor.shape, dtype), tensor)


def _empty(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised, aligned, row-major CPU tensor."""
    size = shape.numel() * dtype.itemsize
    block = np.empty(size + _ALIGNMENT, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return torch.from_numpy(block[start : start + size]).view(dtype).view(shape)
