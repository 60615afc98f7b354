"""What a call of torch code depends on besides its arguments: torch's settings, and the modes of modules.

Owns the part of a call's signature that no argument shows: autocast, the default dtype, and whether the
modules that the code holds are in train mode. Runs a call under the autocast in which it was made. Looks for
modules only among the names that the code itself uses.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torchjax_bridge.errors import TransformError

from .._sharded import refuse_sharded_module

__all__ = ["Ambient", "under_autocast"]


class Ambient:
    """The settings and modules on which the calls of one function depend.

    The modules are the function itself, what it is bound to, attributes of that, and what the function names in its
    closure or globally. Switching one of them between ``train()`` and ``eval()`` changes the function.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        held = [module for root in _modules(fn) for module in root.modules()]
        self._modules = tuple({id(module): module for module in held}.values())

    def now(self, device_type: str) -> tuple[Any, ...]:
        """The settings and modes at this moment; hashable."""
        return (_autocast_dtype(device_type), torch.get_default_dtype(), self.modes())

    def refuse_sharded(self) -> None:
        """Raise if a module is sharded, as it may have been since the function was wrapped."""
        for module in self._modules:
            refuse_sharded_module(module, "as_jax_function")

    def modes(self) -> tuple[bool, ...]:
        """Which of the modules are in train mode."""
        return tuple([module.training for module in self._modules])

    def guarded(self, call: Callable[..., Any], *known: tuple[bool, ...]) -> Callable[..., Any]:
        """The call, which raises if ``modes()`` are none of the known ones: compiled code does not look at them."""
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


def under_autocast(call: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """The call under the autocast that is active now; callbacks run later, in other threads."""
    dtype = _autocast_dtype(device_type)
    return call if dtype is None else torch.autocast(device_type, dtype)(call)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the active autocast; None if none is active."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


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
    """What a function reads besides its arguments. ``inspect.getclosurevars`` fails on a cell not yet filled."""
    for cell in fn.__closure__ or ():
        with contextlib.suppress(ValueError):
            yield cell.cell_contents
    yield from fn.__defaults__ or ()
    for name in fn.__code__.co_names:
        yield fn.__globals__.get(name)
