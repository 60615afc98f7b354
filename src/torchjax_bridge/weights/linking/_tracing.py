"""Refuses to move weights while JAX traces: the code would run once, and its arrays would be constants."""

import jax
import jax.numpy as jnp

from torchjax_bridge.errors import TransformError

__all__ = ["refuse_in_trace"]

_probe: jax.Array | None = None


def refuse_in_trace(verb: str) -> None:
    """Raise a `TransformError` inside ``jax.jit``, ``lax.scan`` and all else that runs Python to record it."""
    global _probe
    probe = jnp.zeros(()) if _probe is None else _probe
    if isinstance(jax.device_put(probe), jax.core.Tracer):
        raise TransformError(
            f"cannot {verb} while JAX traces (inside jax.jit, nnx.jit, scan or cond): it would happen once, at the "
            f"first call, and never again. Call {verb}() outside, and pass the model or its arrays as an argument."
        )
    _probe = probe
