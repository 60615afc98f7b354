"""The header of a safetensors file: parsed with every check, and written so that tensors can be shared.

The format: 8 bytes with the length of the header, little-endian; the header, a JSON object from names to
``{"dtype", "shape", "data_offsets"}`` and ``__metadata__``; the data without holes. See
https://github.com/huggingface/safetensors#format. Ours is padded so that the data begins on a 64-byte boundary,
which XLA's CPU client needs to share a mapped tensor.
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

__all__ = ["CODES", "Entry", "build_header", "in_order", "parse_json", "read_header"]

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
_LONGEST = 100_000_000  # the reference reader's own limit on the header


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: ``[begin, end)`` counts from the start of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: MappedFile) -> tuple[list[Entry], dict[str, str], int]:
    """The entries in the order of their data, the metadata, and where the data begins.

    Raises:
        CheckpointError: Anything at all is not as the format says.
    """
    length = int.from_bytes(file.start(8), "little")
    if file.size < 8 or length > file.size - 8:
        raise CheckpointError(
            f"{file.path}: it is truncated or no safetensors file: {file.size} bytes, of which the header should "
            f"take {length if file.size >= 8 else 'at least 8'}."
        )
    if length > _LONGEST:
        raise CheckpointError(f"{file.path}: a header of {length} bytes is longer than the format allows.")
    header = parse_json(file.slice(8, length), f"{file.path}: the header")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise CheckpointError(f"{file.path}: '__metadata__' is not a map from strings to strings.")
    entries = [_entry(name, spec, file.path) for name, spec in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_cover(entries, file.size - 8 - length, file.path)
    return entries, notes, 8 + length


def build_header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
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
    if len(text) > _LONGEST:
        raise CheckpointError(
            f"a header of {len(text)} bytes is longer than safetensors allows: use more shards."
        )
    return len(text).to_bytes(8, "little") + text


def in_order(nbytes: int, dtype: torch.dtype) -> tuple[bool, int]:
    """Sorts tensors so that what can start on a 64-byte boundary does, and every other on its element size."""
    return nbytes % _ALIGNMENT != 0, -dtype.itemsize


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object in which no key comes twice.

    Raises:
        CheckpointError: It is anything else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        for name in found:
            name.encode()  # an escaped lone surrogate is no text, and could not be written again
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice!r} comes twice")
        return found

    try:
        value = json.loads(raw.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as err:  # not UTF-8, not JSON, a number of too many digits, too deep
        raise CheckpointError(f"{where} is damaged: {_first_line(err)}.") from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is damaged: it is a JSON {type(value).__name__}, not an object.")
    return value


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]


def _entry(name: str, spec: Any, path: pathlib.Path) -> Entry:
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
        raise CheckpointError(f"{path}: {name!r} has the dtype {code!r}, which torch has not.")
    entry = Entry(name, CODES[code], tuple(shape), *offsets)
    wanted = size_of(entry.dtype, entry.shape)
    if entry.end - entry.begin != wanted:
        raise CheckpointError(
            f"{path}: {name!r} of {code} {entry.shape} takes {wanted} bytes, but its offsets {offsets} hold "
            f"{entry.end - entry.begin}."
        )
    return entry


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    # No tensor has more bytes than a 64-bit address: torch itself would overflow beyond.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _check_cover(entries: list[Entry], size: int, path: pathlib.Path) -> None:
    place, last = 0, "the header"
    for entry in entries:
        if entry.begin != place:
            what = "overlaps" if entry.begin < place else "leaves a hole behind"
            raise CheckpointError(f"{path}: the data of {entry.name!r} {what} that of {last!r}.")
        place, last = entry.end, entry.name
    if place != size:
        what = "is truncated" if place > size else "has bytes that no tensor claims"
        raise CheckpointError(f"{path}: it {what}: the tensors take {place} bytes, and {size} are there.")
