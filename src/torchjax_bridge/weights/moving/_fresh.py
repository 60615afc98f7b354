"""Fresh row-major memory for converted weights, filled with one copy.

A destination is taken from ``np.empty``: numpy asks the kernel for huge pages on large blocks (see
``numpy/_core/src/multiarray/alloc.c``), torch does not, and page faults are most of what a cold copy costs.
The block is over-allocated so that it starts on the 64-byte boundary that XLA's CPU client needs to share it.
What has to be laid out anew is shared among torch's threads, by leaf where there are many and by slab in one.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from . import _xla_copy
from ._relayout import copy_into

__all__ = ["fresh"]

_ALIGNMENT = 64
# Below this a fault or two cost less than the detour through numpy.
_LARGE = 1 << 20


def fresh(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Row-major copies of tensors of any strides, each in memory that nothing else holds.

    Memory:
        Always copies, on each tensor's own device; on the CPU 64-byte aligned.
    """
    copies: dict[int, torch.Tensor] = {}
    large = [place for place, tensor in enumerate(tensors) if _xla_copy.pays(tensor)]
    if len(large) > 1 or torch.get_num_threads() == 1:
        large.sort(key=lambda place: tensors[place].nbytes, reverse=True)  # the last to end is a small one
        with ThreadPoolExecutor(torch.get_num_threads(), "torchjax-bridge-layout") as pool:
            copies = dict(zip(large, pool.map(_xla_copy.lay_out, (tensors[n] for n in large)), strict=True))
    return [
        copies[place] if place in copies else _fresh_alone(tensor) for place, tensor in enumerate(tensors)
    ]


def _fresh_alone(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cpu or tensor.nbytes < _LARGE:
        return tensor.clone(memory_format=torch.contiguous_format)
    return copy_into(_empty(tensor), tensor)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialised, aligned, row-major CPU tensor of the same shape and dtype."""
    block = np.empty(tensor.nbytes + _ALIGNMENT, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return torch.from_numpy(block[start : start + tensor.nbytes]).view(tensor.dtype).view(tensor.shape)
