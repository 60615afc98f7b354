"""The registry of wrapped functions, by the names that graphs of ``torch.compile`` use for them.

A graph that Dynamo caches must not keep a function alive, so it holds a name. An entry dies with its
function.
"""

import uuid
import weakref
from typing import Any, Protocol

__all__ = ["find", "register"]


class Callee(Protocol):
    """What a graph calls."""

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function on tensors."""


_functions: "weakref.WeakValueDictionary[str, Callee]" = weakref.WeakValueDictionary()


def register(function: Callee) -> str:
    """A name for the function, new in every process."""
    name = uuid.uuid4().hex
    _functions[name] = function
    return name


def find(name: str) -> Callee:
    """The function of this name.

    Raises:
        KeyError: It is gone.
    """
    return _functions[name]
