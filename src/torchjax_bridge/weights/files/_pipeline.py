"""Leaves into a file, one after another: laid out by some threads while another one writes.

Owns the only loop that moves the values of a checkpoint, and its memory: the bytes of a leaf that is row-major go
from where they are; another is copied first, into a buffer or, where it is large, by XLA and piece by piece.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch

from torchjax_bridge.errors import CheckpointError

from ..moving import xla_copy
from ._leaf import Leaf, Progress
from ._mapped import Window

__all__ = ["Pump", "raw", "read_all", "window_of"]

# Bytes of one write: the kernel copies what its caches hold, and a large piece of a map is faulted in long before.
_WRITE = 1 << 20
# Bytes laid out at a time: of twice as many, every page would come fresh from the kernel.
_PIECE = 16 << 20
_MOST = 4  # threads that lay out: beyond, the one that writes is the limit


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
        # Laying out costs more than writing, so several cores lay out what one thread writes in turn.
        self._layers = min(os.cpu_count() or 1, _MOST)
        self._in_flight = self._layers + 1
        self._memory = memory
        self._share = max(memory // (2 * self._in_flight), 1)
        self._progress = progress
        self._free: deque[np.ndarray] = deque()
        self._pending: deque[Future[None]] = deque()
        self._pools: tuple[Executor, Executor] | None = None

    @contextmanager
    def running(self) -> Iterator["Pump"]:
        """Within this the pump may be fed; everything is written when it ends."""
        with (
            ThreadPoolExecutor(1, thread_name_prefix="torchjax-bridge-writer") as writer,
            ThreadPoolExecutor(self._layers, thread_name_prefix="torchjax-bridge-layout") as layouts,
        ):
            self._pools = writer, layouts
            try:
                yield self
                self.flush()
            finally:
                for future in self._pending:
                    future.cancel()

    def feed(self, leaf: Leaf, file: BinaryIO, *, at: int | None = None) -> None:
        """Write the row-major bytes of a leaf; errors of an earlier write come up here too.

        Args:
            leaf: Read in this thread.
            file: Written to by another, until `flush` returns.
            at: The position in the file; by default where the leaf before ended.
        """
        large = leaf.nbytes > self._share
        self._wait(0 if large else self._in_flight - 1)
        tensor = leaf.read().detach()
        if tensor.dtype != leaf.dtype or tuple(tensor.shape) != leaf.shape:
            raise CheckpointError(
                f"'{leaf.name}' is {tensor.dtype} {tuple(tensor.shape)} where {leaf.dtype} {leaf.shape} was "
                "announced."
            )
        tensor = tensor.cpu().resolve_conj().resolve_neg()
        self._submit(tensor, file, at, self._progress)
        if large:
            self._wait(0)
            self._free.clear()

    def put(self, data: bytes, file: BinaryIO) -> None:
        """Write bytes that are no leaf, in turn."""
        if data:
            self._submit(torch.frombuffer(bytearray(data), dtype=torch.uint8), file, None, None)

    def flush(self) -> None:
        """Wait until all that was fed is written."""
        self._wait(0)

    def _submit(
        self, tensor: torch.Tensor, file: BinaryIO, at: int | None, progress: Progress | None
    ) -> None:
        if self._pools is None:
            raise RuntimeError("the pump is fed outside running()")
        writer, layouts = self._pools
        if tensor.is_contiguous():
            self._pending.append(writer.submit(_write, tensor, file, at, progress))
            return
        if xla_copy.is_fastest_for(tensor):
            tensor = tensor.squeeze()  # the same bytes, cut along an axis that can be
            size = min(_PIECE, max(self._share, _WRITE))
            rows = max(size * tensor.shape[0] // tensor.nbytes, 1)
            # A slow disk must not find the whole leaf laid out; many pieces keep busy cores from waiting for us.
            ahead = max(self._memory // (2 * size), self._in_flight)
            for piece in tensor.split(rows):
                self._wait(ahead - 1)
                made = layouts.submit(xla_copy.row_major_copy, piece)
                self._pending.append(writer.submit(_write_made, made, file, at, progress))
                at = None  # the others follow it
            return
        laid_out = layouts.submit(self._lay_out, tensor)

        def write() -> None:
            buffer, ready = laid_out.result()
            _write(ready, file, at, progress)
            self._free.append(buffer)

        self._pending.append(writer.submit(write))

    def _lay_out(self, tensor: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """A row-major copy, in a buffer that was written out or a new one."""
        try:
            buffer = self._free.popleft()
        except IndexError:
            buffer = np.empty(0, np.uint8)
        size = tensor.nbytes
        if buffer.nbytes < size:
            buffer = np.empty(
                size, np.uint8
            )  # warm memory is worth keeping: page faults cost more than bytes
        target = torch.from_numpy(buffer[:size]).view(tensor.dtype).view(tensor.shape)
        return buffer, target.copy_(tensor)

    def _wait(self, leave: int) -> None:
        while len(self._pending) > leave:
            self._pending.popleft().result()


def _write(tensor: torch.Tensor, file: BinaryIO, at: int | None, progress: Progress | None) -> None:
    if at is not None:
        file.seek(at)
    data = memoryview(raw(tensor).numpy().data)
    while data:
        data = data[file.write(data[:_WRITE]) :]
    if progress is not None:
        progress(tensor.nbytes)


def _write_made(
    made: Future[torch.Tensor], file: BinaryIO, at: int | None, progress: Progress | None
) -> None:
    _write(made.result(), file, at, progress)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a row-major tensor, as a view."""
    return tensor.reshape(-1).view(torch.uint8)


def read_all(leaves: Iterable[Leaf]) -> dict[str, torch.Tensor]:
    """The values of leaves by name; twins are one tensor."""
    values: dict[str, torch.Tensor] = {}
    for leaf in leaves:
        values[leaf.name] = values[leaf.twin] if leaf.twin in values else leaf.read()
    return values
