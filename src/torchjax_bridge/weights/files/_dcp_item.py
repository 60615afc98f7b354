"""Where the values of a tensor lie in a stored item of DCP: a small archive of ``torch.save`` inside a larger file.

The archive holds a pickle with the strides of the tensor, which is read as data, and the raw values.
"""

import io
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import torch

from torchjax_bridge.errors import CheckpointError

from ._dcp_metadata import Chunk
from ._inert_pickle import Record, read_pickle
from ._leaf import size_of
from ._mapped import MappedFile

__all__ = ["Item", "find_item"]

_ZIP_ERRORS = (OSError, ValueError, LookupError, RuntimeError, struct.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class Item:
    """The values: they begin at ``begin`` in the file.

    Attributes:
        begin: In bytes, on any boundary.
        strides: In elements; a tensor that was saved transposed is stored so.
        conjugate: Whether the stored values are the conjugates of the tensor's.
        negative: Whether they are its negatives.
    """

    begin: int
    strides: tuple[int, ...]
    conjugate: bool = False
    negative: bool = False


class _Rebuilt(Record): ...


def find_item(file: MappedFile, chunk: Chunk, dtype: torch.dtype, name: str) -> Item:
    """Find the values of a chunk.

    Raises:
        CheckpointError: The bytes are damaged, or are not those of a plain tensor of the chunk's shape and dtype.
    """
    where = f"{file.path}: the chunk of '{name}' at byte {chunk.offset}"
    section = io.BufferedReader(_Section(file, chunk.offset, chunk.length))
    try:
        with zipfile.ZipFile(section) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            pickled, order = archive.read(records["data.pkl"]), b"little"
            if "byteorder" in records:
                order = archive.read(records["byteorder"])
            values = records["data/0"]
        header = file.slice(chunk.offset + values.header_offset, 30)
        begin = values.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    except _ZIP_ERRORS as err:
        raise CheckpointError(
            f"{where} is damaged or not written by torch.save, DCP's default format."
        ) from err
    sizes = tuple(part.stop - part.start for part in chunk.box)
    if order != b"little":
        raise CheckpointError(f"{where} is of a machine with another byte order.")
    stored = size_of(dtype, sizes)
    if values.file_size != stored or values.compress_size != stored or begin + stored > chunk.length:
        raise CheckpointError(f"{where} holds {values.file_size} bytes, and {dtype} {sizes} needs {stored}.")
    offset, size, strides, flags = _read_strides(pickled, dtype, where)
    last = sum((count - 1) * step for count, step in zip(sizes, strides, strict=True))
    if offset or size != sizes or last >= chunk.count:
        raise CheckpointError(f"{where} holds a view with strides {strides} of {size}, and not {sizes}.")
    return Item(chunk.offset + begin, strides, bool(flags.get("conj")), bool(flags.get("neg")))


def _read_strides(
    pickled: bytes, dtype: torch.dtype, where: str
) -> tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """The offset, sizes and strides of a pickled tensor, and its conj and neg bits."""

    def stand_in(module: str, name: str) -> Any | None:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _Rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        found = getattr(torch, name, None) if module in ("torch", "torch.storage") else None
        if isinstance(found, torch.dtype):
            return found
        return name if name.endswith("Storage") and module in ("torch", "torch.storage") else None

    try:
        found = read_pickle(pickled, stand_in, "a stored tensor", lambda pid: pid)
    except CheckpointError as err:
        raise CheckpointError(f"{where}: {err}") from err
    args = found.args if isinstance(found, _Rebuilt) else ()
    if len(args) < 6 or not all(
        isinstance(part, tuple) and all(type(size) is int and size >= 0 for size in part)
        for part in args[2:4]
    ):
        raise CheckpointError(f"{where} is not a plain tensor.")
    kind = args[0][1] if isinstance(args[0], tuple) and len(args[0]) > 1 else None
    given = next((value for value in args[6:] if isinstance(value, torch.dtype)), _STORAGES.get(str(kind)))
    if given != dtype or len(args[2]) != len(args[3]):
        raise CheckpointError(f"{where} holds {given}, and the metadata says {dtype}.")
    flags = next((value for value in args[6:] if isinstance(value, dict)), {})
    return args[1], args[2], args[3], flags


_STORAGES = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class _Section(io.RawIOBase):
    """A section of a file, as a file."""

    def __init__(self, file: MappedFile, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; a position before the start is refused."""
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise ValueError("a position before the start")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        """Read up to the end of the section."""
        data = self._file.slice(self._begin + self._at, max(min(len(buffer), self._length - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
