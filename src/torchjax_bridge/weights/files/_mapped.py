"""A file as memory: tensors that are views of its map.

A map is private, so writing to such a tensor changes neither the file nor what others read from it. The file must
not be shortened while tensors look into it: the operating system then ends the process.
"""

import mmap
import os
import pathlib
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from torchjax_bridge.errors import CheckpointError

__all__ = ["MappedFile", "Released", "Window"]


class Released(Protocol):
    """What holds a map and can let go of it."""

    def release(self) -> None:
        """Drop the map; the next read makes another."""


class Window:
    """How many bytes of all the files of one checkpoint may stay mapped while it is read through.

    Args:
        size: After so many bytes were handed out, every map is let go; its pages are given back when the last
            tensor that looks into it is gone.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._handed_out = 0
        self._holders: set[Released] = set()

    def take(self, holder: Released, count: int) -> None:
        """Say that a tensor of so many bytes is handed out."""
        self._holders.add(holder)
        self._handed_out += count
        if self._handed_out >= self._size:
            for one in self._holders:
                one.release()
            self._holders.clear()
            self._handed_out = 0


class MappedFile:
    """A readable file.

    Args:
        path: The file.
        window: Bounds what stays mapped; None maps once.
    """

    def __init__(self, path: pathlib.Path, window: Window | None = None) -> None:
        self.path = path
        self._window = window
        self._bytes: torch.Tensor | None = None
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as err:
            raise CheckpointError(f"cannot read {path}: {err.strerror}.") from err
        weakref.finalize(self, os.close, self._file)
        self.size = os.fstat(self._file).st_size

    def start(self, count: int) -> bytes:
        """The first bytes, fewer where the file ends."""
        return self.slice(0, count)

    def slice(self, begin: int, count: int) -> bytes:
        """A copy of some bytes, fewer where the file ends."""
        try:
            return os.pread(self._file, count, begin)
        except OSError as err:
            raise CheckpointError(f"cannot read {self.path}: {err.strerror}.") from err

    def tensor(self, begin: int, end: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """The tensor whose row-major bytes are ``[begin, end)``.

        Memory:
            A view of the map; a copy where the bytes do not start on a multiple of the element size.
        """
        if begin == end:
            return torch.empty(tuple(shape), dtype=dtype)
        part = self.bytes()[begin:end]
        if begin % dtype.itemsize:
            part = part.clone()
        if self._window is not None:
            self._window.take(self, end - begin)
        return part.view(dtype).view(tuple(shape))

    def release(self) -> None:
        """Drop the map; the next read makes another."""
        self._bytes = None

    def bytes(self) -> torch.Tensor:
        """The whole file as a ``uint8`` tensor."""
        if self._bytes is None:
            try:
                pages = mmap.mmap(self._file, self.size, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as err:  # no map of an empty file, or of one that was shortened
                raise CheckpointError(f"cannot map {self.path} into memory: {err}.") from err
            self._bytes = torch.frombuffer(pages, dtype=torch.uint8)
        return self._bytes
