"""`write_checkpoint`: writes leaves to disk in any format. Everything that writes calls it.

Decides which files are written (one file, or a folder of shards and an index) and resumes an interrupted sharded
conversion. The formats decide the bytes; ``_atomic`` publishes them. Orbax and DCP are written block by block,
and in parts (``_parts``).
"""

import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import Path

from ._atomic import atomic_file, atomic_folder, check_target, clear, followed, partial_path
from ._cut import MAX_BLOCK_BYTES, cut
from ._dcp_write import DcpParts
from ._index import INDEX, SINGLE_FILE, build_index, group_into_files
from ._leaf import Format, Framework, Leaf, Progress
from ._msgpack import write_msgpack
from ._parts import Part, PartsOfFormat, check_part, write_part
from ._pipeline import Pipeline
from ._safetensors import metadata_for, write_safetensors
from ._torch_file import write_torch_file

__all__ = ["MEMORY", "Written", "format_for", "write_checkpoint"]

MEMORY = 1 << 30

_SUFFIXES: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".msgpack": "msgpack",
    ".pt": "pt",
    ".pth": "pt",
    ".th": "pt",
    ".bin": "pt",
}
_FRAMEWORK_OF: dict[Format, Framework] = {"pt": "torch", "msgpack": "flax", "orbax": "flax", "dcp": "torch"}
# Suffixes of other programs: a folder with one would be mistaken for their file.
_OTHER_SUFFIXES = (
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
_FORMATS: tuple[Format, ...] = ("safetensors", "pt", "msgpack", "orbax", "dcp")
_WORK_ID_FILE = ".unfinished"


class Written(NamedTuple):
    """What was written.

    Attributes:
        files: The files or the folder; empty while other parts are not finished.
        waiting: The numbers of those parts.
    """

    files: list[pathlib.Path]
    waiting: tuple[int, ...] = ()


def format_for(target: pathlib.Path, framework: Framework, format: Format | None) -> Format:
    """The format of a target.

    Raises:
        CheckpointError: The suffix contradicts ``format``, or the format does not hold weights of this framework.
    """
    if format not in (None, *_FORMATS):
        raise CheckpointError(f"{format!r} is not a format: choose from {', '.join(_FORMATS)}.")
    by_suffix = _SUFFIXES.get(target.suffix)
    chosen = format or by_suffix or "safetensors"
    if by_suffix is not None and chosen != by_suffix:
        raise CheckpointError(
            f"'{target.name}' is the name of a {by_suffix} file, but the format is {chosen}."
        )
    if _FRAMEWORK_OF.get(chosen, framework) != framework:
        name = chosen if format is not None else f"a file whose name ends in {target.suffix}"
        raise CheckpointError(
            f"{name} holds {_FRAMEWORK_OF[chosen]} weights: write {framework} weights to safetensors"
            f"{', msgpack or orbax' if framework == 'flax' else ', pt or dcp'}."
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
    work: Callable[[], str] = str,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    shards: Mapping[Path, tuple[int, ...]] | None = None,
    part: Part | None = None,
) -> Written:
    """Write leaves; ``target`` appears only when it is complete.

    Args:
        leaves: In the order in which their sources are best read; ``shard`` is the shard of the source.
        target: A file, by its suffix; otherwise a folder.
        framework: The framework of the leaves' names.
        format: By default that of the suffix; without one, safetensors.
        metadata: Metadata of a safetensors file; other formats have none.
        memory: Bytes to hold in addition to the largest leaf.
        shard_size: Bytes of one file in a folder; by default the leaves keep their shards.
        work: Returns an identifier of this conversion, stored beside unfinished output; empty if it is never
            resumed.
        resume: Keep the shards that an earlier run of the same conversion finished.
        overwrite: Replace an existing checkpoint.
        progress: Called with the bytes of each leaf, or of each block of one.
        shards: The shape of a shard by the path of a leaf, for Orbax and DCP.
        part: Which part of how many is written; None for all.
    """
    format = format_for(target, framework, format)
    for name, size in (("memory", memory), ("shard_size", shard_size)):
        if size is not None and (not isinstance(size, int) or size < 1):
            raise CheckpointError(f"{name} must be a number of bytes above 0, such as 10**9; got {size!r}.")
    _check_names(leaves)
    for name, text in (metadata or {}).items():
        if not (isinstance(name, str) and isinstance(text, str) and _is_encodable(name + text)):
            raise CheckpointError(
                f"the metadata {name!r}: {text!r} is not a pair of strings that a header can hold."
            )
    suffix = target.suffix.lower()
    if suffix in _OTHER_SUFFIXES or (suffix in _SUFFIXES and suffix != target.suffix):
        raise CheckpointError(
            f"'{target.name}' has neither a suffix of a format ({', '.join(_SUFFIXES)}) nor the name of a folder: "
            "give it another suffix, or none."
        )
    if part is not None:
        check_part(part)
        if format not in ("orbax", "dcp"):
            raise CheckpointError(f"{format} is not written in parts: choose the format orbax or dcp.")
    single = target.suffix in _SUFFIXES
    target = followed(target)
    check = partial(check_target, target, folder=not single, overwrite=overwrite)
    check()
    pipeline = Pipeline(memory, progress)
    if single:
        if shard_size is not None:
            raise CheckpointError(f"shards need a folder: '{target.name}' is the name of one file.")
        with atomic_file(target) as file, pipeline.running():
            if format == "safetensors":
                write_safetensors(leaves, file, pipeline, metadata_for(leaves, framework, metadata or {}))
            elif format == "msgpack":
                write_msgpack(leaves, file, pipeline)
            else:
                write_torch_file(leaves, file, partial_path(target), pipeline)
            pipeline.flush()
            check()
        return Written([target])
    if format in ("orbax", "dcp"):
        if shard_size is not None:
            raise CheckpointError(
                f"shard_size has no effect on {format}, which stores chunks: leave it out, or write safetensors."
            )
        blocks = cut(leaves, shards or {}, min(max(memory // 4, 1), MAX_BLOCK_BYTES))
        waiting = write_part(
            blocks,
            target,
            _parts_of(format, leaves, memory, progress),
            part=part or (0, 1),
            work=lambda: _work_id(work(), [(block.leaf, block.cell) for block in blocks]),
            resume=resume,
            check=check,
        )
        return Written([] if waiting else [target], waiting)
    if format != "safetensors":
        name = {"pt": "model.pt", "msgpack": "flax_model.msgpack"}[format]
        raise CheckpointError(
            f"{format} is one file: write to {target / name}, or to a name with its suffix."
        )
    files = group_into_files(leaves, shard_size)
    notes = dict(metadata or {})
    work_id = _work_id(work(), (sorted(notes.items()), files))
    return Written(_write_shards(files, target, framework, notes, work_id, resume, pipeline, progress, check))


def _work_id(work: str, settings: object) -> str:
    return hashlib.sha256(repr((work, settings)).encode()).hexdigest() if work else ""


def _parts_of(
    format: Format, leaves: Sequence[Leaf], memory: int, progress: Progress | None
) -> PartsOfFormat:
    if format == "dcp":
        return DcpParts(leaves, progress)
    from ._orbax_stream import OrbaxParts  # importing orbax is slow

    return OrbaxParts(leaves, memory, progress)


def _write_shards(
    shards: Mapping[str, Sequence[Leaf]],
    target: pathlib.Path,
    framework: Framework,
    metadata: dict[str, str],
    work: str,
    resume: bool,
    pipeline: Pipeline,
    progress: Progress | None,
    check_target: Callable[[], None],
) -> list[pathlib.Path]:
    def check(folder: pathlib.Path) -> None:
        if resume and _read_work_id(folder) not in ("", work):
            raise CheckpointError(
                "cannot resume: the unfinished output is from another source or other settings. It is kept; start "
                "without resume to replace it."
            )

    with atomic_folder(target, keep=resume, check=check) as folder:
        if work:
            _prepare_folder(folder, work, shards)
        with pipeline.running():
            for name, group in shards.items():
                if (folder / name).is_file():
                    if progress is not None:
                        progress(sum(leaf.nbytes for leaf in group))
                    continue
                with atomic_file(folder / name, within=target / name) as file:
                    write_safetensors(group, file, pipeline, metadata_for(group, framework, metadata))
                    pipeline.flush()
        if len(shards) > 1:
            (folder / INDEX).write_bytes(
                build_index(shards, {"format": metadata_for([], framework, {})["format"]})
            )
        check_target()
        (folder / _WORK_ID_FILE).unlink(missing_ok=True)
    names = list(shards) if SINGLE_FILE in shards else [INDEX, *shards]
    return [target / name for name in names]


def _prepare_folder(folder: pathlib.Path, work: str, shards: Mapping[str, object]) -> None:
    """Keep the finished shards of this conversion, and store its identifier beside them."""
    existing = _read_work_id(folder)
    clear(folder, keep=(*shards, _WORK_ID_FILE) if existing else ())
    if not existing:  # atomic: with an empty file, a resumed run would discard the shards
        with atomic_file(folder / _WORK_ID_FILE) as file:
            file.write(work.encode())


def _read_work_id(folder: pathlib.Path) -> str:
    """The identifier of the conversion whose shards are in an unfinished folder; or empty."""
    file = folder / _WORK_ID_FILE
    return file.read_text() if file.is_file() else ""


def _is_encodable(name: str) -> bool:
    """Whether a file can hold this text: half of a surrogate pair has no UTF-8."""
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
        if not leaf.name or leaf.name == "__metadata__" or not _is_encodable(leaf.name):
            raise CheckpointError(f"{leaf.name!r} is not a name for a tensor.")
        seen.add(leaf.name)
