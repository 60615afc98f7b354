"""Layouts between one tensor and several, or none: equal parts, rows of unequal parts, a sum, a constant.

Decides nothing about which layers are parts of one: the rules and the caller (`Fused`) say that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._layout import Layout, same_bits

__all__ = ["Constant", "Rows", "Split", "Sum"]


@dataclass(frozen=True)
class Split(Layout):
    """One torch tensor is ``parts`` equal Flax tensors along its first axis.

    The way back concatenates, which moves bytes.
    """

    parts: int
    is_view = False

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The parts, as views."""
        (tensor,) = tensors
        if tensor.shape[0] % self.parts:
            raise ValueError(f"axis 0 of {tuple(tensor.shape)} does not split into {self.parts} equal parts")
        return tuple(tensor.chunk(self.parts))

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The parts, concatenated."""
        return (torch.cat(tuple(tensors)),)

    def __str__(self) -> str:
        return f"split in {self.parts}"


@dataclass(frozen=True)
class Rows(Layout):
    """One torch tensor holds the rows of several Flax tensors: one after another, or head by head.

    Attributes:
        sizes: The number of rows of each part.
        heads: The number of heads, if the rows come head by head: the first head of each part, then the second, ...
        columns: Whether the parts are columns of the matrix. They are given as rows.
    """

    sizes: tuple[int, ...]
    heads: int = 1
    columns: bool = False
    is_view = False

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The parts; views, unless the rows come head by head."""
        (tensor,) = tensors
        rows = tensor.movedim(-1, 0) if self.columns else tensor
        if rows.shape[0] != sum(self.sizes) or any(size % self.heads for size in self.sizes):
            raise ValueError(f"{tuple(tensor.shape)} does not hold {self.sizes} rows of {self.heads} heads")
        turns = rows.reshape(self.heads, -1, *rows.shape[1:])
        parts = turns.split([size // self.heads for size in self.sizes], dim=1)
        return tuple(part.reshape(-1, *rows.shape[1:]) for part in parts)

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The parts in one tensor."""
        turns = [part.reshape(self.heads, -1, *part.shape[1:]) for part in tensors]
        rows = torch.cat(turns, dim=1).reshape(-1, *tensors[0].shape[1:])
        return (rows.movedim(0, -1) if self.columns else rows,)

    def __str__(self) -> str:
        turns = f" in {self.heads} turns" if self.heads > 1 else ""
        return f"{'columns' if self.columns else 'rows'} {' + '.join(map(str, self.sizes))}{turns}"


@dataclass(frozen=True)
class Sum(Layout):
    """Two torch tensors of one shape are a single Flax tensor, their sum (the two biases of a recurrence).

    A sum does not keep its terms. The way back returns the previous terms if their sum is still the same to the
    bit. Otherwise it returns the whole sum as the first term and zero as the second.
    """

    is_view = False
    lossless = False

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The sum."""
        first, second = tensors
        if first.shape != second.shape:
            raise ValueError(f"{tuple(first.shape)} and {tuple(second.shape)} have no sum")
        return (first + second,)

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The terms."""
        (total,) = tensors
        if was is not None and not total.is_meta:
            first, second = (term.to(total.device) for term in was)
            if same_bits(first + second, total):
                return first, second
        return total, torch.zeros_like(total)

    def __str__(self) -> str:
        return "sum of two (lossy)"


@dataclass(frozen=True)
class Constant(Layout):
    """A Flax tensor that no torch tensor holds, filled with one value.

    In a rule, ``Entry((), "key.bias", Constant(0.0))`` is a bias that the torch layer does not have. Its value
    matters, so the way back refuses any other value. Use ``fixed=False`` if the Flax layer never reads it.

    Attributes:
        value: The value of every element.
        shape: None for that of the leaf.
        dtype: None for that of the layer's first floating-point tensor.
        fixed: Whether another value is refused on the way back.
    """

    value: float
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    fixed: bool = True
    is_view = False
    is_linear = False

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The filled tensor."""
        if self.shape is None:
            raise ValueError("its shape is not known")
        return (torch.full(self.shape, self.value, dtype=self.dtype),)

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Nothing: torch has no such tensor."""
        (tensor,) = tensors
        if self.fixed and not tensor.is_meta and not bool((tensor == self.value).all()):
            raise ValueError(f"torch has no place for it, and it is no longer {self.value:g} everywhere")
        return ()

    def __str__(self) -> str:
        return f"filled with {self.value:g}"
