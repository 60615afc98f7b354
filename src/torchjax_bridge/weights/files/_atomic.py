"""Atomic writes: output appears under its name only when it is complete.

``name`` is written as ``.name.part`` beside it and renamed. A killed process leaves the old state or the new one.
The next process that writes there reuses its unfinished output. Two processes never write to one target if the file
system has locks: the second is refused. A link to a file is replaced; a link to a folder is followed. No ``fsync``:
this protects from the end of a process, not of the machine.
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

__all__ = [
    "as_writing_error",
    "atomic_file",
    "atomic_folder",
    "check_publish",
    "check_target",
    "clear",
    "followed",
    "lock",
    "locked_folder",
    "partial_path",
    "publish",
]

# A folder is replaced only if it holds nothing else, so that no other file is deleted.
_SUFFIXES = (".safetensors", ".safetensors.index.json", ".distcp")
_DCP = ".metadata"
_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA")
_ORBAX_NAMES = (
    *_ORBAX,
    "_sharding",
    "manifest.ocdbt",
    "commit_success.txt",
    "orbax.checkpoint",
    "checkpoint",
)


@contextmanager
def atomic_file(target: pathlib.Path, *, within: pathlib.Path | None = None) -> Iterator[BinaryIO]:
    """A file to write to. It becomes ``target`` at the end, and is removed on any error.

    Args:
        target: Its final name.
        within: The name in errors, if the target is itself in an unfinished folder.

    Raises:
        CheckpointError: The file system refuses (no space, no permission), or another process writes there.
    """
    part = partial_path(target)
    with as_writing_error(within or target):
        descriptor = open_locked(part, os.O_RDWR | os.O_CREAT)
        try:
            with os.fdopen(descriptor, "r+b", buffering=0) as file:
                # ext4 flushes a truncated file to disk at once, even one that was empty.
                if os.fstat(descriptor).st_size:
                    file.truncate(0)
                yield file
                os.replace(part, target)
        except BaseException:  # also on an interrupt
            part.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(
    target: pathlib.Path, *, keep: bool = False, check: Callable[[pathlib.Path], None] | None = None
) -> Iterator[pathlib.Path]:
    """A folder to write to. It becomes ``target`` at the end, or is removed on any error.

    Args:
        target: Its final name. An existing folder is replaced in one step, by swapping names.
        keep: Start from what an earlier process left unfinished, and keep the unfinished folder on an error.
        check: Called with what an earlier process left. If it raises, that is kept unchanged.

    Raises:
        CheckpointError: As for `atomic_file`.
    """
    part = partial_path(target)
    with as_writing_error(target):
        part.mkdir(exist_ok=True)
        descriptor = open_locked(part, os.O_RDONLY)
        try:
            if check is not None:
                check(part)
        except BaseException:
            os.close(descriptor)
            raise
        try:
            if not keep:
                clear(part)
            check_publish(part, target)
            yield part
            publish(part, target)
        except BaseException:
            if not keep:
                shutil.rmtree(part, ignore_errors=True)
            raise
        finally:
            os.close(descriptor)


def check_target(target: pathlib.Path, *, folder: bool, overwrite: bool) -> None:
    """Refuse a target that cannot be written, before hours of work.

    Args:
        target: Where the output goes.
        folder: Whether it will be a folder.
        overwrite: Whether an existing checkpoint may be replaced.

    Raises:
        CheckpointError: The parent folder does not exist, or the target exists and may not be replaced.
    """
    with as_writing_error(target):
        if not target.name:
            raise CheckpointError(f"'{target}' is not a name for a checkpoint.")
        if not target.absolute().parent.is_dir():
            raise CheckpointError(f"cannot write {target}: there is no folder {target.absolute().parent}.")
        if target.is_symlink() and not target.exists():
            where = os.readlink(target)
            raise CheckpointError(f"cannot write {target}: it is a link to {where}, which does not exist.")
        if not target.exists():
            return
        if folder != target.is_dir():
            found, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
            raise CheckpointError(
                f"cannot write {target}: {found} of that name exists, but the output is {wanted}."
            )
        if folder:
            names = sorted(entry.name for entry in target.iterdir())
            if not names:
                return
            orbax = bool(set(_ORBAX) & set(names))  # its folders may have any name
            for name in names:
                in_orbax = orbax and (name in _ORBAX_NAMES or (target / name).is_dir())
                if not (name.endswith(_SUFFIXES) or name == _DCP or in_orbax):
                    raise CheckpointError(
                        f"cannot write {target}: it holds {name!r}, which is not part of a checkpoint and would be "
                        "lost. Name a new folder."
                    )
        if not overwrite:
            raise CheckpointError(f"cannot write {target}: it exists. Pass overwrite=True to replace it.")


def followed(target: pathlib.Path) -> pathlib.Path:
    """What is written where a target is named: the folder to which a link leads, and no path with ``..``."""
    if target.is_symlink() and target.is_dir():
        return target.resolve()  # the folder is replaced, not the link
    return (
        target.parent.resolve() / target.name if ".." in target.parts else target
    )  # as TensorStore wants it


def partial_path(target: pathlib.Path) -> pathlib.Path:
    """Where a target is written before it is renamed."""
    return target.absolute().with_name(f".{target.absolute().name}.part")


def clear(folder: pathlib.Path, keep: Collection[str] = ()) -> None:
    """Remove everything in a folder except some names."""
    for entry in folder.iterdir():
        if entry.name in keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def locked_folder(folder: pathlib.Path, *, shared: bool) -> Iterator[None]:
    """An unfinished folder, which is created; it stays until it is removed.

    Args:
        folder: Its name.
        shared: Whether several processes may have it, each with ``shared``.
    """
    folder.mkdir(exist_ok=True)
    descriptor = open_locked(folder, os.O_RDONLY, shared=shared)
    try:
        yield
    finally:
        os.close(descriptor)


def check_publish(part: pathlib.Path, target: pathlib.Path) -> None:
    """Refuse to begin what `publish` could not end."""
    if _is_filled_folder(target):
        _check_swap(part)


def publish(part: pathlib.Path, target: pathlib.Path) -> None:
    """Give a finished folder its name, in place of an existing folder in one step."""
    if _is_filled_folder(target):
        _swap(part, target)
        shutil.rmtree(part, ignore_errors=True)
    else:
        os.rename(part, target)


def _is_filled_folder(target: pathlib.Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def _check_swap(folder: pathlib.Path) -> None:
    """Refuse a file system that cannot swap names (NFS cannot), before hours of work."""
    one, other = folder / ".one", folder / ".other"
    try:
        one.touch()
        other.touch()
        _swap(one, other)
    except FileNotFoundError as err:
        raise CheckpointError(f"another process has just removed {folder}, since it was done.") from err
    except OSError as err:
        raise CheckpointError(
            f"the file system of {folder.parent} cannot replace a folder in one step ({err.strerror}): name a new "
            "folder, or remove the old one first."
        ) from err
    finally:
        one.unlink(missing_ok=True)
        other.unlink(missing_ok=True)


@contextmanager
def as_writing_error(target: pathlib.Path) -> Iterator[None]:
    """Turns an error of the system into one that names the target."""
    try:
        yield
    except OSError as err:
        raise CheckpointError(f"cannot write {target}: {err.strerror or err}.") from err


def open_locked(part: pathlib.Path, flags: int, *, shared: bool = False) -> int:
    """Open and lock; the end of the process releases the lock."""
    while True:
        descriptor = os.open(part, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            lock(descriptor, part, shared=shared)
            if _is_same_file(part, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner renamed or removed it between our open and our lock
        if flags == os.O_RDONLY:
            part.mkdir(exist_ok=True)


def _is_same_file(part: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(part), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def lock(descriptor: int, part: pathlib.Path, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file.

    Args:
        descriptor: The file.
        part: Its name, for errors.
        shared: Let others have it shared, too.
        wait: Wait for others instead of raising.
    """
    if sys.platform == "win32":  # has no such locks, but renaming an open file fails
        return
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as err:
        raise CheckpointError(f"another process is writing {part}: wait until it is done.") from err
    except OSError as err:
        if err.errno not in (errno.ENOSYS, errno.ENOTSUP):  # a network file system without locks
            raise


def _swap(one: pathlib.Path, other: pathlib.Path) -> None:
    """Swap two names in one step, by a call of the C library that Python does not have."""
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
