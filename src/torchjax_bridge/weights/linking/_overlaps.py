"""Finds tensors of a module that share elements in memory, as a weight and its transpose do.

A pull would write such an element twice. That is right only if it gets one value.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..layouts import as_bytes

__all__ = ["Write", "conflicts", "repeats", "spans"]

Write = tuple[str, torch.Tensor, torch.Tensor]
"""The key of a tensor, the tensor, and what it gets."""
Addresses = np.ndarray[Any, np.dtype[np.uint64]]


def conflicts(writes: Sequence[Write]) -> Iterator[tuple[str, str]]:
    """The keys of two tensors that get different values for an element that both hold.

    Memory: four times the bytes of the tensors that overlap.
    """
    targets = [target for _, target, _ in writes]
    starts, ends = spans(targets, list(map(torch.Tensor.data_ptr, targets)))
    for group in _touching([target.device for target in targets], starts, ends):
        start = min(starts[group])
        size = int(max(ends[group]) - start)
        values, written = np.zeros(size, np.uint8), np.zeros(size, np.bool_)
        for done, place in enumerate(group):
            _, target, value = writes[place]
            new = as_bytes(value.detach().to("cpu", target.dtype).resolve_conj().resolve_neg().contiguous())
            begin = int(starts[place] - start)
            here, was = (_bytes_of(target, whole, begin) for whole in (values, written))
            wrong = (here != new.numpy().reshape(here.shape)) & was
            if wrong.any():
                where = begin + _byte_offsets(target)[int(wrong.argmax())]
                other = next(
                    other
                    for other in group[:done]
                    if where in _byte_offsets(targets[other]) + int(starts[other] - start)
                )
                yield writes[other][0], writes[place][0]
            here[...], was[...] = new.numpy().reshape(here.shape), True


def _bytes_of(tensor: torch.Tensor, memory: np.ndarray[Any, Any], begin: int) -> np.ndarray[Any, Any]:
    """The bytes of a tensor in memory, of the tensor's shape and one axis more."""
    width = tensor.element_size()
    steps = (*(step * width for step in tensor.stride()), 1)
    return np.ndarray((*tensor.shape, width), memory.dtype, memory, begin, steps)


def repeats(tensor: torch.Tensor) -> bool:
    """Whether several elements of a tensor are one in memory, as of an expanded one."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            offsets = _byte_offsets(tensor)
            return len(np.unique(offsets)) < len(offsets)
        reach += (size - 1) * step
    return False


def spans(tensors: Sequence[torch.Tensor], pointers: Sequence[int]) -> tuple[Addresses, Addresses]:
    """The addresses at which tensors begin and end."""
    dense = map(torch.Tensor.is_contiguous, tensors)
    sizes = [one.nbytes if whole else _extent(one) for one, whole in zip(tensors, dense, strict=True)]
    starts = np.array(pointers, np.uint64)
    return starts, starts + np.array(sizes, np.uint64)


def _extent(tensor: torch.Tensor) -> int:
    """The bytes from the first element of a tensor to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _touching(devices: Sequence[torch.device], starts: Addresses, ends: Addresses) -> Iterator[list[int]]:
    """The places of tensors on one device between whose first and last elements others begin."""
    for device in set(devices):
        places = np.flatnonzero([one == device for one in devices] & (ends > starts))
        places = places[np.argsort(starts[places])]
        apart = starts[places][1:] >= np.maximum.accumulate(ends[places])[:-1]
        if not apart.all():
            groups = np.split(places, np.flatnonzero(apart) + 1)
            yield from (group.tolist() for group in groups if len(group) > 1)


def _byte_offsets(tensor: torch.Tensor) -> np.ndarray:
    """How far each byte of each element lies behind the first element."""
    found = np.zeros(1, np.int64)
    width = tensor.element_size()
    for size, step in zip(
        (*tensor.shape, width), (*(step * width for step in tensor.stride()), 1), strict=True
    ):
        found = (found[:, None] + np.arange(size) * step).reshape(-1)
    return found
