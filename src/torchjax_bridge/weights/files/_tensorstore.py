"""The arrays of an Orbax checkpoint, opened with TensorStore to read or write parts of them.

Orbax stores an array as a zarr array, in the key-value store of the folder (OCDBT) or as a folder of files. An
element that no file holds is an error here, and never a zero.
"""

import pathlib
from typing import Any

import tensorstore as ts

__all__ = ["context", "key_value_store", "open_array"]

# Nodes of the key-value store's index, which all arrays of a checkpoint share. A reader needs the same nodes
# again, and one node of Orbax's may hold the whole index. A writer replaces its nodes with every commit, so a large
# cache would fill with old ones.
_READ_CACHE_BYTES, _WRITE_CACHE_BYTES = 100_000_000, 4_000_000


def key_value_store(folder: pathlib.Path) -> dict[str, Any]:
    """The specification of the OCDBT store in a folder."""
    return {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{folder.absolute()}/"},
        "cache_pool": "cache_pool#ocdbt",
    }


def context(*, write: bool = False) -> Any:
    """A context, for all arrays of one checkpoint."""
    limit = _WRITE_CACHE_BYTES if write else _READ_CACHE_BYTES
    # Nothing waits for the disk: output gets its name when it is complete, and no sooner.
    return ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": limit}, "file_io_sync": False})


def open_array(folder: pathlib.Path, name: str, *, zarr3: bool, shared: Any) -> Any:
    """An array of a checkpoint, for reading.

    Args:
        folder: The checkpoint.
        name: Orbax's name of the array.
        zarr3: Whether it is of version 3 of zarr.
        shared: The `context`.
    """
    one_store = (folder / "manifest.ocdbt").is_file()
    store = (
        {**key_value_store(folder), "path": f"{name}/"}
        if one_store
        else {"driver": "file", "path": f"{(folder / name).absolute()}/"}
    )
    spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, read=True, context=shared).result()
