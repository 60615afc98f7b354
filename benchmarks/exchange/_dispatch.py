"""Conversions around a jitted call: fresh arguments before it, and its result after it.

The other questions convert one array again and again, and it caches what the first conversion made. The result
of a call is a new array each time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .._case import Candidate, Findings, WrongResultError, ask
from .._raw import new_handle
from .._record import Promise
from .._setting import Setting
from ._routes import OURS, RAW, STOCK, Direction, check_result

__all__ = ["dispatch", "results"]

_NATIVE = "jit call on JAX's own arrays"
_IMPORTED_ONCE = "jit call on arrays imported once"
_ONLY_NEW_ARRAY = "a new array alone"


def dispatch(direction: Direction, setting: Setting) -> Findings:
    """``jit(f)(a, b, c)`` of three 64x64 arrays: JAX's own, imported once, imported for every call."""
    tensors = tuple(direction.make_operand((64, 64)) for _ in range(3))
    add = jax.jit(lambda a, b, c: a + b + c)
    expected = np.asarray(tensors[0].cpu() + tensors[1].cpu() + tensors[2].cpu())
    native = tuple(jnp.array(np.asarray(one.cpu()), copy=True) for one in tensors)

    def call(arrays: tuple[Any, ...]) -> jax.Array:
        a, b, c = arrays
        return add(a, b, c).block_until_ready()

    def check_sum(result: jax.Array) -> None:
        if not np.allclose(np.asarray(result), expected, rtol=1e-6):
            raise WrongResultError("the sum is wrong")

    candidates = [Candidate(_NATIVE, call, native, check_sum)]
    candidates.append(
        Candidate(_IMPORTED_ONCE, call, tuple(map(direction.ours, tensors)), check_sum, ours=True)
    )
    routes = [name for name in (OURS, RAW, STOCK) if name in direction.routes]
    for name in routes:
        cross = direction.routes[name]

        def import_and_call(operands: tuple[Any, ...], cross: Any = cross) -> jax.Array:
            a, b, c = operands
            return add(cross(a), cross(b), cross(c)).block_until_ready()

        def import_only(operands: tuple[Any, ...], cross: Any = cross) -> None:
            a, b, c = operands
            cross(a), cross(b), cross(c)

        flags = {"ours": name == OURS, "limit": name == RAW}
        candidates.append(
            Candidate(_import_and_call_label(name), import_and_call, tensors, check_sum, **flags)
        )
        candidates.append(Candidate(_import_only_label(name), import_only, tensors, lambda _: None, **flags))
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
                    (seconds[_import_and_call_label(name)] - seconds[_import_only_label(name)])
                    / seconds[_NATIVE]
                )
            ),
        )
        for name in routes
    ]
    return Findings([case], promises)


def results(direction: Direction, setting: Setting) -> Findings:
    """A new 64x64 array with nothing cached, as a jitted call returns it, shared with torch."""
    operand = direction.make_operand((64, 64))
    if new_handle(operand) is None:
        return Findings(
            facts=["This JAX makes no new array on an old buffer, so fresh results were not timed."]
        )

    def check_shared(tensor: torch.Tensor) -> bool | None:
        return check_result(operand, tensor, must_share=True)

    candidates = [Candidate(_ONLY_NEW_ARRAY, new_handle, operand, lambda _: None, limit=True)]
    routes = [name for name in (STOCK, RAW, OURS) if name in direction.routes]
    for name in routes:
        cross = direction.routes[name]

        def export_new_array(array: jax.Array, cross: Any = cross) -> torch.Tensor:
            return cross(new_handle(array))

        candidates.append(
            Candidate(
                _export_label(name),
                export_new_array,
                operand,
                check_shared,
                ours=name == OURS,
                limit=name == RAW,
            )
        )
    case, rounds = ask(
        "to_torch/results",
        "What does a 64x64 array cost to hand to torch that a call has just returned?",
        candidates,
        setting,
        effort=4,
    )
    promises = []
    for above, below, words, limit in ((OURS, RAW, "at most", 2.0), (STOCK, OURS, "at least", 2.5)):
        if not {above, below} <= set(routes):
            continue
        promises.append(
            Promise(
                f"{above} / {below} for an array that a call has just returned",
                words if setting.device == "cpu" else "reported",
                limit if setting.device == "cpu" else None,
                "x",
                rounds.combine(
                    lambda seconds, above=above, below=below: (  # type: ignore[misc]
                        (seconds[_export_label(above)] - seconds[_ONLY_NEW_ARRAY])
                        / (seconds[_export_label(below)] - seconds[_ONLY_NEW_ARRAY])
                    )
                ),
            )
        )
    return Findings([case], promises)


def _export_label(name: str) -> str:
    return f"handed over by {name}"


def _import_and_call_label(name: str) -> str:
    return f"three imports and the jit call, {name}"


def _import_only_label(name: str) -> str:
    return f"three imports, {name}"
