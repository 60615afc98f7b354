"""Layouts of one tensor: its axes or elements in another order."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ._layout import Layout

__all__ = ["Flip", "Permute", "Reshape"]


@dataclass(frozen=True)
class Permute(Layout):
    """The axes in another order: axis ``i`` of the result is axis ``axes[i]`` of the input."""

    axes: tuple[int, ...]

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Permute."""
        (tensor,) = tensors
        return (tensor.permute(self.axes),)

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Permute back."""
        (tensor,) = tensors
        back = [0] * len(self.axes)
        for place, axis in enumerate(self.axes):
            back[axis] = place
        return (tensor.permute(back),)

    def __str__(self) -> str:
        return f"permute{self.axes}"


@dataclass(frozen=True)
class Reshape(Layout):
    """The same elements in row-major order under another shape."""

    torch_shape: tuple[int, ...]
    flax_shape: tuple[int, ...]

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Reshape from ``torch_shape`` to ``flax_shape``."""
        (tensor,) = tensors
        return (_expect(tensor, self.torch_shape).reshape(self.flax_shape),)

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Reshape from ``flax_shape`` to ``torch_shape``."""
        (tensor,) = tensors
        return (_expect(tensor, self.flax_shape).reshape(self.torch_shape),)

    def __str__(self) -> str:
        return f"reshape{self.torch_shape}->{self.flax_shape}"


@dataclass(frozen=True)
class Flip(Layout):
    """The order of the elements along some axes reversed."""

    axes: tuple[int, ...]
    is_view = False  # torch has no negative strides

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Flip."""
        (tensor,) = tensors
        return (tensor.flip(self.axes),)

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Flip again."""
        return self.forward(tensors)

    def __str__(self) -> str:
        return f"flip{self.axes}"


def _expect(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"shape {tuple(tensor.shape)} is not {shape}")
    return tensor
