"""Leaves to a checkpoint on disk, in any format: the one door for all that writes.

Decides where things go (one file, a folder of shards, an index) and how an interrupted sharded conversion goes on;
the formats decide the bytes, ``_atomic`` when they appear.
"""

import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence

from torchjax_bridge.errors import CheckpointError

from ._atomic import clear, part_of, refuse_to_replace, whole_file, whole_folder
from ._index import INDEX, SINGLE, build_index, pack
from ._leaf import Format, Framework, Leaf, Progress
from ._msgpack import write_msgpack
from ._pipeline import Pump
from ._safetensors import describe, write_safetensors
from ._torch_file import write_torch_file

__all__ = ["MEMORY", "format_for", "write_checkpoint"]

MEMORY = 1 << 30

_SUFFIXES: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".msgpack": "msgpack",
    ".pt": "pt",
    ".pth": "pt",
    ".th": "pt",
    ".bin": "pt",
}
_FRAMEWORK: dict[Format, Framework] = {"pt": "torch", "msgpack": "flax", "orbax": "flax"}
# Files that others write: a folder of such a name would be taken for one.
_FOREIGN = (
    ".ckpt",
    ".npz",
    ".npy",
    ".h5",
    ".hdf5",
    ".json",
    ".gguf",
    ".onnx",
    ".pkl",
    ".pickle",
    ".zip",
    ".tar",
)
_FORMATS: tuple[Format, ...] = ("safetensors", "pt", "msgpack", "orbax")
_STATE = ".unfinished"


def format_for(target: pathlib.Path, framework: Framework, format: Format | None) -> Format:
    """The format that a target is to have.

    Raises:
        CheckpointError: The suffix says another, or the format does not hold weights of this framework.
    """
    if format not in (None, *_FORMATS):
        raise CheckpointError(f"{format!r} is no format: say {', '.join(_FORMATS)}.")
    said = _SUFFIXES.get(target.suffix)
    chosen = format or said or "safetensors"
    if said is not None and chosen != said:
        raise CheckpointError(
            f"'{target.name}' is the name of a {said} file, but the format is to be {chosen}."
        )
    if _FRAMEWORK.get(chosen, framework) != framework:
        raise CheckpointError(
            f"{chosen} holds {_FRAMEWORK[chosen]} weights: {framework} weights go to safetensors"
            f"{', msgpack or orbax' if framework == 'flax' else ' or pt'}."
        )
    return chosen


