"""Layouts made of other layouts: one after another, on each tensor, over stacked layers, the other way round."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._layout import Identity, Layout

__all__ = ["Each", "Inverse", "Parallel", "Stack", "Then", "then"]


@dataclass(frozen=True)
class Then(Layout):
    """One layout after another."""

    first: Layout
    second: Layout

    @property
    def is_view(self) -> bool:  # type: ignore[override]
        """Whether both are views."""
        return self.first.is_view and self.second.is_view

    @property
    def is_linear(self) -> bool:  # type: ignore[override]
        """Whether both are linear."""
        return self.first.is_linear and self.second.is_linear

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        """Whether both are lossless."""
        return self.first.lossless and self.second.lossless

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """First, then second."""
        return self.second.forward(self.first.forward(tensors))

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Second back, then first back."""
        if was is not None and self.lossless:
            was = None
        halfway = None if was is None else self.first.forward(was)
        return self.first.inverse(self.second.inverse(tensors, halfway), was)

    def __str__(self) -> str:
        return f"{self.first}, {self.second}"


@dataclass(frozen=True)
class Each(Layout):
    """One layout, applied to each tensor of the group."""

    layout: Layout

    @property
    def is_view(self) -> bool:  # type: ignore[override]
        """As the layout."""
        return self.layout.is_view

    @property
    def is_linear(self) -> bool:  # type: ignore[override]
        """As the layout."""
        return self.layout.is_linear

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        """As the layout."""
        return self.layout.lossless

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each one forward."""
        return tuple(out for tensor in tensors for out in self.layout.forward((tensor,)))

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Each one back."""
        before = [None] * len(tensors) if was is None else [(tensor,) for tensor in was]
        return tuple(
            out
            for tensor, old in zip(tensors, before, strict=True)
            for out in self.layout.inverse((tensor,), old)
        )

    def __str__(self) -> str:
        return f"each {self.layout}"


@dataclass(frozen=True)
class Parallel(Layout):
    """One layout for each tensor of the group."""

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
class Stack(Layout):
    """``count`` equal torch layers are one Flax layer with a new first axis (a scan over layers).

    The torch tensors come layer by layer: all of layer 0's, then all of layer 1's, ...
    """

    count: int
    layout: Layout
    is_view = False

    @property
    def is_linear(self) -> bool:  # type: ignore[override]
        """As the layout."""
        return self.layout.is_linear

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        """As the layout."""
        return self.layout.lossless

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each layer's tensors forward, then stacked."""
        groups = [self.layout.forward(group) for group in self._groups(tensors)]
        return tuple(torch.stack(layers) for layers in zip(*groups, strict=True))

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Unstacked, and every layer's tensors back."""
        before = [None] * self.count if was is None else self._groups(was)
        layers = zip(*(tensor.unbind(0) for tensor in tensors), strict=True)
        return tuple(
            out for layer, old in zip(layers, before, strict=True) for out in self.layout.inverse(layer, old)
        )

    def _groups(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        size = len(tensors) // self.count  # zero if torch has no such tensor
        return [tensors[place * size : (place + 1) * size] for place in range(self.count)]

    def __str__(self) -> str:
        return f"stack of {self.count} ({self.layout})"


@dataclass(frozen=True)
class Inverse(Layout):
    """A lossless layout in the other direction."""

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


def then(*layouts: Layout) -> Layout:
    """The layouts one after another, without those that do nothing.

    >>> from torchjax_bridge.weights import Permute
    >>> str(then(Identity(), Permute((1, 0))))
    'permute(1, 0)'
    """
    steps = [layout for layout in layouts if not isinstance(layout, Identity)]
    if not steps:
        return Identity()
    result = steps[0]
    for step in steps[1:]:
        result = Then(result, step)
    return result
