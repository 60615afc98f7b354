"""Writes an Orbax checkpoint block by block, in memory that does not grow with the model.

Each part of a job fills a store of its own (``ocdbt.process_0``, ...), as each process of a JAX job does. Then
Orbax itself finishes the checkpoint: it is given a tree of placeholders and a handler that moves the stores into
its temporary folder, and it merges them, writes the metadata and renames. What a killed part has stored is found
again.
"""

import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import jax_dtype

from ..layouts import as_bytes
from ._cut import Block
from ._leaf import Leaf, Progress, nest
from ._orbax import METADATA_FILE, as_checkpoint_error, orbax_module
from ._tensorstore import context, key_value_store

__all__ = ["OrbaxParts"]

_WHOLE = "whole"
# A commit writes the nodes on the way to the root anew. In one large node, as Orbax has it, that is the whole
# index: the time would grow with the square of the number of chunks. The join makes Orbax's nodes of them.
_NODE_BYTES = 1 << 16


class OrbaxParts:
    """The parts of an Orbax checkpoint in a folder.

    Args:
        leaves: All leaves.
        memory: Bytes that may be held.
        progress: Called with the bytes of each block.

    Raises:
        CheckpointError: Orbax cannot hold a leaf.
    """

    def __init__(self, leaves: Sequence[Leaf], memory: int, progress: Progress | None) -> None:
        self._leaves = leaves
        self._memory = memory
        self._progress = progress
        names: dict[str, str] = {}
        for leaf in self._leaves:
            if not leaf.nbytes:
                raise CheckpointError(
                    f"Orbax writes no array without elements: '{leaf.name}' is {leaf.shape}."
                )
            other = names.setdefault(_orbax_name(leaf), leaf.name)
            if other != leaf.name:
                raise CheckpointError(f"Orbax has the same name for '{other}' and '{leaf.name}'.")

    def write(self, folder: pathlib.Path, part: int, blocks: Sequence[Block]) -> None:
        """Store the blocks of a part that are not stored yet."""
        if (folder / _WHOLE / METADATA_FILE).is_file():  # joined already, by a process that was then killed
            self._report(blocks)
            return
        store = _moved_back(folder, part)
        with as_checkpoint_error(folder):
            if self.damage(folder, part):
                self.discard(folder, part)
            done = _keys(store)
            left = [block for block in blocks if _key(block) not in done]
            self._report(block for block in blocks if _key(block) in done)
            shared = context(write=True)
            arrays = {block.leaf.name: _create(store, block, shared) for block in left}
            opened = {name: array.result() for name, array in arrays.items()}
            before = _Batch()
            for blocks_of_one in _batches(left, self._memory // 4):
                batch = _Batch()
                for block in blocks_of_one:
                    batch.add(opened[block.leaf.name], block)
                batch.commit()
                self._report(before.finish())  # which was written in the meantime
                before = batch
            self._report(before.finish())

    def discard(self, folder: pathlib.Path, part: int) -> None:
        """Remove what a part has stored."""
        while (store := _found(folder, part)).is_dir():
            shutil.rmtree(store)

    def missing(self, folder: pathlib.Path, part: int, blocks: Sequence[Block]) -> int:
        """How many blocks of a part are not stored."""
        with as_checkpoint_error(folder):
            done = _keys(_found(folder, part))
        return sum(_key(block) not in done for block in blocks)

    def damage(self, folder: pathlib.Path, part: int) -> str:
        """The file of a part that is shorter than its index says, or empty."""
        store = _found(folder, part)
        try:
            with as_checkpoint_error(folder):
                referenced = _referenced(store)
        except CheckpointError:
            return store.name
        for name, end in referenced.items():
            file = store / name
            if not file.is_file() or file.stat().st_size < end:
                return str(file.relative_to(folder))
        return ""

    def join(self, folder: pathlib.Path, parts: int) -> pathlib.Path:
        """Make one checkpoint of all parts, in a folder inside ``folder``; again after a crash in the middle."""
        whole = folder / _WHOLE
        if not (whole / METADATA_FILE).is_file():
            for part in range(parts):
                _drop_orphans(_moved_back(folder, part))
            for leftover in folder.glob(f"{_WHOLE}*"):
                shutil.rmtree(leftover)
            with as_checkpoint_error(folder):
                _finish_with_orbax(folder, parts, self._leaves, whole)
        return whole

    def _report(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if self._progress is not None:
                self._progress(block.nbytes)


class _Batch:
    """Blocks that are committed at once, since every commit writes nodes of the index and files anew."""

    def __init__(self) -> None:
        self._transaction = ts.Transaction()
        self._writes: list[Any] = []
        self._blocks: list[Block] = []
        self._committed: Any = None

    def add(self, array: Any, block: Block) -> None:
        self._blocks.append(block)
        self._writes.append(
            array.with_transaction(self._transaction)[block.box].write(
                _as_numpy(block), can_reference_source_data_indefinitely=True
            )
        )

    def commit(self) -> None:
        """Begin to commit. A write that was not taken in before would be left out."""
        for write in self._writes:
            write.copy.result()
        self._committed = self._transaction.commit_async()

    def finish(self) -> list[Block]:
        """The blocks, once they are stored."""
        if self._committed is not None:
            self._committed.result()
        for write in self._writes:
            write.result()
        return self._blocks


def _batches(blocks: Iterable[Block], nbytes: int) -> Iterator[list[Block]]:
    """Runs of blocks of about so many bytes."""
    batch: list[Block] = []
    held = 0
    for block in blocks:
        batch.append(block)
        held += block.nbytes
        if held >= nbytes:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _store(part: int) -> str:
    return f"ocdbt.process_{part}"


def _found(folder: pathlib.Path, part: int) -> pathlib.Path:
    """The store of a part: in its place, or in the temporary folder of a joiner that was killed."""
    moved = sorted(folder.glob(f"{_WHOLE}*/{_store(part)}"))
    return moved[0] if moved else folder / _store(part)


def _moved_back(folder: pathlib.Path, part: int) -> pathlib.Path:
    """The store of a part in its place."""
    found, store = _found(folder, part), folder / _store(part)
    if found != store:
        found.rename(store)
    return store


def _orbax_name(leaf: Leaf) -> str:
    return ".".join(map(str, leaf.path))


def _key(block: Block) -> str:
    return f"{_orbax_name(block.leaf)}/{'.'.join(map(str, block.place)) or '0'}"


def _keys(store: pathlib.Path) -> set[str]:
    if not (store / "manifest.ocdbt").is_file():
        return set()
    keys = ts.KvStore.open(key_value_store(store), context=context()).result().list().result()
    return {key.decode() for key in keys}


def _create(store: pathlib.Path, block: Block, shared: Any) -> Any:
    spec = {
        "driver": "zarr",
        "kvstore": {
            **key_value_store(store),
            "path": f"{_orbax_name(block.leaf)}/",
            "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": _NODE_BYTES},
        },
        "metadata": {"shape": block.leaf.shape, "chunks": block.cell, "compressor": None},
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, dtype=jax_dtype(block.leaf.dtype), create=True, open=True, context=shared)


def _as_numpy(block: Block) -> np.ndarray:
    values = block.read()
    return as_bytes(values).numpy().view(jax_dtype(values.dtype)).reshape(tuple(values.shape))


def _referenced(store: pathlib.Path) -> dict[str, int]:
    """The data files that the index of a store names, with the byte at which the last value in each ends."""
    if not (store / "manifest.ocdbt").is_file():
        return {}
    base = ts.KvStore.open({"driver": "file", "path": f"{store.absolute()}/"}).result()
    manifest = ts.ocdbt.dump(base).result()
    found = [version.get("root", {}).get("location") for version in manifest["versions"]]
    roots = [location for location in found if location]  # the first version is empty
    ends: dict[str, int] = {}
    # Earlier versions hold a subset of the latest.
    waiting = [*(node["location"] for node in manifest.get("version_tree_nodes", ())), *roots]
    nodes = roots[-1:]
    while nodes:
        for entry in ts.ocdbt.dump(base, nodes.pop()).result()["entries"]:
            if "location" in entry:
                nodes.append(entry["location"])
                waiting.append(entry["location"])
            elif "indirect_value" in entry:
                waiting.append(entry["indirect_value"])
    for location in waiting:  # such as "value::d/3a627d5d:128:32000"
        file, offset, length = location.partition("::")[2].rsplit(":", 2)
        ends[file] = max(ends.get(file, 0), int(offset) + int(length))
    return ends


def _drop_orphans(store: pathlib.Path) -> None:
    """Remove data files that a killed process wrote and never committed."""
    kept = _referenced(store)
    for file in store.glob("d/*") if kept else ():
        if f"d/{file.name}" not in kept:
            file.unlink()


def _finish_with_orbax(folder: pathlib.Path, parts: int, leaves: Sequence[Leaf], whole: pathlib.Path) -> None:
    ocp = orbax_module()
    handlers = ocp.type_handlers

    class Placeholder:
        """A leaf whose values are stored already."""

    class MoveStores(handlers.TypeHandler):  # type: ignore[name-defined]
        """Moves the stores of all parts into the folder of the checkpoint."""

        def typestr(self) -> str:
            return "np.ndarray"  # restored without a sharding, unless the reader gives one

        async def metadata(self, infos: Any) -> Any:
            raise NotImplementedError

        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            raise NotImplementedError

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            if hasattr(infos[0], "await_path_creation"):
                await infos[0].await_path_creation()
            for part in range(parts):
                if (folder / _store(part)).is_dir():
                    (folder / _store(part)).rename(pathlib.Path(infos[0].parent_dir) / _store(part))
            return []

    registry = handlers.create_type_handler_registry((Placeholder, MoveStores()))
    tree = nest({leaf.path: Placeholder() for leaf in leaves}, "cannot write an Orbax checkpoint")
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=True, use_zarr3=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(whole.absolute(), ocp.args.PyTreeSave(tree))
