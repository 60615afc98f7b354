"""Flax's msgpack files (``flax.serialization.to_bytes``), read from a memory map and written leaf by leaf.

An array is an extension of type 1: a packed triple of shape, dtype name and row-major bytes. Above 1 GiB it is a
dict of flat chunks (see ``flax/serialization.py``). The reader parses the file once for the offsets of the arrays
and needs neither the msgpack package nor memory for the values.
"""

import pathlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import torch

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import CheckpointError, DtypeError
from torchjax_bridge.exchange import Path, jax_dtype, join_path, torch_dtype

from ._leaf import Checkpoint, Leaf, nest, size_of
from ._mapped import MappedFile, Window
from ._pipeline import Pipeline

__all__ = ["read_msgpack", "write_msgpack"]

_CHUNKED = "__msgpack_chunked_array__"
_CHUNK_BYTES = 1 << 30
_MAX_DEPTH = 64


@dataclass(frozen=True)
class _ArraySpan:
    """An array in the file: its bytes are ``[begin, end)``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_msgpack(path: pathlib.Path, window: Window | None = None) -> Checkpoint:
    """The arrays of a Flax msgpack file.

    Raises:
        CheckpointError: It is truncated, or not a file of Flax.
    """
    file = MappedFile(path, window)
    if not file.size:
        raise CheckpointError(f"{path} is empty.")
    parser = _Parser(file.bytes().numpy().data, path)
    tree = parser.value(0)
    if parser.position != file.size:
        raise CheckpointError(f"{path}: {file.size - parser.position} bytes follow the msgpack value.")
    flat: dict[Path, list[_ArraySpan]] = {}
    shapes: dict[Path, tuple[int, ...]] = {}
    _flatten(tree, (), flat, shapes, path)
    del parser, tree
    leaves: dict[str, Leaf] = {}
    for where, parts in flat.items():
        name = join_path(where)
        if name in leaves:
            raise CheckpointError(f"{path}: two arrays are named '{name}'.")
        leaves[name] = Leaf(
            name, where, parts[0].dtype, shapes[where], partial(_read, file, parts, shapes[where])
        )
    if not leaves:
        raise CheckpointError(f"{path} holds no arrays.")
    return Checkpoint(path, "msgpack", leaves, "flax")


def write_msgpack(leaves: Sequence[Leaf], file: BinaryIO, pipeline: Pipeline) -> None:
    """Write the nested dict of the leaves' paths, as ``flax.serialization.msgpack_restore`` reads it."""
    tree = nest({leaf.path: leaf for leaf in leaves}, "cannot write msgpack")
    _write(tree, file, pipeline)


def _read(file: MappedFile, parts: Sequence[_ArraySpan], shape: tuple[int, ...]) -> torch.Tensor:
    tensors = [file.tensor(part.begin, part.end, part.dtype, part.shape) for part in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors).view(shape)


# --- reading -----------------------------------------------------------------------------------------


def _flatten(
    tree: Any,
    where: Path,
    flat: dict[Path, list[_ArraySpan]],
    shapes: dict[Path, tuple[int, ...]],
    path: pathlib.Path,
) -> None:
    if isinstance(tree, _ArraySpan):
        flat[where], shapes[where] = [tree], tree.shape
    elif isinstance(tree, dict) and _CHUNKED in tree:
        flat[where], shapes[where] = _join_chunks(tree, where, path)
    elif isinstance(tree, dict):
        for name, child in tree.items():
            _flatten(child, (*where, name), flat, shapes, path)
    elif isinstance(tree, list):
        for index, child in enumerate(tree):
            _flatten(child, (*where, index), flat, shapes, path)
    elif tree is not None:
        raise CheckpointError(f"{path}: '{join_path(where)}' is {what_kind(tree)}, not an array.")


