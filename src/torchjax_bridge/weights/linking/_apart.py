"""Keeps the values of a pull apart from the memory that it writes to.

An array may lie in the module's own memory: it was shared by a push, or made by ``to_jax``. If it is not written
back to where it lies, an earlier write would change it before it is read.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import torch

__all__ = ["apart"]


def apart(writes: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """The sources of pairs of a target and a source, those copied that lie in other memory of the targets."""
    extents = sorted(_extent(target) for target, _ in writes)
    starts = [start for start, _ in extents]
    ends = list(accumulate((end for _, end in extents), max))

    def keep(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        start, end = _extent(source)
        below = bisect_left(starts, end)  # the targets that start before the source ends
        touched = below > 0 and ends[below - 1] > start
        return source.clone() if touched and not _same_place(target, source) else source

    return [keep(target, source) for target, source in writes]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first and the last address of its elements; none of it is empty."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _same_place(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.dtype is other.dtype and one.stride() == other.stride()
