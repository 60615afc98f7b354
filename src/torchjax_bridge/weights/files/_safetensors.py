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
from ._leaf import Checkpoint, Framework, Leaf
from ._mapped import MappedFile, Window
from ._pump import Pump

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
    for entry in entries:
        read = partial(file.tensor, start + entry.begin, start + entry.end, entry.dtype, entry.shape)
        where = paths.get(entry.name) or split_path(entry.name) or (entry.name,)
        leaves[entry.name] = Leaf(entry.name, where, entry.dtype, entry.shape, read, shard)
    for dropped, kept in notes.items():  # how safetensors' save_model records a tied tensor
        if kept in leaves and dropped not in leaves:
            twin = leaves[kept]
            leaves[dropped] = Leaf(
                dropped, split_path(dropped), twin.dtype, twin.shape, twin.read, shard, kept
            )
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
    named = {"format": "pt" if framework == "torch" else "flax"}
    kept = {name: text for name, text in notes.items() if name not in ("format", _PATHS)}
    return named | kept | ({_PATHS: json.dumps(odd)} if odd and framework == "flax" else {})


def _odd_paths(notes: Mapping[str, str], path: pathlib.Path) -> dict[str, Path]:
    if _PATHS not in notes:
        return {}
    where = f"{path}: the metadata entry {_PATHS!r}"
    found = parse_json(notes[_PATHS].encode(errors="surrogatepass"), where)
    for name, parts in found.items():
        if (
            not isinstance(parts, list)
            or not parts
            or not all(type(part) is int or isinstance(part, str) for part in parts)
        ):
            raise CheckpointError(f"{where} gives no path for {name!r}.")
    return {name: tuple(parts) for name, parts in found.items()}
