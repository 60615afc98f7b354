"""Reads and writes one safetensors file; ``_header`` reads and writes its header.

Names are flat. A Flax tree is written with dotted names (``params.Dense_0.kernel``). A path that is not recoverable
from its dotted name (with digits as a string, or a dot inside a segment) is stored in the metadata.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import BinaryIO

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import Path, split_path

from ._header import TensorEntry, alignment_key, build_header, parse_json, read_header
from ._leaf import MAX_DEPTH, Checkpoint, Framework, Leaf, parse_path
from ._mapped import MappedFile, Window
from ._pipeline import Pipeline

__all__ = ["metadata_for", "read_safetensors", "write_safetensors"]

# The framework by its name in the metadata.
_FRAMEWORKS: dict[str, Framework] = {"pt": "torch", "torch": "torch", "flax": "flax", "jax": "flax"}
_PATHS_KEY = "torchjax_bridge.paths"
_OF_ONE_RANK = "DCP_SHARDING_INFO"  # an entry that says where the parts of this file begin


def read_safetensors(path: pathlib.Path, window: Window | None = None, shard: str = "") -> Checkpoint:
    """The leaves of a file, in the order of their data.

    Raises:
        CheckpointError: It is damaged.
    """
    file = MappedFile(path, window)
    entries, metadata, start = read_header(file)
    if _OF_ONE_RANK in metadata:
        raise CheckpointError(
            f"{path} holds what one rank has of each tensor (torch's HuggingFaceStorageWriter with "
            "save_distributed=True): load it in torch with HuggingFaceStorageReader, and save it with "
            "enable_consolidation=True."
        )
    paths = _stored_paths(metadata, path)
    leaves = {}
    seen: dict[Path, str] = {}
    for entry in entries:
        read = partial(file.tensor, start + entry.begin, start + entry.end, entry.dtype, entry.shape)
        where = paths.get(entry.name) or parse_path(entry.name, path)
        if seen.setdefault(where, entry.name) != entry.name:
            raise CheckpointError(
                f"{path}: '{seen[where]}' and '{entry.name}' have the same path in the tree."
            )
        leaves[entry.name] = Leaf(entry.name, where, entry.dtype, entry.shape, read, shard)
    for dropped, kept in _ties(metadata, leaves).items():
        twin = leaves[kept]
        where = parse_path(dropped, path)
        leaves[dropped] = Leaf(dropped, where, twin.dtype, twin.shape, twin.read, shard, kept)
    return Checkpoint(path, "safetensors", leaves, _FRAMEWORKS.get(metadata.get("format", "")), metadata)


def write_safetensors(
    leaves: Sequence[Leaf], file: BinaryIO, pipeline: Pipeline, metadata: Mapping[str, str]
) -> None:
    """Write the header, then leaf by leaf."""
    leaves = sorted(leaves, key=lambda leaf: alignment_key(leaf.nbytes, leaf.dtype))
    entries, offset = [], 0
    for leaf in leaves:
        entries.append(TensorEntry(leaf.name, leaf.dtype, leaf.shape, offset, offset + leaf.nbytes))
        offset += leaf.nbytes
    pipeline.write_bytes(build_header(entries, metadata), file)
    for leaf in leaves:
        pipeline.write(leaf, file)


def metadata_for(leaves: Sequence[Leaf], framework: Framework, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata for a file with these leaves."""
    unrecoverable = {leaf.name: list(leaf.path) for leaf in leaves if split_path(leaf.name) != leaf.path}
    if framework == "torch":
        for name in _ties(metadata, {leaf.name: leaf for leaf in leaves}):
            raise CheckpointError(
                f"the metadata {name!r}: {metadata[name]!r} would be read as a tensor {name!r} that is tied to "
                f"{metadata[name]!r}. Use another text."
            )
    framework_entry = {"format": "pt" if framework == "torch" else "flax"}
    kept = {name: text for name, text in metadata.items() if name not in ("format", _PATHS_KEY)}
    paths = {_PATHS_KEY: json.dumps(unrecoverable)} if unrecoverable and framework == "flax" else {}
    return framework_entry | kept | paths


def _ties(metadata: Mapping[str, str], leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """The tied tensors that safetensors' save_model dropped, each with the one that it kept."""
    if metadata.get("format") == "flax":
        return {}
    return {dropped: kept for dropped, kept in metadata.items() if kept in leaves and dropped not in leaves}


def _stored_paths(metadata: Mapping[str, str], path: pathlib.Path) -> dict[str, Path]:
    if _PATHS_KEY not in metadata:
        return {}
    where = f"{path}: the metadata entry {_PATHS_KEY!r}"
    found = parse_json(metadata[_PATHS_KEY].encode(errors="surrogatepass"), where)
    for name, parts in found.items():
        if (
            not isinstance(parts, list)
            or not parts
            or len(parts) > MAX_DEPTH
            or not all(type(part) is int or isinstance(part, str) for part in parts)
        ):
            raise CheckpointError(f"{where} gives no path for {name!r}.")
    return {name: tuple(parts) for name, parts in found.items()}
