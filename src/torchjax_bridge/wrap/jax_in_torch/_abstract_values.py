"""Abstract values (shape, dtype) of flat lists of arrays, and small operations on such lists.

Outside of a program, cotangents follow torch's convention: the gradient of a complex variable is the
conjugate of JAX's. `conj` converts between the two.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["batched", "conj", "merge", "smooth", "strong", "struct"]


def merge(primals: Sequence[Any], wrt: Sequence[int], moving: Sequence[Any]) -> list[Any]:
    """The arguments ``primals``, with those at ``wrt`` replaced by ``moving``."""
    merged = list(primals)
    for position, value in zip(wrt, moving, strict=True):
        merged[position] = value
    return merged


def conj(arrays: Sequence[Any]) -> list[Any]:
    """Cotangents in torch's convention from JAX's, or the other way round."""
    return [jnp.conj(a) if jnp.issubdtype(a.dtype, jnp.complexfloating) else a for a in arrays]


def smooth(avals: Sequence[Any]) -> tuple[int, ...]:
    """The positions of the values with a float or complex dtype."""
    return tuple(i for i, aval in enumerate(avals) if jnp.issubdtype(aval.dtype, jnp.inexact))


def struct(aval: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and weak type."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def strong(aval: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype, strongly typed."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def batched(aval: Any, axis: int | None, size: int) -> jax.ShapeDtypeStruct:
    """The abstract value with one more axis, of ``size`` entries, at ``axis``."""
    if axis is None:
        return struct(aval)
    return jax.ShapeDtypeStruct((*aval.shape[:axis], size, *aval.shape[axis:]), aval.dtype)
