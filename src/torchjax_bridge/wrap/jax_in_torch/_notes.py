"""Notes on errors: what was going on, told beneath an error that stays the user's own, traceback and all."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

__all__ = ["Noted"]


class Noted(AbstractContextManager[None]):
    """Adds a note to whatever error leaves it.

    Args:
        note: Writes the note for an error; not called where there is none.
    """

    def __init__(self, note: Callable[[BaseException], str]) -> None:
        self._note = note

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if err is not None:
            err.add_note(self._note(err))