def write_checkpoint(
    leaves: Sequence[Leaf],
    target: pathlib.Path,
    *,
    framework: Framework,
    format: Format | None = None,
    metadata: Mapping[str, str] | None = None,
    memory: int = MEMORY,
    shard_size: int | None = None,
    work: str = "",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[pathlib.Path]:
    """Write leaves; nothing is under ``target`` until all is.

    Args:
        leaves: In the order in which their sources are best read; ``shard`` says where they came from.
        target: A file, by its suffix; else a folder.
        framework: Whose names the leaves have.
        format: By default by the suffix, and else safetensors.
        metadata: Notes, for safetensors to hold; other formats hold none.
        memory: Bytes to hold beside the largest leaf.
        shard_size: Bytes of one file of a folder; by default the leaves stay in the shards they come from.
        work: What identifies this work, noted beside unfinished shards; empty for what is never resumed.
        resume: Keep the shards that an earlier run of the same work finished.
        overwrite: Replace a checkpoint that is there.
        progress: Told the bytes of each leaf.

    Returns:
        The files, or the folder that Orbax wrote.
    """
    format = format_for(target, framework, format)
    for name, size in (("memory", memory), ("shard_size", shard_size)):
        if size is not None and (not isinstance(size, int) or size < 1):
            raise CheckpointError(f"{name} is a number of bytes above 0, such as 10**9; got {size!r}.")
    _check_names(leaves)
    for name, text in (metadata or {}).items():
        if not (isinstance(name, str) and isinstance(text, str) and _is_text(name + text)):
            raise CheckpointError(
                f"the metadata {name!r}: {text!r} is no pair of strings, which a header holds."
            )
    suffix = target.suffix.lower()
    if suffix in _FOREIGN or (suffix in _SUFFIXES and suffix != target.suffix):
        raise CheckpointError(
            f"'{target.name}' is neither a file that is written here ({', '.join(_SUFFIXES)}) nor the name of a "
            "folder: give it another suffix, or none."
        )
    single = target.suffix in _SUFFIXES
    if target.is_symlink() and target.is_dir():
        target = target.resolve()  # the folder is replaced where it lies
    refuse_to_replace(target, folder=not single, overwrite=overwrite)
    pump = Pump(memory, progress)
    if single:
        if shard_size is not None:
            raise CheckpointError(f"shards need a folder: '{target.name}' is the name of one file.")
        with whole_file(target) as file, pump.running():
            if format == "safetensors":
                write_safetensors(leaves, file, pump, describe(leaves, framework, metadata or {}))
            elif format == "msgpack":
                write_msgpack(leaves, file, pump)
            else:
                write_torch_file(leaves, file, part_of(target), pump)
            pump.flush()
        return [target]
    if format == "orbax":
        with whole_folder(target) as folder:
            write_orbax_into(leaves, folder, memory, progress)
        return [target]
    if format != "safetensors":
        name = {"pt": "model.pt", "msgpack": "flax_model.msgpack"}[format]
        raise CheckpointError(
            f"{format} is one file: write to {target / name}, or to a name with its suffix."
        )
    shards = pack(leaves, shard_size)
    notes = dict(metadata or {})
    begun = hashlib.sha256(repr((work, sorted(notes.items()), shards)).encode()).hexdigest() if work else ""
    return _write_shards(shards, target, framework, notes, begun, resume, pump, progress)


def write_orbax_into(
    leaves: Sequence[Leaf], folder: pathlib.Path, memory: int, progress: Progress | None
) -> None:
    """Orbax makes its folder itself, so it is made inside ours and moved up."""
    from ._orbax import write_orbax  # imports orbax, which takes long

    inner = folder / "tree"
    write_orbax(leaves, inner, memory, progress)
    for entry in list(inner.iterdir()):
        os.rename(entry, folder / entry.name)
    inner.rmdir()


def _write_shards(
    shards: Mapping[str, Sequence[Leaf]],
    target: pathlib.Path,
    framework: Framework,
    metadata: dict[str, str],
    work: str,
    resume: bool,
    pump: Pump,
    progress: Progress | None,
) -> list[pathlib.Path]:
    def look(folder: pathlib.Path) -> None:
        if resume and _begun(folder) not in ("", work):
            raise CheckpointError(
                "cannot resume: what is unfinished there was begun from another source or with other settings. It "
                "is left as it is; start anew without resume, and it goes."
            )

    with whole_folder(target, keep=resume, look=look) as folder:
        if work:
            _take_over(folder, work, shards)
        with pump.running():
            for name, group in shards.items():
                if (folder / name).is_file():
                    if progress is not None:
                        progress(sum(leaf.nbytes for leaf in group))
                    continue
                with whole_file(folder / name, within=target / name) as file:
                    write_safetensors(group, file, pump, describe(group, framework, metadata))
                    pump.flush()
        if len(shards) > 1:
            (folder / INDEX).write_bytes(
                build_index(shards, {"format": describe([], framework, {})["format"]})
            )
        (folder / _STATE).unlink(missing_ok=True)
    names = list(shards) if SINGLE in shards else [INDEX, *shards]
    return [target / name for name in names]


def _take_over(folder: pathlib.Path, work: str, shards: Mapping[str, object]) -> None:
    """Keep the finished shards of this work, and note whose they are."""
    found = _begun(folder)
    clear(folder, keep=(*shards, _STATE) if found else ())
    if not found:  # whole or not there: a kill while it is written must not cost the shards that follow
        with whole_file(folder / _STATE) as file:
            file.write(work.encode())


def _begun(folder: pathlib.Path) -> str:
    """The work whose shards lie in a folder that is unfinished."""
    state = folder / _STATE
    return state.read_text() if state.is_file() else ""


def _is_text(name: str) -> bool:
    """Whether a file can hold it: half of a surrogate pair is no text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_names(leaves: Sequence[Leaf]) -> None:
    if not leaves:
        raise CheckpointError("there is nothing to write.")
    seen: set[str] = set()
    for leaf in leaves:
        if leaf.name in seen:
            raise CheckpointError(f"two tensors are named '{leaf.name}'.")
        if not leaf.name or leaf.name == "__metadata__" or not _is_text(leaf.name):
            raise CheckpointError(f"{leaf.name!r} is no name for a tensor.")
        seen.add(leaf.name)
