"""Reads a pickle without running what it names: every name in it becomes a stand-in from a list, or is refused."""

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from torchjax_bridge.errors import CheckpointError

__all__ = ["Record", "read_pickle"]

# The unpickler raises any of these for bytes that are no pickle, or for one that misuses its stand-ins.
_DAMAGE_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
    RecursionError,
)


class Record:
    """A stand-in for an object: keeps its arguments and its state, and does nothing with them."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __new__(cls, *args: Any) -> "Record":
        """An object that also exists if no ``__init__`` runs."""
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """A field of its state; None if there is none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def read_pickle(
    raw: bytes,
    names: Callable[[str, str], Any | None] | Mapping[tuple[str, str], Any],
    what: str,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The content of a pickle.

    Args:
        raw: The pickle.
        names: The stand-in for a module and a name. A name without one is refused.
        what: What the pickle is, for errors.
        persistent: Returns the object of a persistent identifier.

    Raises:
        CheckpointError: It names something else, or is no pickle.
    """
    find = names.get if isinstance(names, Mapping) else lambda where: names(*where)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = find((module, name))
            if found is None:
                raise CheckpointError(f"{module}.{name} is no part of {what}.")
            return found

        def persistent_load(self, pid: Any) -> Any:
            if persistent is None:
                raise pickle.UnpicklingError("a persistent identifier")
            return persistent(pid)

    try:
        return Unpickler(io.BytesIO(raw)).load()
    except CheckpointError:
        raise
    except _DAMAGE_ERRORS as err:
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise CheckpointError(f"{what} is damaged: {reason[:200]}.") from err
