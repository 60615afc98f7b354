"""The pipeline that writes leaves: the memory it holds, and what it writes from tensors of any strides."""

import io
import threading
import time

import jax
import pytest
import torch

from torchjax_bridge.weights.files import _pipeline
from torchjax_bridge.weights.files._leaf import Leaf
from torchjax_bridge.weights.moving import _xla_copy


class _Disk:
    """A disk that is slower than the copies made for it, and full after ``room`` bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.written = 0

    def write(self, data: memoryview) -> int:
        time.sleep(0.002)
        if self.written >= self.room:
            raise OSError(28, "No space left on device")
        self.written += len(data)
        return len(data)


def leaf_of(tensor: torch.Tensor) -> Leaf:
    return Leaf("w", ("w",), tensor.dtype, tuple(tensor.shape), lambda: tensor)


@pytest.mark.parametrize("room", [1 << 40, 2 << 20])
def test_copies_wait_for_a_slow_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    tensor = torch.rand(4096, 2048).t()
    assert _xla_copy.is_fastest_for(tensor)
    disk, copied, most, lock = _Disk(room), 0, 0, threading.Lock()
    row_major_copy = _xla_copy.row_major_copy

    def count(piece: torch.Tensor) -> torch.Tensor:
        nonlocal copied, most
        with lock:
            copied += piece.nbytes
            most = max(most, copied - disk.written)
        return row_major_copy(piece)

    monkeypatch.setattr(_xla_copy, "row_major_copy", count)
    memory = 12 << 20
    try:
        with _pipeline.Pipeline(memory).running() as pipeline:
            pipeline.write(leaf_of(tensor), disk)  # type: ignore[arg-type]
    except OSError:
        assert room < tensor.nbytes
    else:
        assert disk.written == tensor.nbytes
    assert most <= memory


def test_a_transfer_guard_of_the_configuration_does_not_forbid_writing() -> None:
    tensor = torch.rand(2048, 1024).t()
    assert _xla_copy.is_fastest_for(tensor)
    file = io.BytesIO()
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "disallow_explicit")
    try:
        with _pipeline.Pipeline(1 << 30).running() as pipeline:
            pipeline.write(leaf_of(tensor), file)
    finally:
        jax.config.update("jax_transfer_guard", before)
    assert file.getvalue() == tensor.contiguous().numpy().tobytes()
