"""Leaves into a file, one after another: laid out by this thread while another one writes.

Owns the only loop that moves the values of a checkpoint, and its memory: the bytes of a leaf that is row-major go
from where they are; another is copied into a buffer first.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch

from torchjax_bridge.errors import CheckpointError

from ._leaf import Leaf, Progress
from ._mapped import Window

__all__ = ["Pump", "raw", "read_all", "window_of"]


def window_of(memory: int) -> Window:
    """How much of a source stays mapped while it is read through."""
    return Window(max(memory // 4, 1 << 20))


class Pump:
    """Writes leaves to files.

    Args:
        memory: Bytes that may be held beside the largest leaf.
        progress: Told the bytes of each leaf once it is written.
    """

    def __init__(self, memory: int, progress: Progress | None = None) -> None:
        self._share = max(memory // 8, 1)
        self._progress = progress
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._pending: deque[Future[None]] = deque()
        self._writer: ThreadPoolExecutor | None = None
        self._turn = 0

    @contextmanager
    def running(self) -> Iterator["Pump"]:
        """Within this the pump may be fed; everything is written when it ends."""
        with ThreadPoolExecutor(1, thread_name_prefix="torchjax-bridge-writer") as writer:
            self._writer = writer
            try:
                yield self
                self._wait(0)
            finally:
                for future in self._pending:
                    future.cancel()

    def feed(self, leaf: Leaf, file: BinaryIO) -> None:
        """Write the row-major bytes of a leaf; errors of an earlier write come up here too."""
        tensor = leaf.read().detach()
        if tensor.dtype != leaf.dtype or tuple(tensor.shape) != leaf.shape:
            raise CheckpointError(
                f"'{leaf.name}' is {tensor.dtype} {tuple(tensor.shape)} where {leaf.dtype} {leaf.shape} was "
                "announced."
            )
        tensor = tensor.cpu().resolve_conj().resolve_neg()
        if not tensor.is_contiguous():
            tensor = self._lay_out(tensor)
        elif leaf.nbytes > self._share:
            self._wait(0)
        else:
            self._wait(1)
        self._submit(tensor, file)
        if leaf.nbytes > self._share:
            self._wait(0)

    def put(self, data: bytes, file: BinaryIO) -> None:
        """Write bytes that are no leaf, in turn."""
        if data:
            self._submit(torch.frombuffer(bytearray(data), dtype=torch.uint8), file, count=False)

    def flush(self) -> None:
        """Wait until all that was fed is written."""
        self._wait(0)

    def _lay_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """A row-major copy in the buffer that no pending write reads, or in memory of its own."""
        size = tensor.nbytes
        if size > self._share:
            self._wait(0)
            buffer = np.empty(size, np.uint8)
        else:
            self._wait(1)
            self._turn ^= 1
            if self._buffers[self._turn].nbytes < size:
                self._buffers[self._turn] = np.empty(size, np.uint8)
            buffer = self._buffers[self._turn]
        target = torch.from_numpy(buffer[:size]).view(tensor.dtype).view(tensor.shape)
        return target.copy_(tensor)

    def _submit(self, tensor: torch.Tensor, file: BinaryIO, count: bool = True) -> None:
        if self._writer is None:
            raise RuntimeError("the pump is fed outside running()")
        self._pending.append(self._writer.submit(_write, tensor, file, self._progress if count else None))

    def _wait(self, leave: int) -> None:
        while len(self._pending) > leave:
            self._pending.popleft().result()


def _write(tensor: torch.Tensor, file: BinaryIO, progress: Progress | None) -> None:
    data = memoryview(raw(tensor).numpy().data)
    while data:
        data = data[file.write(data) :]
    if progress is not None:
        progress(tensor.nbytes)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a row-major tensor, as a view."""
    return tensor.reshape(-1).view(torch.uint8)


def read_all(leaves: Iterable[Leaf]) -> dict[str, torch.Tensor]:
    """The values of leaves by name; twins are one tensor."""
    values: dict[str, torch.Tensor] = {}
    for leaf in leaves:
        values[leaf.name] = values[leaf.twin] if leaf.twin in values else leaf.read()
    return values
