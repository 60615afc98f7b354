"""A file appears under its name only when it is whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, beside ``path``; it becomes ``path`` at the end, or vanishes on any error.

    Args:
        path: Where the content goes; an existing file is replaced at once.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        os.replace(part, path)
    except BaseException:  # an interrupt too leaves nothing behind
        part.unlink(missing_ok=True)
        raise
