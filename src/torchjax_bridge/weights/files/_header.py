"""The header of a safetensors file: reads it with every check, and writes it so that tensors can be shared.

The format: 8 bytes with the length of the header, little-endian; the header, a JSON object from names to
``{"dtype", "shape", "data_offsets"}`` and ``__metadata__``; the data without gaps. See
https://github.com/huggingface/safetensors#format. Our headers are padded, so that the data begins on the 64-byte
boundary that XLA's CPU client needs to share a mapped tensor.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from torchjax_bridge.errors import CheckpointError

from ._leaf import size_of
from ._mapped import MappedFile

__all__ = ["CODES", "TensorEntry", "alignment_key", "build_header", "parse_json", "read_header"]

CODES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_CODE_OF = {dtype: code for code, dtype in CODES.items()}

_ALIGNMENT = 64
_MAX_HEADER_BYTES = 100_000_000  # the reference reader's own limit on the header


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: ``[begin, end)`` counts from the start of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: MappedFile) -> tuple[list[TensorEntry], dict[str, str], int]:
    """The entries in the order of their data, the metadata, and where the data begins.

    Raises:
        CheckpointError: The file deviates from the format in any way.
    """
    length = int.from_bytes(file.start(8), "little")
    if file.size < 8 or length > file.size - 8:
        raise CheckpointError(
            f"{file.path}: it is truncated or not a safetensors file: it has {file.size} bytes, but its header "
            f"needs {length if file.size >= 8 else 'at least 8'}."
        )
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{file.path}: a header of {length} bytes is longer than the format allows.")
    header = parse_json(file.slice(8, length), f"{file.path}: the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file.path}: '__metadata__' is not a map from strings to strings.")
    entries = [_entry(name, spec, file.path) for name, spec in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_offsets(entries, file.size - 8 - length, file.path)
    return entries, metadata, 8 + length


def build_header(entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: length, JSON and the spaces up to the next 64-byte boundary."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        code = _CODE_OF.get(entry.dtype)
        if code is None:
            raise CheckpointError(
                f"cannot write '{entry.name}' as safetensors: the format has no {entry.dtype}. Cast it first."
            )
        header[entry.name] = {
            "dtype": code,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"a header of {len(text)} bytes is longer than safetensors allows: use more shards."
        )
    return len(text).to_bytes(8, "little") + text


def alignment_key(nbytes: int, dtype: torch.dtype) -> tuple[bool, int]:
    """Sort key: tensors that fill whole 64-byte blocks first, then by element size, so that all are aligned."""
    return nbytes % _ALIGNMENT != 0, -dtype.itemsize


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object without repeated keys.

    Raises:
        CheckpointError: It is anything else.
    """

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        for name in found:
            name.encode()  # an escaped lone surrogate is not text and could not be written again
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice!r} comes twice")
        return found

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as err:  # not UTF-8, not JSON, too many digits, nested too deep
        raise CheckpointError(f"{where} is damaged: {_first_line(err)}.") from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is damaged: it is a JSON {type(value).__name__}, not an object.")
    return value


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]


def _entry(name: str, spec: Any, path: pathlib.Path) -> TensorEntry:
    shape, offsets, code = (
        (spec.get("shape"), spec.get("data_offsets"), spec.get("dtype"))
        if isinstance(spec, dict)
        else (None, None, None)
    )
    if (
        not _are_sizes(shape)
        or not _are_sizes(offsets)
        or len(offsets) != 2
        or not isinstance(code, str)
        or len(spec) != 3
    ):
        raise CheckpointError(f"{path}: the entry of {name!r} is not a dtype, a shape and two offsets.")
    if code not in CODES:
        raise CheckpointError(f"{path}: {name!r} has the dtype {code!r}, which torch does not have.")
    entry = TensorEntry(name, CODES[code], tuple(shape), *offsets)
    wanted = size_of(entry.dtype, entry.shape)
    if entry.end - entry.begin != wanted:
        raise CheckpointError(
            f"{path}: {name!r} of {code} {entry.shape} takes {wanted} bytes, but its offsets {offsets} hold "
            f"{entry.end - entry.begin}."
        )
    return entry


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    # Larger numbers would overflow in torch.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _check_offsets(entries: list[TensorEntry], size: int, path: pathlib.Path) -> None:
    """Refuse data with overlaps, gaps or another size."""
    end, last = 0, "the header"
    for entry in entries:
        if entry.begin != end:
            what = "overlaps" if entry.begin < end else "leaves a gap after"
            raise CheckpointError(f"{path}: the data of {entry.name!r} {what} that of {last!r}.")
        end, last = entry.end, entry.name
    if end != size:
        what = "is truncated" if end > size else "has bytes that belong to no tensor"
        raise CheckpointError(f"{path}: it {what}: the tensors take {end} bytes, but the data has {size}.")
