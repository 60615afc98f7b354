"""The ``.metadata`` of a checkpoint of torch Distributed Checkpoint (DCP): which file holds what of which tensor.

It is a pickle, which torch itself loads without any check. Here it is read by `read_pickle`, as data. Whatever is
not a tensor in the checkpoint (a step, a list of parameter groups) is listed by name.
"""

import math
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import Path

from ._boxes import Box
from ._inert_pickle import Record, read_pickle
from ._leaf import MAX_DEPTH

__all__ = ["METADATA", "Chunk", "DcpMetadata", "DcpTensor", "read_metadata"]

METADATA = ".metadata"
_MAX_BYTES = 1 << 30
_DAMAGE_ERRORS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: it is stored in ``length`` bytes at ``offset`` of a file."""

    box: Box
    file: str
    offset: int
    length: int

    @property
    def count(self) -> int:
        """The number of its elements."""
        return math.prod(part.stop - part.start for part in self.box)


@dataclass(frozen=True)
class DcpTensor:
    """A tensor and its parts; parts without elements are left out."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class DcpMetadata:
    """What the checkpoint holds.

    Attributes:
        tensors: By flat name.
        others: The names of what is not a tensor.
        paths: The path of a flat name in the nested dict that was saved.
    """

    tensors: Mapping[str, DcpTensor]
    others: tuple[str, ...]
    paths: Mapping[str, Path]


class _Metadata(Record): ...


class _Tensor(Record): ...


class _Bytes(Record): ...


class _Chunk(Record): ...


class _Index(Record): ...


class _Info(Record): ...


class _Ignored(Record): ...


_MODULE = "torch.distributed.checkpoint.metadata"
_OLD_MODULE = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.3
_NAMES: dict[tuple[str, str], Any] = {
    (_MODULE, "Metadata"): _Metadata,
    (_MODULE, "TensorStorageMetadata"): _Tensor,
    (_MODULE, "BytesStorageMetadata"): _Bytes,
    (_MODULE, "ChunkStorageMetadata"): _Chunk,
    (_MODULE, "MetadataIndex"): _Index,
    (_MODULE, "StorageMeta"): _Ignored,
    (_MODULE, "TensorProperties"): Record,
    (_MODULE, "_MEM_FORMAT_ENCODING"): _Ignored,
    (_OLD_MODULE, "TensorProperties"): Record,
    (_OLD_MODULE, "MEM_FORMAT_ENCODING"): _Ignored,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Info,
    ("torch.serialization", "_get_layout"): _Ignored,
    ("torch", "Size"): tuple,
    ("pathlib", "PosixPath"): _Ignored,
    ("pathlib", "WindowsPath"): _Ignored,
    ("pathlib._local", "PosixPath"): _Ignored,
    ("pathlib._local", "WindowsPath"): _Ignored,
    ("collections", "OrderedDict"): dict,
}


def _stand_in(module: str, name: str) -> Any | None:
    if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
        return dtype
    return _NAMES.get((module, name))


def read_metadata(folder: pathlib.Path) -> DcpMetadata:
    """Read the ``.metadata`` of a folder.

    Raises:
        CheckpointError: It is damaged, holds anything but metadata, or was written by an extension of DCP.
    """
    file = folder / METADATA
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{file} is too large for metadata.")
        raw = file.read_bytes()
    except OSError as err:
        raise CheckpointError(f"cannot read {file}: {err.strerror}.") from err
    try:
        content = read_pickle(raw, _stand_in, "DCP metadata")
        if not isinstance(content, _Metadata):
            raise CheckpointError("it is no DCP metadata.")
        return _understood(content)
    except CheckpointError as err:
        raise CheckpointError(f"{file}: {err}") from err
    except _DAMAGE_ERRORS as err:  # a part of another kind than DCP writes
        raise CheckpointError(f"{file}: it is damaged ({type(err).__name__}: {err!s:.80}).") from err


def _understood(content: Record) -> DcpMetadata:
    places: dict[tuple[str, tuple[int, ...] | None], Record] = {}
    for index, info in _items(content.field("storage_data")):
        if isinstance(index, _Index) and isinstance(info, _Info):
            offset = index.field("offset")
            places[index.field("fqn"), None if offset is None else _sizes(offset)] = info
    tensors, others = {}, []
    for name, entry in _items(content.field("state_dict_metadata")):
        if not isinstance(name, str):
            raise CheckpointError(f"the name {name!r:.50} is no text.")
        if isinstance(entry, _Tensor):
            tensors[name] = _tensor(name, entry, places)
        else:
            others.append(name)
    planned = content.field("planner_data")
    paths = {
        name: path for name, path in _items(planned if isinstance(planned, dict) else {}) if _is_path(path)
    }
    of = {name: paths.get(name, (name,)) for name in tensors}
    within = {path[:depth] for path in of.values() for depth in range(1, len(path))}
    if len(set(of.values())) < len(of) or within & set(of.values()):
        raise CheckpointError("two tensors have one place in the tree that was saved.")
    return DcpMetadata(tensors, tuple(others), of)


def _tensor(
    name: str, entry: Record, places: Mapping[tuple[str, tuple[int, ...] | None], Record]
) -> DcpTensor:
    properties, chunks = entry.field("properties"), entry.field("chunks")
    state = properties.state if isinstance(properties, Record) else None
    if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
        raise CheckpointError(f"'{name}' has no dtype.")
    shape = _sizes(entry.field("size"))
    if math.prod(shape) >= 1 << 60:
        raise CheckpointError(f"'{name}' has the shape {shape}, which no memory holds.")
    found = []
    for chunk in chunks if isinstance(chunks, list) else ():
        offsets, sizes = (_sizes(chunk.field(key)) for key in ("offsets", "sizes"))
        if not len(offsets) == len(sizes) == len(shape) or any(
            offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)
        ):
            raise CheckpointError(f"'{name}': a chunk of shape {sizes} at {offsets} lies outside of {shape}.")
        if not math.prod(sizes):
            continue
        info = places.get((name, offsets)) or places.get((name, None))
        if info is None:
            raise CheckpointError(f"'{name}': no file holds its chunk at {offsets}.")
        box = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        found.append(Chunk(box, *_place(name, info)))
    return DcpTensor(state[0], shape, tuple(found))


def _place(name: str, info: Record) -> tuple[str, int, int]:
    if transforms := info.field("transform_descriptors"):
        raise CheckpointError(
            f"'{name}' was written through an extension of DCP ({transforms!r:.80}): load it in torch and save it "
            "without."
        )
    file, offset, length = (info.field(key) for key in ("relative_path", "offset", "length"))
    plain = isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\\0:")
    if not plain or not all(type(size) is int and size >= 0 for size in (offset, length)):
        raise CheckpointError(f"'{name}' lies in {file!r:.80}, which is not a file beside the metadata.")
    return file, offset, length


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, dict):
        raise CheckpointError("it lacks a table of tensors or of files.")
    yield from value.items()


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(
        type(size) is int and 0 <= size < 1 << 63 for size in value
    ):
        raise CheckpointError(f"{value!r:.50} is no shape.")
    return tuple(value)


def _is_path(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and 0 < len(value) <= MAX_DEPTH
        and all(isinstance(part, str) or type(part) is int for part in value)
    )
