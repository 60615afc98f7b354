"""Refuses to move weights while JAX traces: the code would run once, and its arrays would be constants."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from torchjax_bridge.errors import TransformError

__all__ = ["refuse_in_trace"]

_running: Any = None
"""The state of JAX in which an array stayed an array, the last time that this was tried."""


def refuse_in_trace(verb: str) -> None:
    """Raise a `TransformError` inside ``jax.jit``, ``lax.scan`` and all else that runs Python to record it."""
    global _running
    state = get_opaque_trace_state()
    if state == _running:  # a tenth of the time of an operation
        return
    if isinstance(jax.device_put(jnp.zeros(())), jax.core.Tracer):
        raise TransformError(
            f"cannot {verb} while JAX traces (inside jax.jit, nnx.jit, scan or cond): it would happen once, at the "
            f"first call, and never again. Call {verb}() outside, and pass the model or its arrays as an argument."
        )
    _running = state
