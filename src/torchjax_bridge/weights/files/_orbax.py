"""Reads Orbax checkpoints by Orbax's public reader, and has a job of several processes write one by its writer.

Leaves are read by partial restores, in every layout of Orbax (OCDBT or one folder per leaf, zarr 2 or 3, written
by one process or many); parts of a leaf by TensorStore.
"""

import json
import logging
import pathlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
import torch

from torchjax_bridge.errors import CheckpointError, DtypeError
from torchjax_bridge.exchange import Path, jax_dtype, join_path, split_path, torch_dtype

from ._atomic import as_writing_error, check_target, followed, partial_path, publish
from ._boxes import Box, box_shape, whole
from ._leaf import Checkpoint, Leaf, nest, put_at
from ._mapped import Window

__all__ = ["METADATA_FILE", "as_checkpoint_error", "find_orbax", "orbax_module", "read_orbax", "write_global"]

METADATA_FILE = "_METADATA"
# The name of a CheckpointManager's step: with or without a prefix and leading zeros.
_STEP_NAME = re.compile(r"(.*_)?[0-9]+")

# Small leaves are restored in groups of this size: a call of Orbax takes as long as reading so many bytes.
_GROUP_BYTES = 16 << 20
# Several groups stay in memory, because a model has another order of leaves than Orbax.
_MAX_CACHED_GROUPS = 4

# Orbax and TensorStore raise any of these for a damaged folder.
_DAMAGE_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    OSError,
    RuntimeError,
    AttributeError,
    NotImplementedError,
)


