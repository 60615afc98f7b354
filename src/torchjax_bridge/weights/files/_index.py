"""A checkpoint in several files: ``model.safetensors.index.json`` beside its shards, as model hubs have it.

The index says which file holds which tensor; both must agree. A shard is a plain file name in the folder of the
index: anything that leads elsewhere is refused.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

from torchjax_bridge.errors import CheckpointError

from ._header import parse_json
from ._leaf import Checkpoint, Leaf
from ._mapped import Window

__all__ = ["INDEX", "SINGLE", "build_index", "pack", "read_index"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LARGEST = 256 << 20


def read_index(
    path: pathlib.Path,
    window: Window | None,
    open_shard: Callable[[pathlib.Path, Window | None, str], Checkpoint],
) -> Checkpoint:
    """The leaves of all shards, in the order in which the index first names the shards.

    Raises:
        CheckpointError: The index is damaged or names files elsewhere, a shard is missing or damaged, or index
            and shards disagree.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path} is too large for an index.")
        raw = path.read_bytes()
    except OSError as err:
        raise CheckpointError(f"cannot read {path}: {err.strerror}.") from err
    index = parse_json(raw, f"{path}: the index")
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: the index has no 'weight_map' from names to files.")
    shards: dict[str, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise CheckpointError(
                f"{path}: {name!r} is said to be in {file!r}, which is no plain file name beside the index."
            )
        shards.setdefault(file, set()).add(name)
    leaves: dict[str, Leaf] = {}
    first: Checkpoint | None = None
    for file, names in shards.items():
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path}: the shard {file!r} is not there.")
        part = open_shard(path.parent / file, window, file)
        first = first or part
        found = {name for name, leaf in part.leaves.items() if not leaf.twin} | (names & set(part.leaves))
        if found != names:
            name = min(found ^ names)
            where = "does not hold it" if name in names else "holds it without being named for it"
            raise CheckpointError(f"{path}: {name!r}: the shard {file!r} {where}.")
        # What a shard notes as tied to one of its own may lie in another shard by itself.
        leaves |= {name: leaf for name, leaf in part.leaves.items() if name in names or name not in places}
    if first is None:
        raise CheckpointError(f"{path}: the index names no shard.")
    notes = index.get("metadata")
    texts = (
        {name: text for name, text in notes.items() if isinstance(text, str)}
        if isinstance(notes, dict)
        else {}
    )
    return Checkpoint(
        path, first.format, leaves, first.framework, texts | dict(first.metadata), tuple(shards), first.note
    )


def build_index(shards: Mapping[str, Sequence[Leaf]], notes: Mapping[str, str]) -> bytes:
    """The index of these shards."""
    total = sum(leaf.nbytes for leaves in shards.values() for leaf in leaves)
    places = {leaf.name: file for file, leaves in shards.items() for leaf in leaves}
    metadata = {**notes, "total_size": total}
    return json.dumps({"metadata": metadata, "weight_map": places}, indent=2, ensure_ascii=False).encode()


def pack(leaves: Sequence[Leaf], size: int | None) -> dict[str, list[Leaf]]:
    """Leaves by the file they go to: filled up to a size, or as the source had them.

    Args:
        leaves: In the order in which they are written.
        size: The bytes of one file; a larger leaf gets a file of its own. None keeps the shards of the source.
    """
    groups: list[list[Leaf]] = []
    if size is None:
        by_shard: dict[str, list[Leaf]] = {}
        for leaf in leaves:
            by_shard.setdefault(leaf.shard, []).append(leaf)
        groups = list(by_shard.values())
    else:
        room = 0
        for leaf in leaves:
            if not groups or leaf.nbytes > room:
                groups.append([])
                room = size
            groups[-1].append(leaf)
            room -= leaf.nbytes
    if len(groups) < 2:
        return {SINGLE: list(leaves)}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\\0:")
