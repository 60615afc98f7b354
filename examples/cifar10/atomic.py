"""Writes files that appear under their name only when they are complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def writer(path: Path) -> Iterator[BinaryIO]:
    """A temporary file next to ``path``; it is renamed to ``path`` at the end, or deleted on any error.

    Args:
        path: The name of the complete file; an existing file is replaced.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        os.replace(part, path)
    except BaseException:  # also on an interrupt
        part.unlink(missing_ok=True)
        raise
