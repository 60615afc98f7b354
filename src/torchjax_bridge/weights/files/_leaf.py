"""A checkpoint of any format, as leaves by name: each has a dtype, a shape and a function that reads its values.

A conversion maps leaves to leaves without reading them, so that it holds one tensor at a time. The formats make the
leaves.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import Path, split_path

from ._boxes import Box, as_box

__all__ = [
    "MAX_DEPTH",
    "Checkpoint",
    "Format",
    "Framework",
    "Leaf",
    "Progress",
    "nest",
    "parse_path",
    "put_at",
    "size_of",
    "view_key",
]

Framework = Literal["torch", "flax"]
Format = Literal["safetensors", "pt", "msgpack", "orbax", "dcp"]

Progress = Callable[[int], None]
"""Called with the bytes of each leaf that was written."""

MAX_DEPTH = 128
"""The most segments of a path, more than any model has: recursive functions walk the trees."""


@dataclass(frozen=True)
class Leaf:
    """One tensor of a checkpoint.

    Attributes:
        name: Its dotted name in the file.
        path: The segments of the name; integers are positions.
        dtype: As in the file.
        shape: As in the file.
        read: Returns the values, as a tensor of any strides; often a view of the file's memory map.
        shard: The file of a sharded checkpoint that holds it.
        twin: The name of an earlier leaf that is the same tensor (a tied one), or empty.
        read_box: Returns the values of a box, where reading a part costs less than reading all; None where `read`
            gives a view.
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    shard: str = ""
    twin: str = ""
    read_box: Callable[[Box], torch.Tensor] | None = field(default=None, repr=False, compare=False)

    def slice(self, index: Sequence[slice]) -> torch.Tensor:
        """The values of a box, without reading the others where the format allows it.

        Args:
            index: A slice without a step for each axis.
        """
        box = as_box(index, self.shape)
        return self.read()[box] if self.read_box is None else self.read_box(box)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return size_of(self.dtype, self.shape)

    @property
    def meta(self) -> torch.Tensor:
        """A meta tensor of the same dtype and shape."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose values are not read yet.

    Attributes:
        path: The file or folder.
        format: Its format.
        leaves: By name, in the order of the files.
        framework: The framework of the names, if the format or the metadata shows it.
        metadata: The metadata of the file.
        shards: The names of its files, if it is sharded.
        note: Which wrappers around the leaves were ignored, for a reader.
    """

    path: pathlib.Path
    format: Format
    leaves: Mapping[str, Leaf]
    framework: Framework | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    shards: tuple[str, ...] = ()
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all values; a tensor under two names counts once."""
        return sum(leaf.nbytes for leaf in self.leaves.values() if not leaf.twin)


def size_of(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a row-major tensor."""
    return dtype.itemsize * math.prod(shape)


def view_key(tensor: torch.Tensor) -> tuple[object, ...]:
    """A key that is equal for two tensors on one device if they are the same view of the same memory."""
    return (
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),  # a view with other values of the same memory
        tensor.is_neg(),
    )


def parse_path(name: str, where: object) -> Path:
    """The path of a name in a file.

    Raises:
        CheckpointError: It is nested deeper than `MAX_DEPTH`.
    """
    path = split_path(name) or (name,)
    if len(path) > MAX_DEPTH:
        raise CheckpointError(f"{where}: '{name[:40]}...' is nested {len(path)} deep, more than {MAX_DEPTH}.")
    return path


def nest(flat: Mapping[Path, Any], where: object) -> dict[Any, Any]:
    """Nested dicts from values by path. The keys of one dict are all integers or all strings, so that they sort.

    Raises:
        CheckpointError: A path is empty, or the start of another.
    """
    tree: dict[Any, Any] = {}
    inner = {path[:depth] for path in flat for depth in range(len(path))}
    for path, value in flat.items():
        if not path or path in inner:
            name = ".".join(map(str, path))
            raise CheckpointError(f"{where}: '{name}' is a tensor and also the name of a group of tensors.")
        put_at(tree, path, value)
    return _uniform_keys(tree)


def put_at(tree: dict[Any, Any], path: Path, value: Any) -> None:
    """Put a value into nested dicts, which are created as needed."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _uniform_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    mixed = len({type(name) for name in tree}) > 1
    return {str(name) if mixed else name: _uniform_keys(child) for name, child in tree.items()}
