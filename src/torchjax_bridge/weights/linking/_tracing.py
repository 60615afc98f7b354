"""Refuses to move weights while JAX traces: the code would run once, and its arrays would be constants."""

import functools
import threading
from typing import Any

from jax.extend.core import get_opaque_trace_state

from torchjax_bridge.errors import TransformError

__all__ = ["refuse_in_trace"]


def refuse_in_trace(verb: str) -> None:
    """Raise a `TransformError` inside ``jax.jit``, ``jax.grad``, ``lax.scan`` and all other transforms."""
    if get_opaque_trace_state() != _running():
        raise TransformError(
            f"cannot {verb} while JAX traces (inside jax.jit, nnx.jit, grad, vmap, scan or cond): it would happen "
            f"once, at the first call, and never again. Call {verb}() outside, and pass the model or its arrays as "
            "an argument."
        )


@functools.cache
def _running() -> Any:
    """The state of JAX in which it runs what it is given: that of a new thread, which traces nothing."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(get_opaque_trace_state()))
    thread.start()
    thread.join()
    return found[0]
