"""The interface of a layout: how a group of torch tensors lies in a group of Flax arrays, and the exact inverse.

A layout works on torch tensors alone, in both directions: an exported JAX array is a torch tensor. It returns
views where it can; ``moving/`` makes the one copy afterwards. Run on meta tensors, it gives the shapes.
Layouts are frozen values: two equal ones do the same.

A layout refuses only shapes that do not fit, with a ``ValueError`` or torch's own ``RuntimeError``. The
matching turns these into faults.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Identity", "Layout", "as_bytes", "same_bits"]


@dataclass(frozen=True)
class Layout:
    """The interface: `forward` turns torch tensors into Flax tensors, `inverse` turns them back.

    Attributes:
        is_view: Whether both directions are strided views, so that no bytes move.
        is_linear: Whether it is a linear map, so that it also applies to optimizer moments.
        lossless: Whether ``inverse(forward(x))`` is ``x`` to the bit.
    """

    is_view = True
    is_linear = True
    lossless = True

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors as the Flax side holds them."""
        raise NotImplementedError

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The tensors as the torch side holds them.

        Args:
            tensors: What `forward` gives.
            was: The previous torch tensors, if any. Only a lossy layout uses them: it returns them unchanged
                if they still map to exactly ``tensors``.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Layout):
    """The same tensor on both sides."""

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors as they are."""
        return tuple(tensors)

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The tensors as they are."""
        return tuple(tensors)

    def __str__(self) -> str:
        return "as it is"


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, on any devices, are the same in dtype, shape and every bit, NaNs included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(as_bytes(tensor.contiguous()) for tensor in (one.to(other.device), other)))


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a row-major tensor, as a view."""
    # Of one element, torch says that it is row-major whatever its strides are.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
