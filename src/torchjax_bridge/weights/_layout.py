"""A `Layout`: how a group of torch tensors lies in a group of Flax arrays, with its exact inverse.

A layout works on torch tensors alone, in both directions (an exported JAX array is a torch tensor), and
returns views wherever a view can say it; ``_fresh`` makes the one copy afterwards. So the same layout gives
the values, and, run on meta tensors, the shapes. Layouts are frozen values: two equal ones do the same.

Refuses nothing but shapes that do not fit, with a ``ValueError`` or torch's own ``RuntimeError``, which the
matching turns into words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Constant",
    "Each",
    "Flip",
    "Identity",
    "Layout",
    "Permute",
    "Reshape",
    "Split",
    "Stack",
    "Sum",
    "Then",
    "same_bits",
    "then",
]


@dataclass(frozen=True)
class Layout:
    """The interface: `forward` takes torch's tensors to Flax's, `inverse` takes them back.

    Attributes:
        is_view: No byte moves: both directions are strided views.
        is_linear: A linear map, so optimizer moments can take it too.
        lossless: ``inverse(forward(x))`` is ``x`` to the bit.
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
            was: The torch tensors that stood there before, if any. Only a layout that is not lossless
                looks at them: if they still map to exactly ``tensors``, they are returned unchanged.
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
class Sum(Layout):
    """Two torch tensors of one shape are a single Flax tensor, their sum (the two biases of a recurrence).

    A sum does not remember its terms. The way back returns the terms that stood there before when their
    sum is still the same to the bit, and else the whole sum as the first term and zero as the second.
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

    In a rule, ``Entry((), "key.bias", Constant(0.0))`` is a bias that the torch layer has not. The value
    matters there, so there is a way back only while it is still the same; with ``fixed=False`` the Flax layer never
    reads it.

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
    """One layout on every tensor of the group by itself."""

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
        """Every layer's tensors forward, then stacked."""
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
        size = len(tensors) // self.count  # none where torch has no such tensor
        return [tensors[place * size : (place + 1) * size] for place in range(self.count)]

    def __str__(self) -> str:
        return f"stack of {self.count} ({self.layout})"


def then(*layouts: Layout) -> Layout:
    """The layouts one after another, without the ones that do nothing.

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


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, on any devices, are the same in dtype, shape and every bit, NaNs included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one.to(other.device), other))
    return torch.equal(*bits)


def _expect(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"shape {tuple(tensor.shape)} is not {shape}")
    return tensor
