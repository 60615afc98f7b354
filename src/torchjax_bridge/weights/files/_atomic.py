"""Output appears under its name only when it is whole.

It is written beside the target, under the target's name with a dot before and ``.part`` behind, and renamed.
A process that is killed leaves the old state or the new one; what it left unfinished is taken over by the next to
write there. Two processes never write to one target where the file system has locks: the second is refused. A
link to a file is replaced, a link to a folder is followed. No ``fsync``: this guards against the end of a process,
not of the machine.
"""

import ctypes
import errno
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from torchjax_bridge.errors import CheckpointError

__all__ = ["clear", "part_of", "refuse_to_replace", "whole_file", "whole_folder"]

# What a folder may hold for us to replace it: anything else is not ours to delete.
_OURS = (".safetensors", ".safetensors.index.json")
_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA")
_BESIDE = (*_ORBAX, "_sharding", "manifest.ocdbt", "commit_success.txt", "orbax.checkpoint", "checkpoint")


@contextmanager
def whole_file(target: pathlib.Path, *, within: pathlib.Path | None = None) -> Iterator[BinaryIO]:
    """A file to write to, which becomes ``target`` at the end, or vanishes on any error.

    Args:
        target: What it becomes.
        within: The name to speak of in errors, where the target is itself a part of something unfinished.

    Raises:
        CheckpointError: The file system refuses (no space, no permission), or another process writes there.
    """
    part = part_of(target)
    with _in_words(within or target):
        descriptor = _claim(part, os.O_RDWR | os.O_CREAT)
        try:
            with os.fdopen(descriptor, "r+b", buffering=0) as file:
                # ext4 sends to disk at once what was truncated, if only from 0.
                if os.fstat(descriptor).st_size:
                    file.truncate(0)
                yield file
                os.replace(part, target)
        except BaseException:  # an interrupt too leaves nothing behind
            part.unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(
    target: pathlib.Path, *, keep: bool = False, look: Callable[[pathlib.Path], None] | None = None
) -> Iterator[pathlib.Path]:
    """A folder to write to, which becomes ``target`` at the end, or vanishes on any error.

    Args:
        target: A folder that is there is replaced at once, by an exchange of names.
        keep: Hand out what an earlier process left unfinished, and leave the unfinished on an interrupt.
        look: Shown what an earlier process left; where it raises, that stays as it is.

    Raises:
        CheckpointError: As for `whole_file`.
    """
    part = part_of(target)
    with _in_words(target):
        part.mkdir(exist_ok=True)
        descriptor = _claim(part, os.O_RDONLY)
        try:
            if look is not None:
                look(part)
        except BaseException:
            os.close(descriptor)
            raise
        try:
            if not keep:
                clear(part)
            if _is_filled(target):
                _try_exchange(part)
            yield part
            _publish(part, target)
        except KeyboardInterrupt:
            if not keep:
                shutil.rmtree(part, ignore_errors=True)
            raise
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        finally:
            os.close(descriptor)


def refuse_to_replace(target: pathlib.Path, *, folder: bool, overwrite: bool) -> None:
    """Say before hours of work that the target cannot be written.

    Args:
        target: Where the output goes.
        folder: Whether it will be a folder.
        overwrite: Whether the caller allows an old checkpoint to be replaced.

    Raises:
        CheckpointError: The folder around it is not there, something else has the name, or what is there is not
            allowed to be replaced.
    """
    with _in_words(target):
        if not target.name:
            raise CheckpointError(f"'{target}' is no name for a checkpoint.")
        if not target.absolute().parent.is_dir():
            raise CheckpointError(f"cannot write {target}: there is no folder {target.absolute().parent}.")
        if not target.exists():
            return
        if folder != target.is_dir():
            found = "a folder" if target.is_dir() else "a file"
            raise CheckpointError(
                f"cannot write {target}: {found} of that name is there, which is no such output."
            )
        if folder:
            names = sorted(entry.name for entry in target.iterdir())
            if not names:
                return
            orbax = bool(set(_ORBAX) & set(names))  # which names folders for what it holds
            strange = [
                name
                for name in names
                if not (name.endswith(_OURS) or (orbax and (name in _BESIDE or (target / name).is_dir())))
            ]
            if strange:
                raise CheckpointError(
                    f"cannot write {target}: it holds {strange[0]!r}, which is no part of a checkpoint and would "
                    "be lost. Name a new folder."
                )
        if not overwrite:
            raise CheckpointError(f"cannot write {target}: it exists. Pass overwrite=True to replace it.")


def part_of(target: pathlib.Path) -> pathlib.Path:
    """Where a target is written before it has its name."""
    return target.absolute().with_name(f".{target.absolute().name}.part")


def clear(folder: pathlib.Path, keep: Collection[str] = ()) -> None:
    """Remove what a folder holds, but for some names."""
    for entry in folder.iterdir():
        if entry.name in keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _publish(part: pathlib.Path, target: pathlib.Path) -> None:
    if _is_filled(target):
        _exchange(part, target)
        shutil.rmtree(part, ignore_errors=True)
    else:
        os.rename(part, target)


def _is_filled(target: pathlib.Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def _try_exchange(folder: pathlib.Path) -> None:
    """Not every file system can (NFS cannot): better said before hours of work than after."""
    one, other = folder / ".one", folder / ".other"
    try:
        one.touch()
        other.touch()
        _exchange(one, other)
    except OSError as err:
        raise CheckpointError(
            f"the file system of {folder.parent} cannot replace a folder in one step ({err.strerror}): name a new "
            "folder, or remove the old one first."
        ) from err
    finally:
        one.unlink(missing_ok=True)
        other.unlink(missing_ok=True)


@contextmanager
def _in_words(target: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise CheckpointError(f"cannot write {target}: {err.strerror or err}.") from err


def _claim(part: pathlib.Path, flags: int) -> int:
    """Open and lock; the lock ends with the process, however it ends."""
    while True:
        descriptor = os.open(part, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor, part)
            if _is_still(part, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # renamed or removed by its owner between our open and our lock
        if flags == os.O_RDONLY:
            part.mkdir(exist_ok=True)


def _is_still(part: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(part), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, part: pathlib.Path) -> None:
    if sys.platform == "win32":  # no such locks; a rename of an open file fails there instead
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        raise CheckpointError(f"another process is writing {part}: wait until it is done.") from err
    except OSError as err:
        if err.errno not in (errno.ENOSYS, errno.ENOTSUP):  # a network file system without locks
            raise


def _exchange(one: pathlib.Path, other: pathlib.Path) -> None:
    """Two names change places in one step; Python has no such call, the C library has."""
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):  # Linux: AT_FDCWD is -100, RENAME_EXCHANGE is 2
        failed = library.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2)
    elif hasattr(library, "renamex_np"):  # macOS: RENAME_SWAP is 2
        failed = library.renamex_np(os.fsencode(one), os.fsencode(other), 2)
    else:
        raise CheckpointError(f"cannot replace the folder {other} in one step here: remove it first.")
    if failed:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
