"""A Flax module without its values, in a form that nnx and linen share.

A `Definition` names the parameters and buffers, and gives one pure function for training and one for
evaluation. It holds no arrays and never changes. It can be pickled together with the jax functions that it
refers to, which plain pickle cannot find.
"""

import functools
import importlib
import inspect
import io
import pickle
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from torchjax_bridge.errors import ArgumentError, OutputError

__all__ = [
    "Definition",
    "Pure",
    "check_changed",
    "check_method",
    "keys_from_words",
    "mode_keywords",
    "split_name",
]

Arrays = Mapping[str, Any]
Pure = Callable[..., tuple[Any, dict[str, Any]]]

# Names of arguments that switch a module between training and evaluation, and the value for training.
_MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}

# Public modules of jax and flax that export functions defined in private ones.
_PUBLIC = (
    "jax.numpy",
    "jax.nn",
    "jax.lax",
    "jax.scipy.special",
    "jax.nn.initializers",
    "flax.linen",
    "flax.nnx",
)


class Definition(ABC):
    """A Flax module without its values.

    Attributes:
        title: Its name in error messages.
        parameters: The names of its parameters: its own paths, joined with dots.
        buffers: The names of its other variables.
        words: The number of random 32-bit words that one call needs for the keys of its streams.
    """

    title: str
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    words: int

    @abstractmethod
    def pure(self, training: bool, apart: frozenset[str] = frozenset()) -> Pure:
        """``(words, buffers, parameters, args, kwargs) -> (result, {name: new value of a changed buffer})``.

        The parts named in ``apart`` are in the other mode.
        """

    @abstractmethod
    def restore(self, parameters: Arrays, buffers: Arrays) -> Any:
        """The Flax module, or the linen variables, with these values."""

    def __deepcopy__(self, memo: Any) -> "Definition":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        _Pickler(buffer).dump((type(self), self.__dict__))
        return _unpickle, (buffer.getvalue(),)


def mode_keywords(
    function: Callable[..., Any], training: bool, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, bool]:
    """Values for the switches between training and evaluation that a method has and the caller does not pass."""
    parameters = inspect.signature(function).parameters
    switches = [name for name in _MODES if name in parameters]
    if not switches:
        return {}
    known = {name for name in kwargs if name in parameters}
    given = (
        inspect.signature(function).bind_partial(*args, **{name: kwargs[name] for name in known}).arguments
    )
    return {name: _MODES[name] is training for name in switches if name not in given}


def keys_from_words(words: Any, shapes: Sequence[tuple[tuple[int, ...], Any]]) -> list[Any]:
    """PRNG keys from random 32-bit words, for each ``(shape of key data, implementation)``, in order."""
    bits: Any = None if words is None else jax.lax.bitcast_convert_type(words, jnp.uint32)
    keys, start = [], 0
    for shape, impl in shapes:
        count = functools.reduce(lambda a, b: a * b, shape, 1)
        data = bits[start : start + count].reshape(shape)
        keys.append(data if impl is None else jax.random.wrap_key_data(data, impl=impl))
        start += count
    return keys


def check_method(module: Any, method: str) -> None:
    """Raise unless the module has the method."""
    if not callable(getattr(module, method, None)):
        raise ArgumentError(f"{type(module).__name__} has no method {method!r} for forward to call.")


def check_changed(name: str, old: Any, new: Any) -> Any:
    """A new value for a buffer, which must have the old shape and dtype; no gradient flows through it."""
    if jnp.shape(new) != old.shape or jnp.result_type(new) != old.dtype:
        raise OutputError(
            f"the module changes its variable '{name}' from {old.dtype}{list(old.shape)} to "
            f"{jnp.result_type(new)}{list(jnp.shape(new))}; a torch buffer keeps its shape and dtype. Initialise "
            "the variable in the shape and dtype it will have."
        )
    return jax.lax.stop_gradient(new)


class _Pickler(pickle.Pickler):
    """Refers by name to functions that jax wraps in objects of its own, like ``jax.nn.relu``."""

    def reducer_override(self, thing: Any) -> Any:
        """Use a public name if there is one, else the module and name in the function's attributes."""
        name = getattr(thing, "__name__", None)
        if not callable(thing) or isinstance(thing, type | types.FunctionType) or not isinstance(name, str):
            return NotImplemented
        for module in (*_PUBLIC, getattr(thing, "__module__", None)):
            if _found(module, name, thing):
                return _named, (module, name)
        return NotImplemented


def _named(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _found(module: Any, name: str, thing: Any) -> bool:
    try:
        return _named(module, name) is thing
    except (ImportError, AttributeError, TypeError):  # not there, or no name of a module
        return False


def _unpickle(data: bytes) -> Definition:
    kind, state = pickle.loads(data)
    definition: Definition = object.__new__(kind)
    definition.__dict__.update(state)
    return definition


def split_name(name: str, what: str) -> str:
    """The part of a path; raise if it cannot be part of a torch name."""
    if "." in name or not name:
        raise ArgumentError(
            f"{what} has a variable named {name!r}, and names in torch cannot hold dots. Rename it."
        )
    return name
