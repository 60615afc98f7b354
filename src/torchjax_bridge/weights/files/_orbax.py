"""Orbax checkpoints, through Orbax's own public readers and writers.

Read one leaf at a time by partial restores, whatever layout Orbax chose (OCDBT or one folder a leaf, zarr 2 or 3,
written by one process or many). Orbax holds a tree whole while it writes it, so that only happens within the memory
that the caller allows. Refuses what Orbax cannot say: it writes no array without elements.
"""

import json
import logging
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
import torch

from torchjax_bridge.errors import CheckpointError, DtypeError
from torchjax_bridge.exchange import Path, jax_dtype, join_path, split_path, torch_dtype

from ._leaf import Checkpoint, Leaf, Progress, nest
from ._mapped import Window
from ._pump import raw

__all__ = ["find_orbax", "read_orbax", "write_orbax"]

_TREE = "_METADATA"

# What Orbax and TensorStore raise for a folder that is damaged depends on where.
_DAMAGE = (ValueError, TypeError, LookupError, OSError, RuntimeError, AttributeError, NotImplementedError)


def find_orbax(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder that holds the tree: the one given, its ``default``, or that of the only step; or None."""
    if (folder / _TREE).is_file():
        return folder
    if (folder / "default" / _TREE).is_file():
        return folder / "default"
    try:
        steps = sorted(
            (entry for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir()),
            key=lambda entry: int(entry.name),
        )
    except OSError as err:
        raise CheckpointError(f"cannot read {folder}: {err.strerror}.") from err
    found = [inner for step in steps if (inner := find_orbax(step)) is not None]
    if len(found) > 1:
        names = ", ".join(str(entry.relative_to(folder)) for entry in found[:4])
        raise CheckpointError(f"{folder} holds several steps ({names}): name one of them.")
    return found[0] if found else None


def read_orbax(folder: pathlib.Path, window: Window | None = None) -> Checkpoint:
    """The leaves of an Orbax checkpoint.

    Raises:
        CheckpointError: orbax-checkpoint is not installed, or the folder is damaged.
    """
    del window  # every leaf is read by itself
    checkpointer = _checkpointer()
    _check_tree(folder)
    with _in_words(folder):
        tree = checkpointer.metadata(str(folder.absolute())).item_metadata.tree
    flat = dict(_leaves(tree, ()))
    strip = bool(flat) and all(len(path) > 1 and path[-1] == "value" for path in flat)
    leaves: dict[str, Leaf] = {}
    for path, found in flat.items():
        # An nnx.State was saved with each variable as a dict of its one value.
        where = tuple(_position(part) for part in (path[:-1] if strip else path))
        name = join_path(where)
        if found.shape is None or found.dtype is None:
            raise CheckpointError(f"{folder}: '{name}' is no array.")
        try:
            dtype = torch_dtype(found.dtype)
        except DtypeError as err:
            raise CheckpointError(
                f"{folder}: '{name}' has the dtype {found.dtype}, which torch has not."
            ) from err
        leaves[name] = Leaf(
            name, where, dtype, tuple(found.shape), partial(_read, folder, path, found, dtype)
        )
    if not leaves:
        raise CheckpointError(f"{folder} holds no arrays.")
    note = "nnx variables, each under 'value'" if strip else ""
    return Checkpoint(folder, "orbax", leaves, "flax", note=note)


def write_orbax(leaves: Sequence[Leaf], folder: pathlib.Path, memory: int, progress: Progress | None) -> None:
    """Write the nested tree of the leaves' paths into a folder that is not there yet.

    Raises:
        CheckpointError: The tree is larger than ``memory``, or Orbax refuses it.
    """
    total = sum(leaf.nbytes for leaf in leaves)
    if total > memory:
        raise CheckpointError(
            f"Orbax holds a tree whole while it writes it: {total} bytes, and {memory} are allowed. Raise the "
            "limit (memory=, --memory), or write safetensors, which is written leaf by leaf."
        )
    for leaf in leaves:
        if not leaf.nbytes:
            raise CheckpointError(f"Orbax writes no array without elements: '{leaf.name}' is {leaf.shape}.")
    arrays = {}
    for leaf in leaves:
        arrays[leaf.path] = _as_numpy(leaf.read().detach().cpu().contiguous())
        if progress is not None:
            progress(leaf.nbytes)
    tree = nest(arrays, "cannot write an Orbax checkpoint")
    checkpointer = _checkpointer()
    with _in_words(folder):
        checkpointer.save(str(folder.absolute()), tree)


def _checkpointer() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as err:
        raise CheckpointError(
            "Orbax checkpoints need orbax-checkpoint: pip install 'torchjax-bridge[flax]'."
        ) from err
    logging.getLogger("absl").setLevel(logging.ERROR)
    return ocp.PyTreeCheckpointer()


def _check_tree(folder: pathlib.Path) -> None:
    """Orbax gives an endless traceback for a cut file; one look tells."""
    try:
        json.loads((folder / _TREE).read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{folder}: its {_TREE} cannot be read: the checkpoint is damaged.") from err


def _leaves(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from _leaves(child, (*path, name))
    elif isinstance(tree, list | tuple):
        for place, child in enumerate(tree):
            yield from _leaves(child, (*path, place))
    elif tree is not None:
        yield path, tree


def _position(part: str | int) -> str | int:
    """Orbax gives integer keys back as strings (orbax#2561)."""
    found = split_path(part) if isinstance(part, str) else (part,)
    return found[0] if len(found) == 1 else part


def _read(folder: pathlib.Path, path: Path, found: Any, dtype: torch.dtype) -> torch.Tensor:
    import orbax.checkpoint as ocp

    struct: Any = jax.ShapeDtypeStruct(found.shape, found.dtype)
    how: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    for part in reversed(path):
        struct, how = {part: struct}, {part: how}
    with _in_words(folder):
        args = ocp.args.PyTreeRestore(item=struct, restore_args=how, partial_restore=True)
        value = _checkpointer().restore(str(folder.absolute()), args=args)
    for part in path:
        value = value[part]
    array = np.ascontiguousarray(value)
    if array.dtype != jax_dtype(dtype) or array.size != np.prod(found.shape, dtype=np.int64):
        raise CheckpointError(f"{folder}: '{join_path(path)}' is not the array that its metadata announces.")
    flat = array.reshape(-1).view(np.uint8)
    if not flat.flags.writeable:
        flat = flat.copy()
    return torch.from_numpy(flat).view(dtype).view(tuple(found.shape))


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return raw(tensor).numpy().view(jax_dtype(tensor.dtype)).reshape(tuple(tensor.shape))


@contextmanager
def _in_words(folder: pathlib.Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Orbax warns of its own sharding file, which plays no part here
            yield
    except CheckpointError:
        raise
    except _DAMAGE as err:
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise CheckpointError(f"{folder}: Orbax cannot do it: {reason[:300]}.") from err
