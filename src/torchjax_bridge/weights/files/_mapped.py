"""Memory-mapped files: tensors that are views of the map.

A map is private: writing to such a tensor changes neither the file nor what others read from it. The file must not
be truncated while tensors view it, or the operating system ends the process.
"""

import mmap
import os
import pathlib
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from torchjax_bridge.errors import CheckpointError

__all__ = ["MappedFile", "Releasable", "Window"]

_READ_BYTES = 1 << 30  # less than a system call can read


class Releasable(Protocol):
    """An owner of a map, which can drop it."""

    def release(self) -> None:
        """Drop the map; the next read makes another."""


class Window:
    """Bounds how many bytes of a checkpoint stay mapped while it is read, over all of its files.

    Args:
        size: After this many bytes of tensors were returned, every map is dropped. Its pages are freed with the
            last tensor that views them.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._returned = 0
        self._owners: set[Releasable] = set()

    def add(self, owner: Releasable, count: int) -> None:
        """Count the bytes of a tensor that views a map of ``owner``."""
        self._owners.add(owner)
        self._returned += count
        if self._returned >= self._size:
            for one in self._owners:
                one.release()
            self._owners.clear()
            self._returned = 0


class MappedFile:
    """A file that is open for reading.

    Args:
        path: The file.
        window: Bounds what stays mapped; with None the file is mapped once.
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
        """The first bytes; fewer if the file is shorter."""
        return self.slice(0, count)

    def slice(self, begin: int, count: int) -> bytes:
        """A copy of some bytes; fewer if the file is shorter."""
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
            self._window.add(self, end - begin)
        return part.view(dtype).view(tuple(shape))

    def read_into(self, target: torch.Tensor, begin: int) -> None:
        """Fill a contiguous ``uint8`` tensor with the bytes from ``begin`` on, without the map."""
        left = memoryview(target.view(-1).numpy().data)
        while left:
            try:
                count = os.preadv(self._file, [left[:_READ_BYTES]], begin)
            except OSError as err:
                raise CheckpointError(f"cannot read {self.path}: {err.strerror}.") from err
            if not count:
                raise CheckpointError(f"{self.path} is cut: it ends at byte {begin}.")
            left, begin = left[count:], begin + count

    def part(self, begin: int, count: int, used: int) -> torch.Tensor:
        """Some bytes as a view of the map, of which ``used`` will be read."""
        part = self.bytes()[begin : begin + count]
        if self._window is not None:
            self._window.add(self, used)
        return part

    def release(self) -> None:
        """Drop the map; the next read makes another."""
        self._bytes = None

    def bytes(self) -> torch.Tensor:
        """The whole file as a ``uint8`` tensor."""
        if self._bytes is None:
            try:
                pages = mmap.mmap(self._file, self.size, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as err:  # the file is empty or was truncated
                raise CheckpointError(f"cannot map {self.path} into memory: {err}.") from err
            self._bytes = torch.frombuffer(pages, dtype=torch.uint8)
        return self._bytes
