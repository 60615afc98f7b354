"""Memory for blocks that goes back to the system with its last view.

The heap of the C library would keep it: between blocks that come and go at one size lie small objects that stay, so
the next block of that size fits into no gap, and a long conversion would hold what the whole model takes.
"""

import mmap
from collections.abc import Sequence

import torch

from ._leaf import size_of

__all__ = ["fresh", "row_major"]

_SMALL = 1 << 18


def fresh(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A row-major tensor, of unknown values."""
    size = size_of(dtype, shape)
    if size < _SMALL:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(tuple(shape))


def row_major(values: torch.Tensor) -> torch.Tensor:
    """The values on the CPU, row-major and without a pending conjugation; shared where they are so already."""
    values = values.detach().cpu()
    if values.is_contiguous() and not values.is_conj() and not values.is_neg():
        return values
    return fresh(values.shape, values.dtype).copy_(values)
