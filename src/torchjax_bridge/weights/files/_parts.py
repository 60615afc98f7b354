"""One conversion by several processes that never talk: they share a folder, and the last to finish joins the parts.

Everything lies in the unfinished folder beside the target: what each part has stored, a file that says what the
part is of, and locks, which the system releases when a process ends, however it ends. So a part that was killed
is run again with ``resume``; so is any part, if the process that joined was killed. A conversion that is not
divided is one part.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from torchjax_bridge.errors import CheckpointError

from ._atomic import (
    as_writing_error,
    atomic_file,
    check_publish,
    clear,
    lock,
    locked_folder,
    partial_path,
    publish,
)
from ._cut import Block, blocks_of_part

__all__ = ["Part", "PartsOfFormat", "check_part", "write_part"]

# Shared by all that write a part, and held by the one that joins.
_JOIN_LOCK = "join.lock"
# Written before the parts are joined: none of them is started anew after that.
_JOINING = "joining"
# Written before the joined checkpoint gets its name: of which work it is, and what the system calls its folder,
# which stays through any renaming. If the process is killed then, the next one sees whose folder the target is.
_PUBLISHED = "published.json"

Part = tuple[int, int]
"""The number of a part, from 0, and the number of parts."""


class PartsOfFormat(Protocol):
    """How a format stores blocks."""

    def write(self, folder: pathlib.Path, part: int, blocks: Sequence[Block]) -> None:
        """Store the blocks of a part that are not stored yet; start anew if what is stored is damaged."""

    def discard(self, folder: pathlib.Path, part: int) -> None:
        """Remove what a part has stored."""

    def missing(self, folder: pathlib.Path, part: int, blocks: Sequence[Block]) -> int:
        """How many blocks of a part are not stored."""

    def damage(self, folder: pathlib.Path, part: int) -> str:
        """A file of a part that is missing or shorter than it must be; or empty."""

    def join(self, folder: pathlib.Path, parts: int) -> pathlib.Path:
        """The finished checkpoint, as a folder inside ``folder``; also after a crash in the middle."""


def check_part(part: Part) -> None:
    """Refuse what is not the number of a part and of all parts."""
    numbers = isinstance(part, tuple) and len(part) == 2 and all(type(number) is int for number in part)
    if not numbers or not 0 <= part[0] < part[1]:
        raise CheckpointError(f"part={part!r} is no part: for four of them, pass (0, 4) to (3, 4).")


def write_part(
    blocks: Sequence[Block],
    target: pathlib.Path,
    format: PartsOfFormat,
    *,
    part: Part,
    work: Callable[[], str],
    resume: bool,
    check: Callable[[], None],
) -> tuple[int, ...]:
    """Write one part, and join all parts if it is the last.

    Args:
        blocks: The blocks of all parts.
        target: The folder that appears when the parts are joined.
        format: How blocks are stored.
        part: The part.
        work: Returns what identifies the conversion; something else once the source was changed.
        resume: Keep what an earlier run of this part stored.
        check: Raises if the target may not be written or replaced; called again when all is done.

    Returns:
        The other parts that are not finished; none once ``target`` is there.

    Raises:
        CheckpointError: Another process writes the part, or a part is of another conversion, missing or damaged.
    """
    number, count = part
    folder = partial_path(target)
    with as_writing_error(target), locked_folder(folder, shared=count > 1):
        own = {"work": work(), "of": count}
        published = _published(folder, target)
        if published is not None:  # all but the removal of this folder was done
            if published == own["work"] and resume:
                _remove(folder)
                return ()
            clear(folder, keep=[_PUBLISHED])
            (folder / _PUBLISHED).unlink()
        for file in sorted(folder.glob("part-*.json")):
            if (other := file.stem.partition("-")[2]).isdecimal():
                _check_same_work(folder, int(other), own, number, resume)
        if count == 1 and not resume:
            clear(folder)
        try:
            check_publish(folder, target)
            joining = folder / _JOIN_LOCK
            with _locked(folder / f"part-{number}.lock"), _locked(joining, shared=True):
                _write(blocks, folder, format, part, work, resume)
            waiting = _waiting(folder, count)
            if not waiting:
                with _locked(joining, wait=True):
                    waiting = (
                        _waiting(folder, count) if joining.exists() else ()
                    )  # another may have joined them
                    if not waiting and joining.exists():
                        _join(blocks, target, folder, format, count, work(), check)
        except BaseException:
            if count == 1 and not resume:  # what was to be kept, and all that other parts stored, stays
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return waiting


def _write(
    blocks: Sequence[Block],
    folder: pathlib.Path,
    format: PartsOfFormat,
    part: Part,
    work: Callable[[], str],
    resume: bool,
) -> None:
    number, count = part
    own = {"work": work(), "of": count}
    if not resume and not (folder / _JOINING).exists():
        format.discard(folder, number)
    _set_state(folder, number, own | {"done": False})
    format.write(folder, number, blocks_of_part(blocks, number, count))
    if work() != own["work"]:
        format.discard(folder, number)
        raise CheckpointError("the source was changed while it was read: start again.")
    _set_state(folder, number, own | {"done": True})


def _check_same_work(
    folder: pathlib.Path, other: int, own: dict[str, Any], number: int, resume: bool
) -> None:
    """Refuse to add a part to those of another conversion."""
    state = _state(folder, other)
    if (state.get("work"), state.get("of")) == (own["work"], own["of"]):
        return
    if state.get("of") == own["of"] and other == number and not resume:
        return
    kept = f"It is kept; remove {folder} to start anew."
    if state.get("of") != own["of"]:
        this = f"part {number} of {own['of']}" if own["of"] > 1 else "all of it"
        raise CheckpointError(f"{folder} holds part {other} of {state.get('of')}, and this is {this}. {kept}")
    if own["of"] == 1:
        kept = "It is kept; start without resume to replace it."
        raise CheckpointError(
            f"cannot resume: the unfinished output is from another source or other settings. {kept}"
        )
    raise CheckpointError(
        f"part {other} of {own['of']} is from another source or other settings than part {number}. {kept}"
    )


def _join(
    blocks: Sequence[Block],
    target: pathlib.Path,
    folder: pathlib.Path,
    format: PartsOfFormat,
    count: int,
    work: str,
    check: Callable[[], None],
) -> None:
    for number in range(count):
        state, name = _state(folder, number), f"part {number} of {count}"
        if state.get("work") != work:
            raise CheckpointError(f"{name} is from another source or other settings.")
        again = f"Run {name} again with resume, or remove {folder} to start anew"
        if damaged := format.damage(folder, number):
            raise CheckpointError(f"{name}: its file {damaged} is missing or cut. {again}.")
        if lacking := format.missing(folder, number, blocks_of_part(blocks, number, count)):
            raise CheckpointError(f"{name} lacks {lacking} blocks of those that it had stored. {again}.")
    (folder / _JOINING).touch()
    whole = format.join(folder, count)
    check()
    found = whole.stat()
    with atomic_file(folder / _PUBLISHED) as file:
        file.write(json.dumps([work, found.st_dev, found.st_ino]).encode())
    publish(whole, target)
    _remove(folder)


def _published(folder: pathlib.Path, target: pathlib.Path) -> str | None:
    """The work whose checkpoint has become the target, if a process was killed right after that; or None."""
    try:
        work, device, inode = json.loads((folder / _PUBLISHED).read_bytes())
        found = target.stat()
    except (OSError, ValueError, TypeError):
        return None
    return work if (found.st_dev, found.st_ino) == (device, inode) else None


def _remove(folder: pathlib.Path) -> None:
    """Remove the unfinished folder. What says that the target is there goes last."""
    with suppress(OSError):
        clear(folder, keep=[_PUBLISHED])
    shutil.rmtree(folder, ignore_errors=True)


def _waiting(folder: pathlib.Path, count: int) -> tuple[int, ...]:
    return tuple(part for part in range(count) if not _state(folder, part).get("done"))


def _state(folder: pathlib.Path, part: int) -> dict[str, Any]:
    """What a part is of, and whether it is done; empty if it was never begun."""
    try:
        state = json.loads((folder / f"part-{part}.json").read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as err:
        raise _damaged(folder, part) from err
    if not isinstance(state, dict):
        raise _damaged(folder, part)
    return state


def _damaged(folder: pathlib.Path, part: int) -> CheckpointError:
    return CheckpointError(
        f"{folder}: its file part-{part}.json is damaged. Remove it, and run part {part} again with resume."
    )


def _set_state(folder: pathlib.Path, part: int, state: dict[str, Any]) -> None:
    with atomic_file(folder / f"part-{part}.json") as file:
        file.write(json.dumps(state).encode())


@contextmanager
def _locked(file: pathlib.Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock(descriptor, file, shared=shared, wait=wait)
        yield
    finally:
        os.close(descriptor)
