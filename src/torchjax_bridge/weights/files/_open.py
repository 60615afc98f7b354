"""`open_checkpoint`: finds the checkpoint at a path and its format.

A folder is searched for an Orbax or a DCP checkpoint, for safetensors (an index, then a file), then for other
files. Two candidates are refused, unless only one has a name that model hubs use. The suffix decides only if the
content does not show the format.
"""

import os
import pathlib
from collections.abc import Sequence

from torchjax_bridge.errors import CheckpointError

from ._dcp import find_dcp, read_dcp
from ._index import INDEX, SINGLE_FILE, read_index
from ._leaf import Checkpoint
from ._mapped import Window
from ._safetensors import read_safetensors
from ._torch_file import ZIP, read_torch_file

__all__ = ["open_checkpoint"]

# Model hubs store the same weights in several of these. The first that exists is read, as their own readers do.
_SUFFIXES_BY_PRIORITY = (
    (".safetensors.index.json",),
    (".safetensors",),
    (".bin.index.json",),
    (".msgpack", ".pt", ".pth", ".th", ".bin", ".ckpt"),
)
# The names of the weights on model hubs. Other files are variants, adapters and a trainer's own state.
_HUB_NAMES = (INDEX, SINGLE_FILE, "pytorch_model.bin.index.json", "pytorch_model.bin", "flax_model.msgpack")
_TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt")
_PICKLE_START = b"\x80\x02"


def open_checkpoint(
    path: str | os.PathLike[str], *, window: Window | None = None, key: str | None = None
) -> Checkpoint:
    """Open a checkpoint without reading its values.

    Args:
        path: A file, an index, or a folder with one checkpoint in it.
        window: Bounds what stays mapped while every value is read once; with None each file is mapped once.
        key: Which entry of a torch file is the ``state_dict``, if there are several.

    Raises:
        CheckpointError: There is no checkpoint, more than one, or a damaged one.
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            path = _find_in_folder(path)
        elif not path.exists():
            raise CheckpointError(f"there is no checkpoint {path}.")
        elif not path.is_file():
            raise CheckpointError(f"{path} is neither a file nor a folder.")
    except OSError as err:
        raise CheckpointError(f"cannot read {path}: {err.strerror}.") from err
    if path.is_dir() and find_dcp(path):
        return read_dcp(path, window, key)
    if path.is_dir():
        from ._orbax import read_orbax  # importing orbax is slow

        _refuse_key(path, key)
        return read_orbax(path, window)
    if path.name.endswith(".index.json"):
        return read_index(path, window, lambda file, size, shard: _open_file(file, size, shard, key))
    return _open_file(path, window, "", key)


def _open_file(path: pathlib.Path, window: Window | None, shard: str, key: str | None) -> Checkpoint:
    from ._msgpack import read_msgpack

    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as err:
        raise CheckpointError(f"cannot read {path}: {err.strerror}.") from err
    if not start:
        raise CheckpointError(f"{path} is empty.")
    if path.suffix not in _TORCH_SUFFIXES:
        _refuse_key(path, key)
    # A msgpack value can look like the length of a safetensors header.
    other_suffix = path.suffix in (*_TORCH_SUFFIXES, ".msgpack")
    if path.suffix == ".safetensors" or (len(start) > 9 and start[8:9] == b"{" and not other_suffix):
        return read_safetensors(path, window, shard)
    if start.startswith((ZIP, _PICKLE_START)) or path.suffix in _TORCH_SUFFIXES:
        return read_torch_file(path, window, shard, key)
    if path.suffix == ".msgpack" or 0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF):
        return read_msgpack(path, window)
    raise CheckpointError(f"{path} is not a safetensors, torch or msgpack file.")


def _refuse_key(path: pathlib.Path, key: str | None) -> None:
    if key is not None:
        raise CheckpointError(f"{path}: a key is for torch files with more than one state_dict.")


def _find_in_folder(folder: pathlib.Path) -> pathlib.Path:
    """The only checkpoint in a folder: a file, an index, or a folder of Orbax or DCP."""
    from ._orbax import find_orbax

    orbax = find_orbax(folder)
    if orbax is not None:
        return orbax
    if find_dcp(folder):
        return folder
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    for suffixes in _SUFFIXES_BY_PRIORITY:
        found = [name for name in names if name.endswith(suffixes)]
        if len(found) == 1:
            return folder / found[0]
        hub_names = [name for name in found if name in _HUB_NAMES]
        if len(hub_names) == 1:
            return folder / hub_names[0]
        if found:
            raise CheckpointError(
                f"{folder} holds several checkpoints ({_first_names(found)}): name one of them."
            )
    raise CheckpointError(f"{folder} holds no checkpoint: it has {_first_names(names) or 'nothing in it'}.")


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
