"""Which format lies under a path, told by its content, and the checkpoint in it.

A folder is searched for one checkpoint: Orbax's own layout, safetensors (an index, then a file), other files. Two
of one kind are refused, unless one has the name that model hubs give it. A name's suffix decides only what the
content leaves open.
"""

import os
import pathlib
from collections.abc import Sequence

from torchjax_bridge.errors import CheckpointError

from ._index import INDEX, SINGLE, read_index
from ._leaf import Checkpoint
from ._mapped import Window
from ._safetensors import read_safetensors
from ._torch_file import ZIP, read_torch_file

__all__ = ["open_checkpoint"]

# Model hubs keep the same weights in several of these; the first that is there is read, as their own readers do.
_INSIDE = (
    (".safetensors.index.json",),
    (".safetensors",),
    (".bin.index.json",),
    (".msgpack", ".pt", ".pth", ".th", ".bin", ".ckpt"),
)
# What hubs call the weights themselves; beside them lie variants, adapters and what a trainer keeps of its own.
_USUAL = (INDEX, SINGLE, "pytorch_model.bin.index.json", "pytorch_model.bin", "flax_model.msgpack")
_TORCH = (".pt", ".pth", ".th", ".bin", ".ckpt")
_PICKLE = b"\x80\x02"


def open_checkpoint(
    path: str | os.PathLike[str], *, window: Window | None = None, key: str | None = None
) -> Checkpoint:
    """What lies under a path, without its values.

    Args:
        path: A file, an index, or a folder with one checkpoint in it.
        window: Bounds what stays mapped, for reading through it once; None maps each file once.
        key: Which entry of a torch file is the ``state_dict``, where there are several.

    Raises:
        CheckpointError: There is nothing, more than one thing, or nothing sound.
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            path = _inside(path)
        elif not path.exists():
            raise CheckpointError(f"there is no checkpoint {path}.")
        elif not path.is_file():
            raise CheckpointError(f"{path} is neither a file nor a folder.")
    except OSError as err:
        raise CheckpointError(f"cannot read {path}: {err.strerror}.") from err
    if path.is_dir():
        from ._orbax import read_orbax  # imports orbax, which takes long

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
    if path.suffix not in _TORCH:
        _refuse_key(path, key)
    named = path.suffix in (*_TORCH, ".msgpack")  # a value of msgpack can look like the length of a header
    if path.suffix == ".safetensors" or (len(start) > 9 and start[8:9] == b"{" and not named):
        return read_safetensors(path, window, shard)
    if start.startswith((ZIP, _PICKLE)) or path.suffix in _TORCH:
        return read_torch_file(path, window, shard, key)
    if path.suffix == ".msgpack" or 0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF):
        return read_msgpack(path, window)
    raise CheckpointError(f"{path} is no safetensors, torch or msgpack file.")


def _refuse_key(path: pathlib.Path, key: str | None) -> None:
    if key is not None:
        raise CheckpointError(f"{path}: a key is for torch files that hold more than one state_dict.")


def _inside(folder: pathlib.Path) -> pathlib.Path:
    """The one checkpoint of a folder: a file, an index, or the folder that Orbax wrote."""
    from ._orbax import find_orbax

    orbax = find_orbax(folder)
    if orbax is not None:
        return orbax
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    for suffixes in _INSIDE:
        found = [name for name in names if name.endswith(suffixes)]
        if len(found) == 1:
            return folder / found[0]
        usual = [name for name in found if name in _USUAL]
        if len(usual) == 1:
            return folder / usual[0]
        if found:
            raise CheckpointError(f"{folder} holds several checkpoints ({_some(found)}): name one of them.")
    raise CheckpointError(f"{folder} holds no checkpoint: it has {_some(names) or 'nothing in it'}.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
