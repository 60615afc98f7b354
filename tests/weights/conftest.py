"""Fixtures for several test files of the weights."""

import pytest
import torch

from torchjax_bridge.weights.moving import _xla_copy


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that XLA copies, which it does at any size here."""
    shapes: list[torch.Size] = []
    row_major_copy = _xla_copy.row_major_copy

    def record(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tensor.shape)
        return row_major_copy(tensor)

    monkeypatch.setattr(_xla_copy, "row_major_copy", record)
    monkeypatch.setattr(_xla_copy, "_LARGE_BYTES", 64)
    monkeypatch.setattr(_xla_copy, "_LARGE_BYTES_IN_SHORT_RUNS", 64)
    monkeypatch.setattr(_xla_copy, "_MIN_RUN", 2)
    return shapes
