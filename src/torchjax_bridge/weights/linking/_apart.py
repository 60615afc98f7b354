"""Finds the values of a pull that lie in the memory that it writes to.

An array may lie in the module's own memory: it was shared by a push, or made by ``to_jax``. If it is not written
back to where it lies, an earlier write would change it before it is read.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ._overlaps import spans
from ._torch_side import Reading

__all__ = ["in_memory_of", "same_place"]


def in_memory_of(reading: Reading, sources: Sequence[torch.Tensor]) -> set[int]:
    """The places of the sources, which are dense, that lie in the memory of a tensor of the module."""
    starts, ends = spans(reading.tensors, reading.pointers or ())
    order = np.argsort(starts)
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    first, last = spans(sources, list(map(torch.Tensor.data_ptr, sources)))
    below = np.searchsorted(starts, last)  # how many start before the source ends
    found = (below > 0) & (ends[below - 1] > first) & (last > first)
    return set(np.flatnonzero(found).tolist())


def same_place(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape are the same elements in memory."""
    return one.data_ptr() == other.data_ptr() and one.dtype is other.dtype and one.stride() == other.stride()
