"""Finds tensors of a module that share elements in memory, as a weight and its transpose do.

A pull would write such an element twice. That is right only if it gets one value.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..layouts import as_bytes

__all__ = ["Write", "conflicts", "extent", "repeats"]

Write = tuple[str, torch.Tensor, torch.Tensor]
"""The key of a tensor, the tensor, and what it gets."""


def conflicts(writes: Sequence[Write]) -> Iterator[tuple[str, str]]:
    """The keys of two tensors that get different values for an element that both hold."""
    for group in _touching([target for _, target, _ in writes]):
        start = min(writes[place][1].data_ptr() for place in group)
        end = max(writes[place][1].data_ptr() + extent(writes[place][1]) for place in group)
        owners, values = np.full(end - start, -1), np.zeros(end - start, np.uint8)
        for place in group:
            _, target, value = writes[place]
            at = _byte_offsets(target) + (target.data_ptr() - start)
            new = as_bytes(value.detach().to("cpu", target.dtype).resolve_conj().resolve_neg().contiguous())
            wrong = (owners[at] >= 0) & (values[at] != new.numpy())
            if wrong.any():
                yield writes[int(owners[at][wrong][0])][0], writes[place][0]
            owners[at], values[at] = place, new.numpy()


def repeats(tensor: torch.Tensor) -> bool:
    """Whether several elements of a tensor are one in memory, as of an expanded one."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            offsets = _byte_offsets(tensor)
            return len(np.unique(offsets)) < len(offsets)
        reach += (size - 1) * step
    return False


def extent(tensor: torch.Tensor) -> int:
    """The bytes from the first element of a tensor to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _touching(tensors: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """The places of tensors on one device between whose first and last elements others begin."""
    for device in {tensor.device for tensor in tensors}:
        places = [place for place, one in enumerate(tensors) if one.device == device and one.numel()]
        places.sort(key=lambda place: tensors[place].data_ptr())
        group: list[int] = []
        end = 0
        for place in places:
            start = tensors[place].data_ptr()
            if start >= end and group:
                if len(group) > 1:
                    yield group
                group = []
            group.append(place)
            end = max(end, start + extent(tensors[place]))
        if len(group) > 1:
            yield group


def _byte_offsets(tensor: torch.Tensor) -> np.ndarray:
    """How far each byte of each element lies behind the first element."""
    found = np.zeros(1, np.int64)
    width = tensor.element_size()
    for size, step in zip(
        (*tensor.shape, width), (*(step * width for step in tensor.stride()), 1), strict=True
    ):
        found = (found[:, None] + np.arange(size) * step).reshape(-1)
    return found
