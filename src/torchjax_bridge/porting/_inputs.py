"""Example inputs: another batch size, and how torch's inputs are given to the port.

The batch is the first axis of the first tensor, and of every tensor whose first axis is as long.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.exchange import to_jax
from torchjax_bridge.recording import Recording, Value, fields_of, map_tensors, record, tensors_of

from ._argument_trees import takes
from ._placed import Axes

_MORE_PIXELS = (32, 64)  # so that networks that halve images five times take them, and height is not width

__all__ = ["Example", "arguments_of", "as_arrays", "first_recorded"]


@dataclass(frozen=True)
class Example:
    """What a module is called with.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def batch(self) -> int | None:
        """The size of the first axis of the first tensor."""
        return next((tensor.shape[0] for tensor in self.tensors() if tensor.dim()), None)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors, in order."""
        return list(tensors_of((self.args, dict(self.kwargs)), torch.Tensor))

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Example":
        """The same with every tensor changed."""
        return Example(*map_tensors((self.args, dict(self.kwargs)), change, same_kind=True))

    def enlargements(self) -> "Iterator[Example]":
        """The same with larger images and longer sequences, in the ways that a module may take.

        Tokens ``(N, L)`` and features ``(N, L, C)`` get more than twice the length, else one more. Features may
        have their length last, ``(N, C, L)``.
        """
        known = [self._shapes]
        for way in ("double", "one more", "last axis"):
            larger = self.mapped(functools.partial(_enlarged, way=way))
            if larger._shapes not in known:
                known.append(larger._shapes)
                yield larger

    def other_values(self) -> "Iterator[Example]":
        """The same with one of its masks, or of its tensors of tokens, all one, or with half of it zero or one.

        None is all zero: what a mask hides as a whole is the same, whatever else is done to it.
        """
        draw = torch.Generator().manual_seed(0)
        for leaf in self.tensors():
            if leaf.is_floating_point() or leaf.is_complex() or leaf.is_meta:
                continue
            places = [torch.rand(leaf.shape, generator=draw) < 0.5 for _ in range(3)]
            ones = torch.ones_like(leaf)
            half_zero = (leaf.where(place, 0 * ones) for place in places[:2])
            for other in (ones, *half_zero, leaf.where(places[2], ones)):
                yield self.mapped(functools.partial(_in_place_of, leaf=leaf, other=other))

    @property
    def _shapes(self) -> list[torch.Size]:
        return [tensor.shape for tensor in self.tensors()]

    def with_batch(self, size: int) -> "Example":
        """The same with another batch size: examples are repeated in turn, or left out."""
        own = self.batch

        def resized(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.dim() or tensor.shape[0] != own or not own:
                return tensor
            return (
                tensor[torch.arange(size) % own]
                if not tensor.is_meta
                else tensor.new_empty(size, *tensor.shape[1:])
            )

        return self.mapped(resized)

    def stretched(self, axes: Collection[tuple[int, int]]) -> "Example":
        """The same with one more element along some axes, the first one again.

        Args:
            axes: The place of a tensor among all, and its axis.
        """
        places = {id(tensor): place for place, tensor in enumerate(self.tensors())}

        def stretch(tensor: torch.Tensor) -> torch.Tensor:
            place = places[id(tensor)]
            for axis in range(tensor.dim()):
                if (place, axis) in axes:
                    tensor = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
            return tensor

        return self.mapped(stretch)

    def axes_of(self, size: int | None) -> list[tuple[int, int]]:
        """The axes of this size, of whatever tensor."""
        shapes = enumerate(self._shapes)
        return [(place, axis) for place, shape in shapes for axis, own in enumerate(shape) if own == size]


def _in_place_of(tensor: torch.Tensor, leaf: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is leaf else tensor


def _enlarged(tensor: torch.Tensor, way: str) -> torch.Tensor:
    """A larger image or a longer sequence; any other tensor as it is."""
    if tensor.dim() == 4 and tensor.is_floating_point():
        if tensor.is_meta:
            return tensor.new_empty(
                *tensor.shape[:2], *map(sum, zip(tensor.shape[2:], _MORE_PIXELS, strict=True))
            )
        return torch.nn.functional.pad(tensor, (0, _MORE_PIXELS[1], 0, _MORE_PIXELS[0]), mode="replicate")
    is_sequence = tensor.dim() == (3 if tensor.is_floating_point() else 2)
    axis = 2 if way == "last axis" and tensor.dim() == 3 else 1
    if not is_sequence or not tensor.shape[axis]:
        return tensor
    size = tensor.shape[axis]
    places = torch.arange(size + 1 if way == "one more" else 2 * size + 1, device=tensor.device) % size
    return tensor.index_select(axis, places)


def first_recorded(
    module: nn.Module, candidates: Iterable[Example], *, whole: Collection[str], training: bool = False
) -> tuple[Example, Recording] | None:
    """The first of several inputs that a module takes, with its recording; None if it takes none of them."""
    for candidate in candidates:
        with contextlib.suppress(ArgumentError):
            return candidate, record(module, candidate.args, candidate.kwargs, training=training, whole=whole)
    return None


def as_arrays(inputs: list[tuple[str, Any]], given: list[Any], orders: Mapping[Value, Axes]) -> list[Any]:
    """The arguments of the port: torch's tensors as arrays, with the axes in the order of the port.

    Args:
        inputs: The recorded arguments by name.
        given: The values of these arguments.
        orders: The order of axes of each recorded tensor.
    """

    def convert(recorded: Any, tree: Any) -> Any:
        if isinstance(recorded, Value):
            tree = torch.zeros_like(tree, device="cpu") if tree.is_meta else tree
            return to_jax(tree.detach().permute(orders[recorded]).contiguous())
        if isinstance(recorded, tuple | list):
            return type(tree)(convert(a, b) for a, b in zip(recorded, tree, strict=True))
        if isinstance(recorded, Mapping):
            return {key: convert(item, fields_of(tree)[key]) for key, item in recorded.items()}
        return tree

    return [convert(recorded, tree) for (_, recorded), tree in zip(inputs, given, strict=True)]


def arguments_of(recording: Recording, orders: Mapping[Value, Axes], example: Example) -> list[Any]:
    """What the port is called with in the place of an example, positionally.

    Args:
        recording: The recording that was translated.
        orders: The order of axes of each recorded tensor.
        example: What torch is called with.
    """
    named = recording.arguments(example.args, example.kwargs)
    chosen = [(name, tree) for name, tree in recording.top.inputs if takes(tree)]
    return as_arrays(chosen, [named[name] for name, _ in chosen], orders)
