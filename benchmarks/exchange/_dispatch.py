"""Whether a jitted call costs more on arrays that have just crossed than on arrays that JAX made."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._case import Candidate, Findings, WrongResultError, ask
from .._record import Promise
from .._setting import Setting
from ._routes import OURS, RAW, STOCK, Direction

__all__ = ["dispatch"]

_NATIVE = "jit call on JAX's own arrays"
_KEPT = "jit call on arrays imported once"


def dispatch(direction: Direction, setting: Setting) -> Findings:
    """``jit(f)(a, b, c)`` of three 64x64 arrays: JAX's own, imported once, imported for every call."""
    tensors = tuple(direction.make((64, 64)) for _ in range(3))
    add = jax.jit(lambda a, b, c: a + b + c)
    expected = np.asarray(tensors[0].cpu() + tensors[1].cpu() + tensors[2].cpu())
    native = tuple(jnp.array(np.asarray(one.cpu()), copy=True) for one in tensors)

    def call(arrays: tuple[Any, ...]) -> jax.Array:
        a, b, c = arrays
        return add(a, b, c).block_until_ready()

    def right(result: jax.Array) -> None:
        if not np.allclose(np.asarray(result), expected, rtol=1e-6):
            raise WrongResultError("the sum is wrong")

    candidates = [Candidate(_NATIVE, call, native, right)]
    candidates.append(Candidate(_KEPT, call, tuple(map(direction.ours, tensors)), right, ours=True))
    routes = [name for name in (OURS, RAW, STOCK) if name in direction.routes]
    for name in routes:
        cross = direction.routes[name]

        def fresh(operands: tuple[Any, ...], cross: Any = cross) -> jax.Array:
            a, b, c = operands
            return add(cross(a), cross(b), cross(c)).block_until_ready()

        def imports(operands: tuple[Any, ...], cross: Any = cross) -> None:
            a, b, c = operands
            cross(a), cross(b), cross(c)

        kind = {"ours": name == OURS, "limit": name == RAW}
        candidates.append(Candidate(_fresh(name), fresh, tensors, right, **kind))
        candidates.append(Candidate(_alone(name), imports, tensors, lambda _: None, **kind))
    case, rounds = ask(
        "to_jax/dispatch",
        "What does a jitted call on three 64x64 arrays cost, if they have just crossed?",
        candidates,
        setting,
        effort=2,
    )
    promises = [
        Promise(
            f"jit call on arrays fresh from {name}, less their import / on JAX's own arrays",
            "reported",
            None,
            "x",
            rounds.combine(
                lambda seconds, name=name: (  # type: ignore[misc]
                    (seconds[_fresh(name)] - seconds[_alone(name)]) / seconds[_NATIVE]
                )
            ),
        )
        for name in routes
    ]
    return Findings([case], promises)


def _fresh(name: str) -> str:
    return f"three imports and the jit call, {name}"


def _alone(name: str) -> str:
    return f"three imports, {name}"
