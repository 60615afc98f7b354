"""The settings of JAX that decide what tracing a function gives: x64, matmul precision and the like.

JAX keeps them per thread. What was traced under one set of them must not be used under another, and
torch runs backward passes in threads of its own, where a ``with jax.enable_x64(True)`` of the caller does
not reach. JAX's own cache key for them is private, so it is probed; without it, the public settings that
are known to matter are read one by one.
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext

import jax

from torchjax_bridge.exchange import x64

__all__ = ["settings", "x64", "x64_as"]

_PUBLIC = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_debug_nans",
    "jax_disable_jit",
)


def x64_as(wanted: bool) -> AbstractContextManager[object]:
    """A context in which x64 is what it was when something was traced."""
    if x64() is wanted:
        return _NOTHING
    return jax.enable_x64(wanted)


def settings() -> Hashable:
    """A value that is equal where tracing gives the same program."""
    return _settings()


_NOTHING = nullcontext()


def _public_settings() -> Hashable:
    return tuple(getattr(jax.config, name, None) for name in _PUBLIC)


def _private_settings() -> Callable[[], Hashable] | None:
    """JAX's own key, if it is there, is hashable, and tells x64 on from off."""
    try:
        from jax._src.config import trace_context

        with jax.enable_x64(True):
            on = trace_context()
        with jax.enable_x64(False):
            off = trace_context()
        if on == off or hash(off) != hash(off):
            return None
    except (ImportError, AttributeError, TypeError):
        return None
    return trace_context


_settings: Callable[[], Hashable] = _private_settings() or _public_settings
