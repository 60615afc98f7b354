"""Writes a folder of torch Distributed Checkpoint (DCP), block by block; ``torch.distributed.checkpoint`` reads it.

A part of a job appends its blocks to a file of its own, each as ``torch.save`` writes it, and notes in a journal
where it lies. When all parts are there, torch's own writer makes ``.metadata`` of the journals.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from torchjax_bridge.errors import CheckpointError

from ._boxes import box_shape
from ._cut import Block
from ._dcp_metadata import METADATA
from ._leaf import Leaf, Progress
from ._torch_file import torch_save

__all__ = ["DcpParts"]

_WHOLE = "whole"


class DcpParts:
    """The parts of a DCP checkpoint in a folder.

    Args:
        leaves: All leaves.
        progress: Called with the bytes of each block.
    """

    def __init__(self, leaves: Sequence[Leaf], progress: Progress | None) -> None:
        self._leaves = leaves
        self._progress = progress

    def write(self, folder: pathlib.Path, part: int, blocks: Sequence[Block]) -> None:
        """Append the blocks of a part that are not stored yet; start anew if what is stored is damaged."""
        if self.damage(folder, part):
            self.discard(folder, part)
        data, journal = folder / _data(part), folder / _journal(part)
        places = _places(journal)
        with _open(data) as file, _open(journal) as notes:
            # What a killed process wrote last may be half of it.
            file.truncate(max((offset + length for *_, offset, length in places), default=0))
            notes.truncate(sum(len(_line(place)) for place in places))
            for stream in (file, notes):
                stream.seek(0, os.SEEK_END)
            done = _stored(places)
            for block in blocks:
                if _key(block) not in done:
                    begin = file.tell()
                    torch_save(_values(block), file)
                    place = [*_key(block), box_shape(block.box), begin, file.tell() - begin]
                    notes.write(_line(place))
                if self._progress is not None:
                    self._progress(block.nbytes)

    def discard(self, folder: pathlib.Path, part: int) -> None:
        """Remove what a part has stored."""
        for name in (_data(part), _journal(part), f"{_WHOLE}/{_data(part)}"):
            (folder / name).unlink(missing_ok=True)

    def missing(self, folder: pathlib.Path, part: int, blocks: Sequence[Block]) -> int:
        """How many blocks of a part are not stored."""
        done = _stored(_places(folder / _journal(part)))
        return sum(_key(block) not in done for block in blocks)

    def damage(self, folder: pathlib.Path, part: int) -> str:
        """The file of a part, if it is missing or shorter than its journal says; or empty."""
        end = max((offset + length for *_, offset, length in _places(folder / _journal(part))), default=0)
        file = _found(folder, part)
        return file.name if end and not (file.is_file() and file.stat().st_size >= end) else ""

    def join(self, folder: pathlib.Path, parts: int) -> pathlib.Path:
        """Move all files into one folder, and write its metadata last."""
        whole = folder / _WHOLE
        if not (whole / METADATA).is_file():
            whole.mkdir(exist_ok=True)
            for part in range(parts):
                if (file := _found(folder, part)).is_file():
                    file.rename(whole / _data(part))
            places = {part: _places(folder / _journal(part)) for part in range(parts)}
            _write_metadata(whole, self._leaves, places)
        return whole


def _data(part: int) -> str:
    return f"__{part}_0.distcp"


def _journal(part: int) -> str:
    return f"places-{part}.jsonl"


def _found(folder: pathlib.Path, part: int) -> pathlib.Path:
    """The file of a part: in its place, or where a joiner that was killed has moved it."""
    moved = folder / _WHOLE / _data(part)
    return moved if moved.is_file() else folder / _data(part)


def _open(file: pathlib.Path) -> Any:
    return os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)


def _key(block: Block) -> tuple[str, tuple[int, ...]]:
    return block.leaf.name, tuple(part.start for part in block.box)


def _stored(places: Sequence[Sequence[Any]]) -> set[tuple[str, tuple[int, ...]]]:
    """The keys of the stored blocks."""
    return {(name, tuple(offsets)) for name, offsets, *_ in places}


def _line(place: Sequence[Any]) -> bytes:
    return json.dumps(place).encode() + b"\n"


def _places(journal: pathlib.Path) -> list[list[Any]]:
    """The name, offsets, shape, position and length of each stored block, up to a line that is cut or damaged."""
    found: list[list[Any]] = []
    for line in journal.read_bytes().splitlines(keepends=True) if journal.is_file() else ():
        try:
            name, offsets, sizes, begin, length = json.loads(line)
            place = [str(name), *(list(map(int, of)) for of in (offsets, sizes)), int(begin), int(length)]
        except (ValueError, TypeError):
            break
        if line != _line(place):
            break
        found.append(place)
    return found


def _values(block: Block) -> torch.Tensor:
    """The values in memory of their own: torch stores all of a tensor's memory."""
    values = block.read()
    return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()


def _write_metadata(whole: pathlib.Path, leaves: Sequence[Leaf], places: dict[int, list[list[Any]]]) -> None:
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.storage import WriteResult

    try:  # the place of an item has a public type in no release of torch (2.13)
        from torch.distributed.checkpoint.filesystem import _StorageInfo
    except ImportError as err:
        raise CheckpointError(
            f"torch {torch.__version__} does not show how DCP notes places: write safetensors instead."
        ) from err
    chunks: dict[str, list[Any]] = {leaf.name: [] for leaf in leaves}
    results = []
    for part, stored in places.items():
        for name, offsets, sizes, begin, length in stored:
            index = MetadataIndex(name, offsets, len(chunks[name]))
            chunks[name].append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            results.append(WriteResult(index, length, _StorageInfo(_data(part), begin, length)))
    tensors: dict[str, Any] = {
        leaf.name: TensorStorageMetadata(
            TensorProperties(leaf.dtype), torch.Size(leaf.shape), chunks[leaf.name]
        )
        for leaf in leaves
    }
    metadata = Metadata(tensors, {leaf.name: (leaf.name,) for leaf in leaves})
    FileSystemWriter(whole, sync_files=False).finish(metadata, [results])
