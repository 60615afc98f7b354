"""The settings of JAX on which a traced program depends: x64, matmul precision and the like.

JAX keeps them per thread, and a program must run under the settings that it was traced under. torch runs
backward passes in threads of its own, where the caller's ``with jax.enable_x64(True)`` has no effect. JAX's
own cache key for these settings is private. It is used if it is there and works; else the public settings
that are known to matter are read one by one.
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
    """A context in which x64 is ``wanted``, as it was when a program was traced."""
    if x64() is wanted:
        return _NOTHING
    return jax.enable_x64(wanted)


def settings() -> Hashable:
    """A cache key: where it is equal, tracing gives the same program."""
    return _settings()


_NOTHING = nullcontext()


def _public_settings() -> Hashable:
    return tuple(getattr(jax.config, name, None) for name in _PUBLIC)


def _private_settings() -> Callable[[], Hashable] | None:
    """What gives JAX's own key; None if that is missing, not hashable, or the same with x64 on and off."""
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
