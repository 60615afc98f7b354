"""Notes on errors, which say what was going on. The error itself stays the user's own, with its traceback."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

__all__ = ["NoteOnError"]


class NoteOnError(AbstractContextManager[None]):
    """Adds a note to any error that leaves it.

    Args:
        note: Gives the note for an error; called only if there is one.
    """

    def __init__(self, note: Callable[[BaseException], str]) -> None:
        self._note = note

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if err is not None:
            err.add_note(self._note(err))
