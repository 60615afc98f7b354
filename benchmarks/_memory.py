"""The limit of a copy: moving the same bytes with nothing around it.

On the CPU that is the C library's ``memcpy``, into memory that was written before (*warm*) and into pages
fresh from the kernel (*cold*), where the page faults cost more than the bytes. On a GPU it is torch's
device-to-device copy into existing memory (*warm*), and into a block of torch's caching allocator.
"""

import ctypes
import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

__all__ = ["COLD_FROM", "cold_copy", "give_back_memory", "warm_copy"]

COLD_FROM = 64 * 1024
"""Below this many bytes no allocator asks the kernel for pages, and a cold copy means nothing."""


def warm_copy(source: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """A function that copies a contiguous tensor's bytes into one warm destination, and returns that."""
    # Written once, so that its pages are there; and with other values, so that a check sees the copy.
    target = torch.full_like(source, -1)
    if source.is_cuda:

        def on_device(_: Any) -> torch.Tensor:
            return target.copy_(source)

        return on_device
    to, since, count = target.data_ptr(), source.data_ptr(), source.nbytes

    def on_host(_: Any) -> torch.Tensor:
        ctypes.memmove(to, since, count)
        return target

    return on_host


def cold_copy(source: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """A function that copies a contiguous tensor's bytes into fresh memory, and returns that."""
    if source.is_cuda:
        return lambda _: source.clone()
    since, count = source.data_ptr(), source.nbytes

    def on_host(_: Any) -> torch.Tensor:
        # An anonymous mapping is new every time; malloc would hand out warm pages again.
        pages = mmap.mmap(-1, count)
        fresh = torch.frombuffer(pages, dtype=source.dtype)
        ctypes.memmove(fresh.data_ptr(), since, count)
        return fresh.view(source.shape)

    return on_host


def give_back_memory() -> None:
    """Hand all memory that was freed back to the kernel, so that the next allocation is cold.

    A model is converted once, in a process that has not just freed another of its size; a loop in a benchmark has.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # a C library without it, or not to be had by name
        ctypes.CDLL(None).malloc_trim(0)