def _join_chunks(tree: dict, where: Path, path: pathlib.Path) -> tuple[list[_ArraySpan], tuple[int, ...]]:
    sizes, chunks = tree.get("shape"), tree.get("chunks")
    fault = CheckpointError(f"{path}: the chunks of '{join_path(where)}' do not make one array.")
    if not isinstance(sizes, dict) or not isinstance(chunks, dict) or not chunks:
        raise fault
    parts = [part for index in range(len(chunks)) if isinstance(part := chunks.get(str(index)), _ArraySpan)]
    shape = tuple(
        size for axis in range(len(sizes)) if type(size := sizes.get(str(axis))) is int and size >= 0
    )
    if len(parts) < len(chunks) or len(shape) < len(sizes):
        raise fault
    if len({part.dtype for part in parts}) > 1 or any(len(part.shape) != 1 for part in parts):
        raise fault
    if sum(part.end - part.begin for part in parts) != size_of(parts[0].dtype, shape):
        raise fault
    return parts, shape


class _Parser:
    """Parses one msgpack value; `position` is the offset of the next byte."""

    def __init__(self, data: memoryview, path: pathlib.Path) -> None:
        self._data = data
        self._path = path
        self.position = 0

    def value(self, depth: int) -> Any:
        """The value at `position`, as a Python object; an array as its `_ArraySpan`."""
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"{self._path}: it is nested more than {_MAX_DEPTH} deep.")
        code = self._number("B")
        if code <= 0x7F:
            return code
        if code <= 0x8F:
            return self._map(code & 0x0F, depth)
        if code <= 0x9F:
            return self._list(code & 0x0F, depth)
        if code <= 0xBF:
            return self._text(code & 0x1F)
        if code >= 0xE0:
            return code - 0x100
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBER_FORMATS:
            return self._number(_NUMBER_FORMATS[code])
        if code in _SIZED:
            kind, width = _SIZED[code]
            count = self._number(width)
            if kind == "map":
                return self._map(count, depth)
            if kind == "list":
                return self._list(count, depth)
            if kind == "text":
                return self._text(count)
            if kind == "bytes":
                return bytes(self._data[self._advance(count) : self.position])
            return self._extension(count)
        if code in _FIXED_EXTENSIONS:
            return self._extension(_FIXED_EXTENSIONS[code])
        raise self._damaged(f"the byte {code:#x} begins no value")

    def _map(self, count: int, depth: int) -> dict[str | int, Any]:
        found: dict[str | int, Any] = {}
        for _ in range(count):
            name = self.value(depth + 1)
            if not isinstance(name, str) and type(name) is not int:
                raise self._damaged(f"an entry has {what_kind(name)} as its name")
            if name in found:
                raise self._damaged(f"the name {name!r} comes twice")
            found[name] = self.value(depth + 1)
        return found

    def _list(self, count: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in range(count)]

    def _text(self, count: int) -> str:
        try:
            return bytes(self._data[self._advance(count) : self.position]).decode()
        except UnicodeDecodeError as err:
            raise self._damaged("a name is not UTF-8") from err

    def _extension(self, count: int) -> _ArraySpan:
        kind = self._number("b")
        end = self.position + count
        if end > len(self._data):
            raise self._damaged("it is truncated")
        if kind not in (1, 3):
            raise self._damaged(f"an extension of type {kind} is not an array")
        array = self._array()
        if self.position != end:
            raise self._damaged("an array is longer than it says")
        return array

    def _array(self) -> _ArraySpan:
        if self._number("B") != 0x93:
            raise self._damaged("an array does not consist of shape, dtype and bytes")
        shape, name = self.value(_MAX_DEPTH - 1), self.value(_MAX_DEPTH - 1)
        if isinstance(name, bytes):
            name = name.decode(errors="replace")
        if not isinstance(name, str) or not isinstance(shape, list):
            raise self._damaged("an array has no shape or no dtype")
        if not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
            raise self._damaged(f"{shape} is not a shape")
        try:
            dtype = torch_dtype(name)
        except DtypeError as err:
            raise CheckpointError(
                f"{self._path}: an array has the dtype {name!r}, which torch does not have."
            ) from err
        code = self._number("B")
        width = {0xC4: "B", 0xC5: "H", 0xC6: "I"}.get(code)
        if width is None and not 0xA0 <= code <= 0xBF:
            raise self._damaged("an array has no bytes")
        count = code & 0x1F if width is None else self._number(width)
        begin = self._advance(count)
        if count != size_of(dtype, shape):
            raise self._damaged(
                f"an array of {name} {tuple(shape)} takes {size_of(dtype, shape)} bytes, not {count}"
            )
        return _ArraySpan(dtype, tuple(shape), begin, self.position)

    def _number(self, kind: str) -> Any:
        begin = self._advance(struct.calcsize(kind))
        return struct.unpack_from(f">{kind}", self._data, begin)[0]

    def _advance(self, count: int) -> int:
        begin, self.position = self.position, self.position + count
        if self.position > len(self._data):
            raise self._damaged("it is truncated")
        return begin

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: it is damaged or not a msgpack file of Flax: {why}.")


