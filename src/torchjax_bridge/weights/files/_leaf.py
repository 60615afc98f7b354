"""What a checkpoint is to this library: leaves by name, each with its specification and a way to its values.

A `Leaf` says dtype and shape at once and reads its values only when asked, so that a conversion is a map from
leaves to leaves that holds one tensor at a time. Reads nothing itself: the formats make leaves.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import Path, split_path

__all__ = [
    "DEEPEST",
    "Checkpoint",
    "Format",
    "Framework",
    "Leaf",
    "Progress",
    "nest",
    "place_of",
    "put_at",
    "segments",
    "size_of",
]

Framework = Literal["torch", "flax"]
Format = Literal["safetensors", "pt", "msgpack", "orbax"]

Progress = Callable[[int], None]
"""Called with the bytes of each leaf that was written."""

DEEPEST = 128
"""Segments of a path, more than any model has: trees are walked by recursion."""


@dataclass(frozen=True)
class Leaf:
    """One tensor of a checkpoint.

    Attributes:
        name: Its dotted name in the file.
        path: The segments of the name; integers are positions.
        dtype: As in the file.
        shape: As in the file.
        read: Gives the values, as a tensor of any strides; often a view of the file's memory map.
        shard: The file of a sharded checkpoint that holds it.
        twin: The name of an earlier leaf that is the very same tensor, or empty.
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    shard: str = ""
    twin: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return size_of(self.dtype, self.shape)

    @property
    def meta(self) -> torch.Tensor:
        """The same dtype and shape without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Checkpoint:
    """What was found under a path, with no values read yet.

    Attributes:
        path: The file or folder.
        format: How it is written.
        leaves: By name, in the order of the files.
        framework: Whose names these are, where the format or its metadata says so.
        metadata: Notes that the file carries.
        shards: The names of its files, when it is sharded.
        note: What was looked through, for a reader.
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


def place_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """What two tensors on one device have in common when they are the very same values."""
    return (
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),  # a view with the same memory and other values
        tensor.is_neg(),
    )


def segments(name: str, where: object) -> Path:
    """The path that a name in a file spells out.

    Raises:
        CheckpointError: It is nested deeper than `DEEPEST`.
    """
    path = split_path(name) or (name,)
    if len(path) > DEEPEST:
        raise CheckpointError(f"{where}: '{name[:40]}...' is nested {len(path)} deep, more than {DEEPEST}.")
    return path


def nest(flat: Mapping[Path, Any], where: object) -> dict[Any, Any]:
    """Nested dicts from values by path; the keys of one dict are all integers or all strings, so that they sort.

    Raises:
        CheckpointError: A path is empty, or the beginning of another.
    """
    tree: dict[Any, Any] = {}
    inner = {path[:depth] for path in flat for depth in range(len(path))}
    for path, value in flat.items():
        if not path or path in inner:
            name = ".".join(map(str, path))
            raise CheckpointError(f"{where}: '{name}' is a tensor and also the name of a group of tensors.")
        put_at(tree, path, value)
    return _of_one_kind(tree)


def put_at(tree: dict[Any, Any], path: Path, value: Any) -> None:
    """Put a value into nested dicts; those that are not there yet are made."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _of_one_kind(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    mixed = len({type(name) for name in tree}) > 1
    return {str(name) if mixed else name: _of_one_kind(child) for name, child in tree.items()}
