"""Views: tensors that are parts of others, or others in another shape, in the same memory.

A recording has values and no memory. So a write to a view is a value of the whole too, and a view that is read
after the whole was written to is made anew. Knows how a view is made of its whole, and the whole of its view.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._frames import Node, Value, tensors_of
from ._functions import short_name
from ._numbers import Dim, SizeOf

__all__ = ["View", "same_memory", "views_of"]

_RESHAPES = frozenset(
    {"flatten", "ravel", "reshape", "reshape_as", "squeeze", "unflatten", "unsqueeze", "view", "view_as"}
)
_PERMUTATIONS = frozenset(
    {"T", "mT", "movedim", "moveaxis", "permute", "swapaxes", "swapdims", "t", "transpose"}
)
# Parts along one axis, with the place of that axis among the arguments.
_PARTS = {"__iter__": 0, "chunk": 2, "narrow": 1, "select": 1, "split": 2, "tensor_split": 2, "unbind": 1}
_SIZES = (2, 3, 5, 7, 11, 13, 17, 19)  # by which a permutation shows where each axis went


@dataclass(frozen=True, eq=False)
class View:
    """How a view is made of a whole.

    Attributes:
        whole: The tensor that it is a view of.
        made: The call that made it.
        index: Of a part, its index, with values in place of tensors.
        given: The index as the author wrote it.
        axes: Of a permutation, the axis of the whole that each axis of the view is.
    """

    whole: torch.Tensor
    made: Node
    index: Any = None
    given: Any = None
    axes: tuple[int, ...] | None = None

    def read(self, whole: Value) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """The call that makes the view of the whole again."""
        if self.index is not None:
            return "torch.Tensor.__getitem__", (whole, self.index), {}
        return self.made.function, (whole, *self.made.args[1:]), self.made.kwargs

    def written(self, whole: Value, view: Value) -> tuple[str, tuple[Any, ...]]:
        """The call that makes the whole, of what it was and of a view that was written to."""
        if self.index is not None:
            return "torch.Tensor.__setitem__", (whole, self.index, view)
        if self.axes is not None:
            return "torch.Tensor.permute", (view, *map(self.axes.index, range(len(self.axes))))
        sizes = (Dim(size, SizeOf(whole, axis)) for axis, size in enumerate(whole.shape))
        return "torch.Tensor.reshape", (view, *sizes)


def views_of(
    node: Node, func: Callable[..., Any], args: Sequence[Any], output: Any
) -> list[tuple[int, View]]:
    """The views that a call made, by the identity of the tensor; none that could not be written through.

    Args:
        node: The call.
        func: Its function.
        args: What it was given.
        output: What it returned.
    """
    whole = args[0] if args and isinstance(args[0], torch.Tensor) else None
    made = [tensor for tensor in tensors_of(output, torch.Tensor) if tensor._is_view()]
    if whole is None or not made:
        return []
    if not all(same_memory(tensor, whole) and tensor.dtype == whole.dtype for tensor in made):
        return []
    name = short_name(node.function)
    if name == "__getitem__":
        return [(id(made[0]), View(whole, node, node.args[1], args[1]))]
    if name in _RESHAPES:
        return [(id(made[0]), View(whole, node))]
    if name in _PERMUTATIONS and whole.dim() <= len(_SIZES):
        sizes = _SIZES[: whole.dim()]
        moved = func(torch.empty(sizes, device="meta"), *args[1:], **node.kwargs)
        return [(id(made[0]), View(whole, node, axes=tuple(map(sizes.index, moved.shape))))]
    if name in _PARTS and not any(tensors_of((node.args[1:], node.kwargs))):
        indices = _indices(name, node, made, whole)
        return [(id(part), View(whole, node, index)) for part, index in zip(made, indices, strict=True)]
    return []


def _indices(
    name: str, node: Node, parts: Sequence[torch.Tensor], whole: torch.Tensor
) -> Iterator[tuple[Any, ...]]:
    """The index of each part of a tensor along one axis, in order."""
    place, rank = _PARTS[name], whole.dim()
    dim = node.kwargs.get("dim", node.args[place] if 0 < place < len(node.args) else 0) % rank
    before = (slice(None),) * dim
    if name in ("select", "narrow"):
        given = node.kwargs.get("index" if name == "select" else "start", (*node.args, 0, 0)[2])
        first = int(given) % whole.shape[dim]
        yield (*before, first if name == "select" else slice(first, first + parts[0].shape[dim]))
        return
    start = 0
    for number, part in enumerate(parts):
        if part.dim() < rank:
            yield (*before, number)
        else:
            yield (*before, slice(start, start + part.shape[dim]))
            start += part.shape[dim]


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are views of the same tensor, or one is a view of the other."""
    return _base(one) is _base(other)


def _base(tensor: torch.Tensor) -> torch.Tensor:
    base = tensor._base if tensor._is_view() else None
    return tensor if base is None else base