# From https://github.com/msgpack/msgpack/blob/master/spec.md
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBER_FORMATS = {
    0xCA: "f",
    0xCB: "d",
    0xCC: "B",
    0xCD: "H",
    0xCE: "I",
    0xCF: "Q",
    0xD0: "b",
    0xD1: "h",
    0xD2: "i",
    0xD3: "q",
}
_SIZED = {
    0xC4: ("bytes", "B"),
    0xC5: ("bytes", "H"),
    0xC6: ("bytes", "I"),
    0xC7: ("extension", "B"),
    0xC8: ("extension", "H"),
    0xC9: ("extension", "I"),
    0xD9: ("text", "B"),
    0xDA: ("text", "H"),
    0xDB: ("text", "I"),
    0xDC: ("list", "H"),
    0xDD: ("list", "I"),
    0xDE: ("map", "H"),
    0xDF: ("map", "I"),
}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


# --- writing -----------------------------------------------------------------------------------------


def _write(tree: Any, file: BinaryIO, pipeline: Pipeline) -> None:
    if isinstance(tree, Leaf):
        _write_leaf(tree, file, pipeline)
        return
    pipeline.write_bytes(_map_header(len(tree)), file)
    for name, child in tree.items():
        pipeline.write_bytes(_key(name), file)
        _write(child, file, pipeline)


def _write_leaf(leaf: Leaf, file: BinaryIO, pipeline: Pipeline) -> None:
    if leaf.nbytes <= _CHUNK_BYTES:
        pipeline.write_bytes(_array_header(leaf.dtype, leaf.shape), file)
        pipeline.write(leaf, file)
        return
    flat = leaf.read().contiguous().view(-1)
    step = _CHUNK_BYTES // leaf.dtype.itemsize
    starts = range(0, flat.numel(), step)
    sizes = b"".join(_key(str(axis)) + _int(size) for axis, size in enumerate(leaf.shape))
    head = _key(_CHUNKED) + b"\xc3" + _key("shape") + _map_header(len(leaf.shape)) + sizes + _key("chunks")
    pipeline.write_bytes(_map_header(3) + head + _map_header(len(starts)), file)
    for index, start in enumerate(starts):
        part = flat[start : start + step]
        chunk = Leaf(leaf.name, leaf.path, leaf.dtype, tuple(part.shape), lambda part=part: part)  # type: ignore[misc]
        pipeline.write_bytes(_key(str(index)) + _array_header(chunk.dtype, chunk.shape), file)
        pipeline.write(chunk, file)


def _array_header(dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    """Everything before the bytes of an array, which end the extension."""
    size = size_of(dtype, shape)
    name = jax_dtype(dtype).name.encode()
    count = len(shape)
    sizes = bytes([0x90 | count]) if count < 16 else b"\xdc" + struct.pack(">H", count)
    inner = b"\x93" + sizes + b"".join(map(_int, shape))
    inner += bytes([0xA0 | len(name)]) + name + b"\xc6" + struct.pack(">I", size)
    return b"\xc9" + struct.pack(">Ib", len(inner) + size, 1) + inner


def _map_header(count: int) -> bytes:
    return bytes([0x80 | count]) if count < 16 else b"\xdf" + struct.pack(">I", count)


def _key(name: str | int) -> bytes:
    if isinstance(name, int):
        return _int(name)
    text = name.encode()
    return (
        bytes([0xA0 | len(text)]) + text if len(text) < 32 else b"\xdb" + struct.pack(">I", len(text)) + text
    )


def _int(value: int) -> bytes:
    if 0 <= value < 0x80:
        return bytes([value])
    return b"\xcf" + struct.pack(">Q", value) if value >= 0 else b"\xd3" + struct.pack(">q", value)
