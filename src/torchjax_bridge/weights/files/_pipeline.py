"""Writes leaves to a file in sequence: some threads make row-major copies while another thread writes.

Every format of one file is written through here, in bounded memory. A row-major leaf is written without a copy.
Another leaf is first copied: into a buffer, or, if it is large, by XLA and piece by piece. A large leaf that can be
read in parts is read so.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

from torchjax_bridge.errors import CheckpointError

from ..layouts import as_bytes
from ..moving import copy_threads, xla_copy
from ._boxes import box_shape, pieces
from ._leaf import Leaf, Progress
from ._mapped import Window

__all__ = ["Pipeline", "read_all", "window_for"]

# Bytes of one write. A larger write is slower: its source is no longer in the cache when the kernel copies it.
_WRITE_BYTES = 1 << 20
# Bytes that XLA copies at a time. With twice as many, the allocator would take every page anew from the kernel.
_PIECE_BYTES = 16 << 20
_MAX_COPIES = 4  # leaves that are copied at a time; with more, the thread that writes is the limit

Copy = TypeVar("Copy")


def window_for(memory: int) -> Window:
    """The window of a source that is read once, for a given limit on memory."""
    return Window(max(memory // 4, 1 << 20))


class Pipeline:
    """Writes leaves to files.

    Args:
        memory: Bytes that may be held in addition to the largest leaf that cannot be read in parts.
        progress: Called with the bytes of each leaf once it is written.
    """

    def __init__(self, memory: int, progress: Progress | None = None) -> None:
        # Copying costs more than writing, so several threads copy for one that writes.
        self._in_flight = min(torch.get_num_threads(), _MAX_COPIES) + 1
        self._memory = memory
        self._buffer_budget = max(memory // (2 * self._in_flight), 1)
        self._progress = progress
        self._free: deque[np.ndarray] = deque()
        self._pending: deque[Future[None]] = deque()
        self._copies: set[Future[Any]] = set()  # those that have not ended
        self._writer: Executor | None = None

    @contextmanager
    def running(self) -> Iterator["Pipeline"]:
        """Run the thread that writes; at the end everything is written, and no thread copies any more."""
        with ThreadPoolExecutor(1, thread_name_prefix="torchjax-bridge-writer") as self._writer:
            try:
                yield self
                self.flush()
            finally:
                copies = tuple(self._copies)
                for future in (*self._pending, *copies):
                    future.cancel()
                wait(copies)

    def write(self, leaf: Leaf, file: BinaryIO, *, at: int | None = None) -> None:
        """Write the row-major bytes of a leaf. Also raises the errors of earlier writes.

        Args:
            leaf: Read in this thread.
            file: Written by another thread, until `flush` returns.
            at: The position in the file; by default the end of the previous write.
        """
        large = leaf.nbytes > self._buffer_budget
        if large and leaf.read_box is not None:
            for box in pieces(
                leaf.shape, max(min(self._buffer_budget, _PIECE_BYTES) // leaf.dtype.itemsize, 1)
            ):
                self._wait(self._in_flight - 1)
                self._submit(_checked(leaf, leaf.slice(box), box_shape(box)), file, at, self._progress)
                at = None  # the next piece follows
            return
        self._wait(0 if large else self._in_flight - 1)
        self._submit(_checked(leaf, leaf.read(), leaf.shape), file, at, self._progress)
        if large:
            self._wait(0)
            self._free.clear()

    def write_bytes(self, data: bytes, file: BinaryIO) -> None:
        """Write bytes that are not a leaf, in sequence."""
        if data:
            self._submit(torch.frombuffer(bytearray(data), dtype=torch.uint8), file, None, None)

    def flush(self) -> None:
        """Wait until everything is written."""
        self._wait(0)

    def _submit(
        self, tensor: torch.Tensor, file: BinaryIO, at: int | None, progress: Progress | None
    ) -> None:
        if self._writer is None:
            raise RuntimeError("the pipeline is used outside running()")
        writer, copiers = self._writer, copy_threads()
        if tensor.is_contiguous():
            self._pending.append(writer.submit(_write, tensor, file, at, progress))
            return
        if xla_copy.is_fastest_for(tensor):
            tensor = tensor.squeeze()  # the same bytes, with a first axis that can be split
            size = min(_PIECE_BYTES, max(self._buffer_budget, _WRITE_BYTES))
            rows = max(size * tensor.shape[0] // tensor.nbytes, 1)
            # The bound keeps a slow disk from filling the memory with copies; many pieces keep every core busy.
            ahead = max(self._memory // (2 * size), self._in_flight)
            for piece in tensor.split(rows):
                self._wait(ahead - 1)
                copy = self._copying(copiers.submit(xla_copy.row_major_copy, piece))
                self._pending.append(writer.submit(_write_when_ready, copy, file, at, progress))
                at = None  # the next piece follows
            return
        copied = self._copying(copiers.submit(self._copy_to_buffer, tensor))

        def write() -> None:
            buffer, copy = copied.result()
            _write(copy, file, at, progress)
            self._free.append(buffer)

        self._pending.append(writer.submit(write))

    def _copy_to_buffer(self, tensor: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """A row-major copy, in a free buffer or a new one."""
        try:
            buffer = self._free.popleft()
        except IndexError:
            buffer = np.empty(0, np.uint8)
        size = tensor.nbytes
        if buffer.nbytes < size:
            buffer = np.empty(size, np.uint8)  # reused later: page faults cost more than copying
        target = torch.from_numpy(buffer[:size]).view(tensor.dtype).view(tensor.shape)
        return buffer, target.copy_(tensor)

    def _copying(self, copy: Future[Copy]) -> Future[Copy]:
        """The copy, which `running` waits for at its end, since others use the same threads."""
        self._copies.add(copy)
        copy.add_done_callback(self._copies.discard)
        return copy

    def _wait(self, at_most: int) -> None:
        while len(self._pending) > at_most:
            self._pending.popleft().result()


def _checked(leaf: Leaf, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if values.dtype != leaf.dtype or tuple(values.shape) != shape:
        raise CheckpointError(
            f"'{leaf.name}' is {values.dtype} {tuple(values.shape)}, not {leaf.dtype} {shape}."
        )
    return values.detach().cpu().resolve_conj().resolve_neg()


def _write(tensor: torch.Tensor, file: BinaryIO, at: int | None, progress: Progress | None) -> None:
    if at is not None:
        file.seek(at)
    data = memoryview(as_bytes(tensor).numpy().data)
    while data:
        data = data[file.write(data[:_WRITE_BYTES]) :]
    if progress is not None:
        progress(tensor.nbytes)


def _write_when_ready(
    copy: Future[torch.Tensor], file: BinaryIO, at: int | None, progress: Progress | None
) -> None:
    _write(copy.result(), file, at, progress)


def read_all(leaves: Iterable[Leaf]) -> dict[str, torch.Tensor]:
    """The values of leaves by name; tied leaves are one tensor."""
    values: dict[str, torch.Tensor] = {}
    for leaf in leaves:
        values[leaf.name] = values[leaf.twin] if leaf.twin in values else leaf.read()
    return values
