"""A process that was forked after JAX had started: what would wait there for ever raises.

XLA compiles, computes and copies in threads of its own, and a forked child has none of them. Sharing memory needs
none, so it goes on. A child forked before JAX started is a process like any other, as is one that was spawned.
"""

import os
from collections.abc import Callable
from typing import Any

from torchjax_bridge.errors import ForkError

__all__ = ["at_fork", "forked", "note_start", "refuse_in_fork"]

_forked = False
_started = False


def forked() -> bool:
    """Whether JAX had started in the process that this one was forked from."""
    return _forked


def refuse_in_fork(what: str) -> None:
    """Raise in a forked child, before JAX is asked for what its threads would do.

    Raises:
        ForkError: JAX had started before the fork.
    """
    if _forked:
        raise ForkError(
            f"cannot {what} in a process that was forked after JAX had started: JAX's threads are not in it, and "
            "the call might wait for them for ever. Start the process by spawn (DataLoader(..., "
            'multiprocessing_context="spawn"), multiprocessing.get_context("spawn")), fork it before JAX is first '
            "used, or keep to torch and NumPy in it and cross in the main process."
        )


def note_start() -> None:
    """Say that JAX has been used here; needed where JAX does not tell itself."""
    global _started
    _started = True


def _jax_says() -> Callable[[], bool] | None:
    """JAX's own word on whether it has started a backend, which no public function gives without starting one."""
    try:
        from jax._src.xla_bridge import backends_are_initialized

        return backends_are_initialized if isinstance(backends_are_initialized(), bool) else None
    except (ImportError, AttributeError, TypeError):
        return None


_says: Callable[[], Any] | None = _jax_says()


def _in_child() -> None:
    global _forked
    if _started or (_says is not None and _says()):
        _forked = True


def at_fork(function: Callable[[], None]) -> None:
    """Have a function called in every child that is forked, after those that were registered before it."""
    if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
        os.register_at_fork(after_in_child=function)


at_fork(_in_child)
