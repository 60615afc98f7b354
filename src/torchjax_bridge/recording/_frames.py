"""What a recording is made of: values, the calls that made them, and a frame for each call of a module.

Plain data. Knows neither how it was recorded nor what is made of it.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import nn

from ._source import SourceLine

__all__ = [
    "Constant",
    "Frame",
    "Node",
    "Parameter",
    "Value",
    "fields_of",
    "holds_tensors",
    "map_tensors",
    "replaced",
    "tensors_of",
]


@dataclass(frozen=True, eq=False)
class Parameter:
    """The origin of a value that is a parameter or a buffer of a module."""

    owner: nn.Module
    name: str
    path: str
    tensor: torch.Tensor

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer."""
        return self.name in self.owner._buffers

    @property
    def is_saved(self) -> bool:
        """Whether ``state_dict`` holds it: a buffer with ``persistent=False`` is not saved."""
        return self.name not in self.owner._non_persistent_buffers_set


@dataclass(frozen=True, eq=False)
class Constant:
    """The origin of a value that no module owns and no recorded call made; None if it is another frame's."""

    tensor: torch.Tensor | None


@dataclass(eq=False, repr=False)
class Value:
    """A tensor at one moment: after an in-place operation the tensor is another value.

    Attributes:
        shape: In torch's order of axes.
        dtype: None for a number that a module returned.
        frame: The frame in which it is known.
        origin: The call that made it, the parameter or constant that it is, or None for an input of the frame.
        name: The author's name for an input or a parameter.
        uses: How many calls of the frame read it.
        varies: Whether it depends on the inputs or parameters of the model, and not on constants and sizes alone.
        constant: Whether it was made where torch keeps no gradients (``torch.no_grad()``).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    frame: "Frame"
    origin: "Node | Parameter | Constant | None" = None
    name: str = ""
    uses: int = 0
    varies: bool = True
    constant: bool = False

    def __repr__(self) -> str:
        return f"Value({self.shape}, {self.dtype})"


@dataclass(eq=False, repr=False)
class Node:
    """One call.

    Attributes:
        args: The arguments, with `Value`s in place of tensors.
        kwargs: The keyword arguments, likewise.
        source: The author's line.
        result: What it returned, likewise.
        function: The public name of the torch function (``"torch.nn.functional.relu"``), or ``""`` for a module.
        module: The module that was called, or None.
        path: Its path from the root.
        named: Of a frame: the arguments by the names of ``forward``, in the order of the frame's inputs.
        frame: What was recorded inside it; None for a leaf: a layer of torch's own whose inside is known.
        inplace: Whether the function wrote to an argument.
        told: Whether ``forward`` had been told values of tensors before.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: SourceLine
    result: Any = None
    function: str = ""
    module: nn.Module | None = None
    path: str = ""
    named: list[tuple[str, Any]] = field(default_factory=list)
    frame: "Frame | None" = None
    inplace: bool = False
    told: bool = False


