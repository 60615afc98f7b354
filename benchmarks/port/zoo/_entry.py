"""One model of the zoo: how it is built, and what it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._perturb import calibrate, perturb

__all__ = ["Entry", "images"]


@dataclass(frozen=True)
class Entry:
    """A model by name, with random weights and example inputs of any batch size."""

    set: str
    name: str
    builder: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    """The positional arguments of ``forward`` for a batch of that size, the same at every call."""
    speed_batch: int = 2
    """The batch size at which a forward pass is timed."""
    twin: Callable[[nn.Module], Any] | None = None
    """Makes the nnx module that a person wrote for this model, with the weights of the given one."""

    def build(self, seed: int = 0) -> nn.Module:
        """The model in evaluation mode, with weights, statistics and scales that hide no error."""
        torch.manual_seed(seed)
        return calibrate(perturb(self.builder(), seed), self.inputs(4), seed).eval()


def images(size: int, channels: int = 3) -> Callable[[int], tuple[Any, ...]]:
    """Square images, ``(batch, channels, size, size)`` float32."""
    return lambda batch: (
        torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1)),
    )
