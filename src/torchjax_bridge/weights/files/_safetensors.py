"""One safetensors file, read and written; the header's own rules are in ``_header``.

Names are flat. A Flax tree is written with dotted names (``params.Dense_0.kernel``); a path that its name would not
give back (a digit that is a string, a dot inside a segment) is kept in the metadata.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import BinaryIO

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import Path, split_path

from ._header import Entry, build_header, in_order, parse_json, read_header
from ._leaf import DEEPEST, Checkpoint, Framework, Leaf, segments
from ._mapped import MappedFile, Window
from ._pipeline import Pump

__all__ = ["describe", "read_safetensors", "write_safetensors"]

# What the metadata calls the framework whose names a file has.
_FRAMEWORKS: dict[str, Framework] = {"pt": "torch", "torch": "torch", "flax": "flax", "jax": "flax"}
_PATHS = "torchjax_bridge.paths"


def read_safetensors(path: pathlib.Path, window: Window | None = None, shard: str = "") -> Checkpoint:
    """The leaves of a file, in the order of their data.

    Raises:
        CheckpointError: It is not sound.
    """
    file = MappedFile(path, window)
    entries, notes, start = read_header(file)
    paths = _odd_paths(notes, path)
    leaves = {}
    seen: dict[Path, str] = {}
    for entry in entries:
        read = partial(file.tensor, start + entry.begin, start + entry.end, entry.dtype, entry.shape)
        where = paths.get(entry.name) or segments(entry.name, path)
        if seen.setdefault(where, entry.name) != entry.name:
            raise CheckpointError(f"{path}: '{seen[where]}' and '{entry.name}' have one place in the tree.")
        leaves[entry.name] = Leaf(entry.name, where, entry.dtype, entry.shape, read, shard)
    for dropped, kept in _ties(notes, leaves).items():
        twin = leaves[kept]
        where = segments(dropped, path)
        leaves[dropped] = Leaf(dropped, where, twin.dtype, twin.shape, twin.read, shard, kept)
    return Checkpoint(path, "safetensors", leaves, _FRAMEWORKS.get(notes.get("format", "")), notes)


def write_safetensors(
    leaves: Sequence[Leaf], file: BinaryIO, pump: Pump, metadata: Mapping[str, str]
) -> None:
    """The header, then leaf by leaf."""
    leaves = sorted(leaves, key=lambda leaf: in_order(leaf.nbytes, leaf.dtype))
    entries, place = [], 0
    for leaf in leaves:
        entries.append(Entry(leaf.name, leaf.dtype, leaf.shape, place, place + leaf.nbytes))
        place += leaf.nbytes
    pump.put(build_header(entries, metadata), file)
    for leaf in leaves:
        pump.feed(leaf, file)


def describe(leaves: Sequence[Leaf], framework: Framework, notes: Mapping[str, str]) -> dict[str, str]:
    """The metadata for a file with these leaves."""
    odd = {leaf.name: list(leaf.path) for leaf in leaves if split_path(leaf.name) != leaf.path}
    if framework == "torch":
        for name in _ties(notes, {leaf.name: leaf for leaf in leaves}):
            raise CheckpointError(
                f"the metadata {name!r}: {notes[name]!r} would be read as one more tensor that is tied. "
                "Say it in other words."
            )
    named = {"format": "pt" if framework == "torch" else "flax"}
    kept = {name: text for name, text in notes.items() if name not in ("format", _PATHS)}
    return named | kept | ({_PATHS: json.dumps(odd)} if odd and framework == "flax" else {})


def _ties(notes: Mapping[str, str], leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """How safetensors' save_model records tied tensors that it dropped, each with the one it kept."""
    if notes.get("format") == "flax":
        return {}
    return {dropped: kept for dropped, kept in notes.items() if kept in leaves and dropped not in leaves}


def _odd_paths(notes: Mapping[str, str], path: pathlib.Path) -> dict[str, Path]:
    if _PATHS not in notes:
        return {}
    where = f"{path}: the metadata entry {_PATHS!r}"
    found = parse_json(notes[_PATHS].encode(errors="surrogatepass"), where)
    for name, parts in found.items():
        if (
            not isinstance(parts, list)
            or not parts
            or len(parts) > DEEPEST
            or not all(type(part) is int or isinstance(part, str) for part in parts)
        ):
            raise CheckpointError(f"{where} gives no path for {name!r}.")
    return {name: tuple(parts) for name, parts in found.items()}
