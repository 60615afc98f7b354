"""The loop that moves the values: what it holds, and what it writes from tensors of any strides."""

import io
import threading
import time

import jax
import pytest
import torch

from torchjax_bridge.weights.files import _pipeline as _pump
from torchjax_bridge.weights.files._leaf import Leaf
from torchjax_bridge.weights.moving import _xla_copy


class _Disk:
    """Slower than what is laid out for it, and full at some point."""

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
def test_no_more_of_a_leaf_is_laid_out_than_its_disk_can_take(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    tensor = torch.rand(4096, 2048).t()
    assert _xla_copy.is_fastest_for(tensor)
    disk, made, most, lock = _Disk(room), 0, 0, threading.Lock()
    row_major_copy = _xla_copy.row_major_copy

    def count(piece: torch.Tensor) -> torch.Tensor:
        nonlocal made, most
        with lock:
            made += piece.nbytes
            most = max(most, made - disk.written)
        return row_major_copy(piece)

    monkeypatch.setattr(_xla_copy, "row_major_copy", count)
    memory = 12 << 20
    try:
        with _pump.Pump(memory).running() as pump:
            pump.feed(leaf_of(tensor), disk)  # type: ignore[arg-type]
    except OSError:
        assert room < tensor.nbytes
    else:
        assert disk.written == tensor.nbytes
    assert most <= memory


def test_a_guard_on_transfers_in_the_configuration_is_not_about_files() -> None:
    tensor = torch.rand(2048, 1024).t()
    assert _xla_copy.is_fastest_for(tensor)
    file = io.BytesIO()
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "disallow_explicit")
    try:
        with _pump.Pump(1 << 30).running() as pump:
            pump.feed(leaf_of(tensor), file)
    finally:
        jax.config.update("jax_transfer_guard", before)
    assert file.getvalue() == tensor.contiguous().numpy().tobytes()
