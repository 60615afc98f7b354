"""What several test files of the weights look at."""

import pytest
import torch

from torchjax_bridge.weights.moving import _xla_copy


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that XLA lays out; it does so whatever the size."""
    shapes: list[torch.Size] = []
    lay_out = _xla_copy.lay_out

    def look(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tensor.shape)
        return lay_out(tensor)

    monkeypatch.setattr(_xla_copy, "lay_out", look)
    monkeypatch.setattr(_xla_copy, "_LARGE_BYTES", 64)
    monkeypatch.setattr(_xla_copy, "_LARGE_BYTES_IN_SHORT_RUNS", 64)
    monkeypatch.setattr(_xla_copy, "_SHORTEST_RUN", 2)
    return shapes