@dataclass(eq=False, repr=False)
class Frame:
    """One call of a module.

    Attributes:
        module: The module.
        path: Its path from the root of the model.
        parent: The frame that called it.
        inputs: The arguments by the names of ``forward``, with `Value`s in place of tensors.
        nodes: The calls, in order.
        result: What it returned, with `Value`s in place of tensors.
        code: The code of ``forward``.
        kept: What it returns only because a module outside reads it, each with what it is there.
        told: Whether ``forward`` was told values of tensors: it asked, or was given or handed back numbers by one
            that did.
    """

    module: nn.Module
    path: str
    parent: "Frame | None" = None
    inputs: list[tuple[str, Any]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    result: Any = None
    code: CodeType | None = None
    kept: dict[Value, Value] = field(default_factory=dict)
    told: bool = False

    @property
    def end(self) -> SourceLine:
        """The author's last line that called something; where none did, the first line of ``forward``."""
        if self.nodes:
            return self.nodes[-1].source
        code = self.code
        return SourceLine() if code is None else SourceLine(code.co_filename, code.co_firstlineno, code)

    def walk(self) -> "Iterator[Frame]":
        """The frame, and those of the calls in it."""
        yield self
        for node in self.nodes:
            if node.frame is not None:
                yield from node.frame.walk()


def map_tensors(tree: Any, change: Callable[[torch.Tensor], Any], *, same_kind: bool = False) -> Any:
    """The arguments or results of a call, with each tensor replaced.

    Containers are those that torch code passes: tuples, named tuples, lists, mappings, slices, dataclasses that
    hold tensors. A mapping becomes a dict, a scalar of NumPy a number. Anything else stays.

    Args:
        tree: The arguments or results.
        change: What gives the new leaf.
        same_kind: Whether a dataclass stays one; otherwise it becomes a dict of its fields. Scalars stay, too.
    """
    if holds_tensors(tree):
        items = {
            name: map_tensors(item, change, same_kind=same_kind) for name, item in fields_of(tree).items()
        }
        return _rebuilt(tree, items) if same_kind else items
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, tuple):
        parts = [map_tensors(item, change, same_kind=same_kind) for item in tree]
        return type(tree)._make(parts) if hasattr(tree, "_make") else tuple(parts)
    if isinstance(tree, list):
        return [map_tensors(item, change, same_kind=same_kind) for item in tree]
    if isinstance(tree, Mapping):
        return {key: map_tensors(item, change, same_kind=same_kind) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(map_tensors(end, change) for end in (tree.start, tree.stop, tree.step)))
    if isinstance(tree, np.generic) and not same_kind:
        return tree.item()
    return tree


def replaced(tree: Any, new: Mapping[int, Any]) -> Any:
    """A tree with the numbers of these identities replaced; what holds none of them is the same object."""
    if not new or id(tree) in new:
        return new.get(id(tree), tree)
    if isinstance(tree, torch.Size):
        sizes = [replaced(item, new) for item in tree]
        return torch.Size(sizes) if all(isinstance(item, int) for item in sizes) else tuple(sizes)
    if isinstance(tree, tuple) or type(tree) is list:
        parts = [replaced(item, new) for item in tree]
        return tree._make(parts) if hasattr(tree, "_make") else type(tree)(parts)
    if not isinstance(tree, MutableMapping) and not holds_tensors(tree):
        return tree
    items = fields_of(tree)
    changed = {key: replaced(item, new) for key, item in items.items()}
    if all(changed[key] is item for key, item in items.items()):
        return tree
    if not isinstance(tree, MutableMapping):
        return _rebuilt(tree, changed)
    made = copy.copy(tree)
    for key, item in changed.items():
        made[key] = item
    return made


def tensors_of(tree: Any, kind: type | tuple[type, ...] = Value) -> Iterator[Any]:
    """The values of a tree, in order; the containers are those of `map_tensors`."""
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from tensors_of(item, kind)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors_of(item, kind)
    elif isinstance(tree, slice):
        yield from tensors_of((tree.start, tree.stop, tree.step), kind)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type | Value):
        yield from tensors_of(fields_of(tree), kind)


def fields_of(tree: Any) -> dict[str, Any]:
    """The fields of a dataclass, or the items of a mapping."""
    if isinstance(tree, Mapping):
        return dict(tree)
    return {
        field.name: getattr(tree, field.name)
        for field in dataclasses.fields(tree)
        if hasattr(tree, field.name)
    }


def holds_tensors(tree: Any) -> bool:
    """Whether it is a dataclass that does; a mapping that is one, too, is a mapping."""
    if isinstance(tree, type | Mapping | Value) or not dataclasses.is_dataclass(tree):
        return False
    return any(True for _ in tensors_of(fields_of(tree), torch.Tensor))


def _rebuilt(tree: Any, items: Mapping[str, Any]) -> Any:
    made = copy.copy(tree)
    for name, item in items.items():
        object.__setattr__(made, name, item)
    return made
