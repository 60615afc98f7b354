"""A checkpoint in several files: shards and a ``model.safetensors.index.json``, as on model hubs.

The index says which file holds which tensor, and the files must agree with it. A shard must be a plain file name in
the folder of the index; a path to anywhere else is refused.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

from torchjax_bridge.errors import CheckpointError

from ._header import parse_json
from ._leaf import Checkpoint, Leaf
from ._mapped import Window

__all__ = ["INDEX", "SINGLE_FILE", "build_index", "group_into_files", "read_index"]

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 256 << 20


def read_index(
    path: pathlib.Path,
    window: Window | None,
    open_shard: Callable[[pathlib.Path, Window | None, str], Checkpoint],
) -> Checkpoint:
    """The leaves of all shards, in the order in which the index first names the shards.

    Raises:
        CheckpointError: The index is damaged or names files in other folders, a shard is missing or damaged, or
            index and shards disagree.
    """
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{path} is too large for an index.")
        raw = path.read_bytes()
    except OSError as err:
        raise CheckpointError(f"cannot read {path}: {err.strerror}.") from err
    index = parse_json(raw, f"{path}: the index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: the index has no 'weight_map' from names to files.")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise CheckpointError(
                f"{path}: the index puts {name!r} in {file!r}, which is not a plain file name beside the index."
            )
        shards.setdefault(file, set()).add(name)
    leaves: dict[str, Leaf] = {}
    first: Checkpoint | None = None
    for file, names in shards.items():
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path}: the shard {file!r} does not exist.")
        part = open_shard(path.parent / file, window, file)
        first = first or part
        found = {name for name, leaf in part.leaves.items() if not leaf.twin} | (names & set(part.leaves))
        if found != names:
            name = min(found ^ names)
            fault = "does not hold it" if name in names else "holds it, but the index does not say so"
            raise CheckpointError(f"{path}: {name!r}: the shard {file!r} {fault}.")
        # A tensor that one shard records as tied to its own may also be in another shard, which then counts.
        leaves |= {
            name: leaf for name, leaf in part.leaves.items() if name in names or name not in weight_map
        }
    if first is None:
        raise CheckpointError(f"{path}: the index names no shard.")
    entries = index.get("metadata")
    texts = (
        {name: text for name, text in entries.items() if isinstance(text, str)}
        if isinstance(entries, dict)
        else {}
    )
    return Checkpoint(
        path, first.format, leaves, first.framework, texts | dict(first.metadata), tuple(shards), first.note
    )


def build_index(shards: Mapping[str, Sequence[Leaf]], metadata: Mapping[str, str]) -> bytes:
    """The index of these shards."""
    total = sum(leaf.nbytes for leaves in shards.values() for leaf in leaves)
    weight_map = {leaf.name: file for file, leaves in shards.items() for leaf in leaves}
    content = {"metadata": {**metadata, "total_size": total}, "weight_map": weight_map}
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


def group_into_files(leaves: Sequence[Leaf], size: int | None) -> dict[str, list[Leaf]]:
    """The leaves of each file: in files of a given size, or in the shards of the source.

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
        return {SINGLE_FILE: list(leaves)}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\\0:")
