"""Memory for blocks: used again by the next block, or given back to the system.

The heap of the C library would keep all of it: between blocks that come and go at one size lie small objects that
stay, so the next block of that size fits into no gap, and a long conversion would hold what the whole model takes.
Pages that are new each time are no answer either: the system clears each before it is used, which costs more than a
copy.
"""

import mmap
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from ._leaf import size_of

__all__ = ["fresh", "row_major"]

_SMALL = 1 << 18
# Kept for the next block: more than a conversion has in hand at its smallest budget would be a budget of its own.
_KEPT_BYTES = 32 << 20
_kept: deque[mmap.mmap] = deque()


def fresh(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A row-major tensor, of unknown values."""
    size = size_of(dtype, shape)
    if size < _SMALL:
        return torch.empty(tuple(shape), dtype=dtype)
    pages = _take(size)
    array = np.frombuffer(pages, np.uint8, size)
    weakref.finalize(array, _give_back, pages).atexit = False  # with the last view of it
    return torch.from_numpy(array).view(dtype).view(tuple(shape))


def _take(size: int) -> mmap.mmap:
    for _ in range(len(_kept)):
        try:
            pages = _kept.popleft()
        except IndexError:  # another thread took it
            break
        if size <= len(pages) <= 2 * size:
            return pages
        _kept.append(pages)
    return mmap.mmap(-1, size)


def _give_back(pages: mmap.mmap) -> None:
    _kept.append(pages)
    while sum(map(len, tuple(_kept))) > _KEPT_BYTES:
        try:
            _kept.popleft()
        except IndexError:
            return


def row_major(values: torch.Tensor) -> torch.Tensor:
    """The values on the CPU, row-major and without a pending conjugation; shared where they are so already."""
    values = values.detach().cpu()
    if values.is_contiguous() and not values.is_conj() and not values.is_neg():
        return values
    return fresh(values.shape, values.dtype).copy_(values)
