"""Reads a folder of torch Distributed Checkpoint (DCP): each part of a tensor straight from the file that holds it.

No pickle of the folder is ever run. A tensor is copied together from the chunks that its ranks saved, whole or in
part. A chunk that is missing is an error: DCP itself would leave old values in its place without a word.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from torchjax_bridge.errors import CheckpointError

from ._boxes import Box, box_shape, overlap, whole
from ._dcp_item import Item, find_item
from ._dcp_metadata import METADATA, Chunk, DcpMetadata, DcpTensor, read_metadata
from ._find_state_dict import find_state_dict
from ._fresh import fresh
from ._leaf import Checkpoint, Leaf, parse_path, put_at
from ._mapped import MappedFile, Window

__all__ = ["find_dcp", "read_dcp"]

_MAX_OPEN_FILES = 64


def find_dcp(folder: pathlib.Path) -> bool:
    """Whether a folder is a DCP checkpoint.

    Raises:
        CheckpointError: It has files of one but no metadata, which DCP writes last.
    """
    if (folder / METADATA).is_file():
        return True
    if any(folder.glob("*.distcp")):
        raise CheckpointError(
            f"{folder} has .distcp files but no {METADATA}, which DCP writes last: the save did not finish, or the "
            "file was not copied."
        )
    return False


def read_dcp(folder: pathlib.Path, window: Window | None = None, key: str | None = None) -> Checkpoint:
    """The tensors of a ``state_dict`` in a DCP checkpoint.

    Args:
        folder: The folder with ``.metadata``.
        window: Bounds what stays mapped; with None each file is mapped once.
        key: Which entry is the ``state_dict``, if there are several.

    Raises:
        CheckpointError: It is damaged or incomplete, holds anything but metadata in ``.metadata``, or holds no or
            several ``state_dict``.
    """
    metadata = read_metadata(folder)
    if metadata.others and not metadata.tensors:
        raise CheckpointError(
            f"{folder} holds no tensors, but pickles ({_named(metadata.others)}): load it in torch, and save it "
            "with DefaultSavePlanner(flatten_state_dict=True), which is DCP's default."
        )
    chosen, note = _choose(metadata, folder, key)
    reader = _Reader(folder, window)
    leaves = {}
    for name, flat in chosen.items():
        tensor = metadata.tensors[flat]
        reader.check(flat, tensor)
        box = partial(reader.box, flat, tensor)
        leaves[name] = Leaf(
            name,
            parse_path(name, folder),
            tensor.dtype,
            tensor.shape,
            partial(box, whole(tensor.shape)),
            read_box=box,
        )
    name, flat = next(iter(chosen.items()))
    others = [other for other in metadata.others if other.startswith(flat.removesuffix(name))]
    if others:
        note = f"{note or 'a state_dict'}, without what is not a tensor: {_named(others)}"
    return Checkpoint(folder, "dcp", leaves, "torch", note=note)


def _named(others: Sequence[str]) -> str:
    return ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")


def _choose(metadata: DcpMetadata, folder: pathlib.Path, key: str | None) -> tuple[Mapping[str, str], str]:
    """The flat name of each tensor of the ``state_dict``, and a phrase for the entry that it was."""
    tree: dict[Any, Any] = {}
    flat: dict[int, str] = {}
    for name, path in metadata.paths.items():
        tensor = metadata.tensors[name]
        meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        flat[id(meta)] = name
        try:
            put_at(tree, path, meta)
        except (TypeError, AttributeError) as err:
            raise CheckpointError(f"{folder}: '{name}' lies inside another tensor.") from err
    found, note = find_state_dict(tree, folder, key)
    return {name: flat[id(meta)] for name, meta in found.items()}, note


class _Reader:
    """Copies boxes together from the files of a folder."""

    def __init__(self, folder: pathlib.Path, window: Window | None) -> None:
        self._folder = folder
        self._window = window
        self._files: dict[str, MappedFile] = {}  # the last used at the end
        self._sizes: dict[str, int] = {}
        self._items: dict[tuple[str, int, tuple[int, ...]], Item] = {}

    def check(self, name: str, tensor: DcpTensor) -> None:
        """Refuse a tensor whose chunks do not cover it, or whose files are missing or too short."""
        covered, total = sum(chunk.count for chunk in tensor.chunks), math.prod(tensor.shape)
        if covered < total:
            raise CheckpointError(
                f"{self._folder}: '{name}': its chunks cover {covered} of {total} elements."
            )
        if covered > total:
            raise CheckpointError(f"{self._folder}: '{name}': its chunks overlap.")
        for chunk in tensor.chunks:
            size = self._size(chunk.file, name)
            if chunk.offset + chunk.length > size:
                raise CheckpointError(
                    f"{self._folder / chunk.file} is cut: it has {size} bytes, and a chunk of '{name}' ends at "
                    f"byte {chunk.offset + chunk.length}."
                )

    def box(self, name: str, tensor: DcpTensor, box: Box) -> torch.Tensor:
        """The values of a box, in memory of their own."""
        target = fresh(box_shape(box), tensor.dtype)
        copied: list[Box] = []
        for chunk in tensor.chunks:
            common = overlap(chunk.box, box)
            if common is None:
                continue
            if any(overlap(common, other) for other in copied):
                raise CheckpointError(f"{self._folder}: '{name}': its chunks overlap.")
            copied.append(common)
            place = tuple(
                slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box, strict=True)
            )
            self._copy(name, chunk, common, target, place)
        covered = sum(math.prod(box_shape(part)) for part in copied)
        if covered != target.numel():
            raise CheckpointError(
                f"{self._folder}: '{name}': its chunks cover {covered} of {target.numel()} elements."
            )
        return target

    def _copy(self, name: str, chunk: Chunk, box: Box, target: torch.Tensor, place: Box) -> None:
        """Copy a part of a chunk to its place in the target."""
        file, width = self._open(chunk.file), target.dtype.itemsize
        key = chunk.file, chunk.offset, box_shape(chunk.box)
        if key not in self._items:
            self._items[key] = find_item(file, chunk, target.dtype, name)
        item, sizes = self._items[key], box_shape(chunk.box)
        inner = tuple(slice(b.start - c.start, b.stop - c.start) for b, c in zip(box, chunk.box, strict=True))
        # As bytes, which may lie anywhere in the file.
        to = target.view(-1).view(torch.uint8).view(*target.shape, width)[place]
        row_major = torch.empty(sizes, device="meta").stride() == item.strides
        if row_major and inner[1:] == whole(sizes[1:]) and to.is_contiguous():
            start = inner[0].start * math.prod(sizes[1:]) if sizes else 0
            file.read_into(to, item.begin + start * width)
        else:
            raw = file.part(item.begin, chunk.count * width, to.numel())
            strides = [stride * width for stride in item.strides]
            to.copy_(raw.as_strided((*sizes, width), (*strides, 1), raw.storage_offset())[inner])
        if item.negative or item.conjugate:
            values = target[place].neg() if item.negative else target[place]
            target[place] = values.conj().resolve_conj() if item.conjugate else values

    def _open(self, file: str) -> MappedFile:
        """A file, of which a few stay open: a checkpoint of many ranks has more than a process may open."""
        found = self._files.pop(file, None) or MappedFile(self._folder / file, self._window)
        self._files[file] = found
        while len(self._files) > _MAX_OPEN_FILES:
            del self._files[next(iter(self._files))]
        return found

    def _size(self, file: str, name: str) -> int:
        if file not in self._sizes:
            try:
                self._sizes[file] = (self._folder / file).stat().st_size
            except OSError as err:
                raise CheckpointError(
                    f"{self._folder}: the file {file!r}, which holds a part of '{name}', is missing."
                ) from err
        return self._sizes[file]
