"""In a process that was forked after JAX started, calls that would wait forever raise.

XLA compiles, computes and copies in its own threads, which a forked child lacks. Sharing memory needs no thread and
still works. A child forked before JAX started has no such limits, nor has a spawned one.
"""

import os
from collections.abc import Callable
from typing import Any

from torchjax_bridge.errors import ForkError

__all__ = ["at_fork", "forked", "note_jax_started", "refuse_in_fork"]

_forked_after_jax = False
_jax_used = False


def forked() -> bool:
    """Whether this process was forked after JAX had started."""
    return _forked_after_jax


def refuse_in_fork(what: str) -> None:
    """Raise in a forked child; call this before any work that needs JAX's threads.

    Raises:
        ForkError: JAX had started before the fork.
    """
    if _forked_after_jax:
        raise ForkError(
            f"cannot {what} in a process that was forked after JAX had started: it lacks JAX's threads, "
            "and the call might wait for them forever. Start the process by spawn (DataLoader(..., "
            'multiprocessing_context="spawn"), multiprocessing.get_context("spawn")), fork it before JAX is first '
            "used, or keep to torch and NumPy in it and cross in the main process."
        )


def note_jax_started() -> None:
    """Record that JAX has started; needed where `_backends_query` finds nothing."""
    global _jax_used
    _jax_used = True


def _backends_query() -> Callable[[], bool] | None:
    """JAX's private function that tells whether a backend has started; every public function would start one."""
    try:
        from jax._src.xla_bridge import backends_are_initialized

        return backends_are_initialized if isinstance(backends_are_initialized(), bool) else None
    except (ImportError, AttributeError, TypeError):
        return None


_jax_has_started: Callable[[], Any] | None = _backends_query()


def _note_fork() -> None:
    global _forked_after_jax
    if _jax_used or (_jax_has_started is not None and _jax_has_started()):
        _forked_after_jax = True


def at_fork(function: Callable[[], None]) -> None:
    """Call a function in every forked child, in the order of registration."""
    if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
        os.register_at_fork(after_in_child=function)


at_fork(_note_fork)