def find_orbax(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder with the tree, or None: ``folder`` itself, its only item with a tree, or that of its only step."""
    if (folder / METADATA_FILE).is_file():
        return folder
    try:
        inside = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    except OSError as err:
        raise CheckpointError(f"cannot read {folder}: {err.strerror}.") from err
    marked = (folder / "_CHECKPOINT_METADATA").is_file()
    items = [entry for entry in inside if marked or entry.name == "default"]
    found = [entry for entry in items if (entry / METADATA_FILE).is_file()]
    if not found:
        steps = [entry for entry in inside if _STEP_NAME.fullmatch(entry.name)]
        found = [inner for step in steps if (inner := find_orbax(step)) is not None]
    if len(found) > 1:
        names = ", ".join(str(entry.relative_to(folder)) for entry in found[:4])
        raise CheckpointError(f"{folder} holds several Orbax checkpoints ({names}): name one of them.")
    return found[0] if found else None


def read_orbax(folder: pathlib.Path, window: Window | None = None) -> Checkpoint:
    """The leaves of an Orbax checkpoint.

    Raises:
        CheckpointError: orbax-checkpoint is not installed, or the folder is damaged.
    """
    del window  # Orbax maps no files
    checkpointer = orbax_module().PyTreeCheckpointer()
    zarr3 = bool(_metadata(folder).get("use_zarr3"))
    with as_checkpoint_error(folder):
        metadata = checkpointer.metadata(str(folder.absolute())).item_metadata
    if metadata is None:  # Orbax reports missing arrays only in its log
        raise CheckpointError(f"{folder}: files that its {METADATA_FILE} lists are missing or damaged.")
    flat = dict(_leaves(metadata.tree, ()))
    strip = bool(flat) and all(len(path) > 1 and path[-1] == "value" for path in flat)
    leaves: dict[str, Leaf] = {}
    reader = _Reader(folder, checkpointer, flat, zarr3)
    for path, found in flat.items():
        # A saved nnx.State has each variable as a dict with the one entry "value".
        where = tuple(_restored_key(part) for part in (path[:-1] if strip else path))
        name = join_path(where)
        if getattr(found, "shape", None) is None or getattr(found, "dtype", None) is None:
            raise CheckpointError(
                f"{folder}: '{name}' is not an array ({type(found).__name__}): save only the variables."
            )
        try:
            dtype = torch_dtype(found.dtype)
        except DtypeError as err:
            raise CheckpointError(
                f"{folder}: '{name}' has the dtype {found.dtype}, which torch does not have."
            ) from err
        leaves[name] = Leaf(
            name,
            where,
            dtype,
            tuple(found.shape),
            partial(reader.tensor, path, dtype),
            read_box=partial(reader.box, path, dtype),
        )
    if not leaves:
        raise CheckpointError(f"{folder} holds no arrays.")
    note = "nnx variables, each under 'value'" if strip else ""
    return Checkpoint(folder, "orbax", leaves, "flax", note=note)


def write_global(values: Mapping[Path, Any], folder: pathlib.Path, overwrite: bool) -> None:
    """Write arrays over the devices of several processes, all of which call this: Orbax's own save.

    It is written beside the folder, which the first process replaces when it is complete.

    Raises:
        CheckpointError: Orbax refuses, or the folder exists and may not be replaced.
    """
    tree = nest(values, "cannot write an Orbax checkpoint")
    folder = followed(folder)
    part = partial_path(folder)
    check = partial(check_target, folder, folder=True, overwrite=overwrite)

    def save() -> None:
        with as_checkpoint_error(folder):
            orbax_module().PyTreeCheckpointer().save(str(part), tree, force=True)

    def end() -> None:
        check()
        with as_writing_error(folder):
            publish(part, folder)

    try:
        _agreed(check, by_first=True)
        _agreed(save)
        _agreed(end, by_first=True)
    except CheckpointError:
        if not jax.process_index():
            for left in folder.parent.glob(f"{part.name}*"):
                shutil.rmtree(left, ignore_errors=True)
        raise


def _agreed(do: Callable[[], None], *, by_first: bool = False) -> None:
    """Do something in every process of the job, or in the first; what one raises is raised in all."""
    from jax.experimental.multihost_utils import process_allgather

    said = ""
    if not (by_first and jax.process_index()):
        try:
            do()
        except CheckpointError as err:
            said = str(err)
    words = np.zeros(2048, np.uint8)
    spoken = np.frombuffer(said.encode()[: len(words)], np.uint8)
    words[: len(spoken)] = spoken
    for heard in np.asarray(process_allgather(words)):
        if heard.any():
            raise CheckpointError(heard.tobytes().rstrip(b"\0").decode(errors="ignore"))


def orbax_module() -> Any:
    """Orbax, which is slow to import.

    Raises:
        CheckpointError: It is not installed.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as err:
        raise CheckpointError(
            "Orbax checkpoints need orbax-checkpoint: pip install 'torchjax-bridge[flax]'."
        ) from err
    logging.getLogger("absl").setLevel(logging.ERROR)
    return ocp


def _metadata(folder: pathlib.Path) -> dict[str, Any]:
    """The content of its metadata file. A truncated file is refused, for Orbax raises an endless traceback."""
    try:
        content = json.loads((folder / METADATA_FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(
            f"{folder}: its {METADATA_FILE} cannot be read: the checkpoint is damaged."
        ) from err
    return content if isinstance(content, dict) else {}


def _leaves(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from _leaves(child, (*path, name))
    elif isinstance(tree, list | tuple):
        for place, child in enumerate(tree):
            yield from _leaves(child, (*path, place))
    elif tree is not None:
        yield path, tree


def _restored_key(part: str | int) -> str | int:
    """The key before it was saved: Orbax returns integer keys as strings (orbax#2561)."""
    found = split_path(part) if isinstance(part, str) else (part,)
    return found[0] if len(found) == 1 else part


class _Reader:
    """Restores leaves in groups that follow each other in the tree; a large leaf is a group of its own."""

    def __init__(
        self, folder: pathlib.Path, checkpointer: Any, found: Mapping[Path, Any], zarr3: bool
    ) -> None:
        self._folder = folder
        self._checkpointer = checkpointer
        self._found = found
        self._groups: dict[Path, tuple[Path, ...]] = {}
        self._cache: dict[tuple[Path, ...], dict[Path, Any]] = {}
        self._zarr3 = zarr3
        self._context: Any = None

    def tensor(self, path: Path, dtype: torch.dtype) -> torch.Tensor:
        """The values of one leaf."""
        group = self._group_of(path)
        values = self._cache.get(group)
        if values is None:
            values = self._restore(group)
            if len(group) > 1:
                while len(self._cache) >= _MAX_CACHED_GROUPS:
                    self._cache.pop(next(iter(self._cache)), None)
                self._cache[group] = values
        return self._tensor(path, dtype, values[path], tuple(self._found[path].shape))

    def _tensor(self, path: Path, dtype: torch.dtype, value: Any, shape: tuple[int, ...]) -> torch.Tensor:
        array = np.ascontiguousarray(value)
        if array.dtype != jax_dtype(dtype) or array.size != np.prod(shape, dtype=np.int64):
            raise CheckpointError(
                f"{self._folder}: '{join_path(path)}' has another dtype or size than its metadata says."
            )
        flat = array.reshape(-1).view(np.uint8)
        if not flat.flags.writeable:
            flat = flat.copy()
        return torch.from_numpy(flat).view(dtype).view(shape)

    def box(self, path: Path, dtype: torch.dtype, box: Box) -> torch.Tensor:
        """A part of one leaf, for which only its chunks are read."""
        from ._tensorstore import context, open_array

        found = self._found[path]
        if box == whole(found.shape):
            return self.tensor(path, dtype)
        with as_checkpoint_error(self._folder):
            self._context = self._context or context()
            array = open_array(self._folder, found.name, zarr3=self._zarr3, shared=self._context)
            return self._tensor(path, dtype, array[box].read().result(), box_shape(box))

    def _group_of(self, path: Path) -> tuple[Path, ...]:
        if not self._groups:
            groups: list[list[Path]] = [[]]
            room = _GROUP_BYTES
            for leaf, found in self._found.items():
                size = int(np.prod(found.shape, dtype=np.int64)) * np.dtype(found.dtype).itemsize
                if size > room and groups[-1]:
                    groups.append([])
                    room = _GROUP_BYTES
                groups[-1].append(leaf)
                room -= size
            self._groups = {leaf: tuple(group) for group in groups for leaf in group}
        return self._groups[path]

    def _restore(self, group: Sequence[Path]) -> dict[Path, Any]:
        import orbax.checkpoint as ocp

        structs: dict[Any, Any] = {}
        restore_args: dict[Any, Any] = {}
        for path in group:
            struct: Any = jax.ShapeDtypeStruct(self._found[path].shape, self._found[path].dtype)
            put_at(structs, path, struct)
            put_at(restore_args, path, ocp.RestoreArgs(restore_type=np.ndarray))
        with as_checkpoint_error(self._folder):
            args = ocp.args.PyTreeRestore(item=structs, restore_args=restore_args, partial_restore=True)
            tree = self._checkpointer.restore(str(self._folder.absolute()), args=args)
        values = {}
        for path in group:
            value = tree
            for part in path:
                value = value[part]
            values[path] = value
        return values


@contextmanager
def as_checkpoint_error(folder: pathlib.Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise into an error that names the folder."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Orbax warns of its sharding file, which is not used here
            yield
    except CheckpointError:
        raise
    except _DAMAGE_ERRORS as err:
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise CheckpointError(f"{folder}: Orbax failed: {reason[:300]}.") from err
