"""Layouts of several layers in one: the rows of a matrix that are those of several, as of queries, keys and values.

What a `Layout` is, ``_layout`` says. Which layers are one, and in which order, is for the caller to say (`Fused`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._layout import Layout

__all__ = ["Inverse", "Parallel", "Rows"]


@dataclass(frozen=True)
class Rows(Layout):
    """One tensor holds the rows of several: one after another, or head by head.

    Attributes:
        sizes: How many rows each has.
        heads: In so many turns: ``heads`` times the rows of one head of the first, of the second, and so on.
        columns: They are the columns of a matrix, which are then given as rows.
    """

    sizes: tuple[int, ...]
    heads: int = 1
    columns: bool = False
    is_view = False

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors of the parts; views, where the rows are one after another."""
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
class Parallel(Layout):
    """A layout for each tensor of the group, which gives one tensor."""

    layouts: tuple[Layout, ...]

    @property
    def is_view(self) -> bool:  # type: ignore[override]
        """Whether all are views."""
        return all(layout.is_view for layout in self.layouts)

    @property
    def is_linear(self) -> bool:  # type: ignore[override]
        """Whether all are linear."""
        return all(layout.is_linear for layout in self.layouts)

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        """Whether all are lossless."""
        return all(layout.lossless for layout in self.layouts)

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each by its own."""
        pairs = zip(self.layouts, tensors, strict=True)
        return tuple(out for layout, tensor in pairs for out in layout.forward((tensor,)))

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Each back by its own."""
        before = [None] * len(tensors) if was is None else [(tensor,) for tensor in was]
        triples = zip(self.layouts, tensors, before, strict=True)
        return tuple(out for layout, tensor, old in triples for out in layout.inverse((tensor,), old))

    def __str__(self) -> str:
        return " | ".join(map(str, self.layouts))


@dataclass(frozen=True)
class Inverse(Layout):
    """A lossless layout the other way round."""

    layout: Layout

    @property
    def is_view(self) -> bool:  # type: ignore[override]
        """As the layout."""
        return self.layout.is_view

    @property
    def is_linear(self) -> bool:  # type: ignore[override]
        """As the layout."""
        return self.layout.is_linear

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Back."""
        return self.layout.inverse(tensors)

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Forward."""
        return self.layout.forward(tensors)

    def __str__(self) -> str:
        return f"joined {self.layout}"
