"""What a call of torch code depends on besides its arguments: the settings and modes of torch around it.

Owns the part of a call's kind that no argument shows (autocast, the default dtype, whether the modules that
the code holds train), and the running of a call under the autocast that it was made in. Does not look for
modules deeper than in the code's own names.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torchjax_bridge.errors import TransformError

__all__ = ["Ambient", "under_autocast"]


class Ambient:
    """What is around the calls of one function.

    A module that the function is, is bound to (or to an object that has it as an attribute), or names, in a
    closure or globally, may be switched between
    ``train()`` and ``eval()`` from call to call: with that the function is another one.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        held = [module for root in _modules(fn) for module in root.modules()]
        self._modules = tuple({id(module): module for module in held}.values())

    def now(self, kind: str) -> tuple[Any, ...]:
        """The settings at this moment, for a device of this kind; hashable."""
        return (_autocast_dtype(kind), torch.get_default_dtype(), self.modes())

    def modes(self) -> tuple[bool, ...]:
        """Which of the modules train."""
        return tuple([module.training for module in self._modules])

    def guarded(self, call: Callable[..., Any], *known: tuple[bool, ...]) -> Callable[..., Any]:
        """The call, which raises in other ``modes()`` than the known: what is compiled does not look again."""
        if not self._modules:
            return call

        def guarded(*tensors: torch.Tensor) -> Any:
            if self.modes() not in known:
                raise TransformError(
                    "a module was switched between train() and eval() after the torch function that uses it was "
                    "compiled. Compile one jax.jit for each mode."
                )
            return call(*tensors)

        return guarded


def under_autocast(call: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """The call under the autocast of now, as callbacks run in other threads and at other times."""
    dtype = _autocast_dtype(kind)
    return call if dtype is None else torch.autocast(kind, dtype)(call)


def _autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of the autocast that is active around the call; None where there is none."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _modules(fn: Any) -> Iterator[torch.nn.Module]:
    if isinstance(fn, torch.nn.Module):
        yield fn
    elif isinstance(fn, functools.partial):
        for part in (fn.func, *fn.args, *fn.keywords.values()):
            yield from _modules(part)
    elif inspect.ismethod(fn):
        yield from _modules(fn.__self__)
        yield from _modules(fn.__func__)
    elif inspect.isfunction(fn):
        yield from (value for value in _named(fn) if isinstance(value, torch.nn.Module))
        yield from _modules(getattr(fn, "__wrapped__", None))  # under a decorator such as torch.no_grad()
    elif hasattr(fn, "__dict__") and not isinstance(fn, type):
        yield from (value for value in vars(fn).values() if isinstance(value, torch.nn.Module))


def _named(fn: Any) -> Iterator[Any]:
    """What a function reads beside its arguments; ``inspect.getclosurevars`` fails on a cell not yet filled."""
    for cell in fn.__closure__ or ():
        with contextlib.suppress(ValueError):
            yield cell.cell_contents
    yield from fn.__defaults__ or ()
    for name in fn.__code__.co_names:
        yield fn.__globals__.get(name)
