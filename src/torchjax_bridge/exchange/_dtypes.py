"""The dtype table: which torch dtype is which JAX dtype, and who cannot hold what.

One half is written (`_PAIRS`); the other half, and the sets of dtypes without counterpart, are derived.
Owns no policy: whether a 64-bit dtype may cross with x64 off is decided in ``_tensors``.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge.errors import DtypeError

__all__ = ["JAX_OF", "NEEDS_X64", "TORCH_OF", "jax_dtype", "torch_dtype"]

_PAIRS = (
    (torch.bool, jnp.bool_),
    (torch.uint8, jnp.uint8),
    (torch.uint16, jnp.uint16),
    (torch.uint32, jnp.uint32),
    (torch.uint64, jnp.uint64),
    (torch.int8, jnp.int8),
    (torch.int16, jnp.int16),
    (torch.int32, jnp.int32),
    (torch.int64, jnp.int64),
    (torch.float8_e4m3fn, jnp.float8_e4m3fn),
    (torch.float8_e4m3fnuz, jnp.float8_e4m3fnuz),
    (torch.float8_e5m2, jnp.float8_e5m2),
    (torch.float8_e5m2fnuz, jnp.float8_e5m2fnuz),
    (torch.float8_e8m0fnu, jnp.float8_e8m0fnu),
    (torch.bfloat16, jnp.bfloat16),
    (torch.float16, jnp.float16),
    (torch.float32, jnp.float32),
    (torch.float64, jnp.float64),
    (torch.complex64, jnp.complex64),
    (torch.complex128, jnp.complex128),
)

JAX_OF: dict[torch.dtype, np.dtype] = {ours: np.dtype(theirs) for ours, theirs in _PAIRS}
TORCH_OF: dict[np.dtype, torch.dtype] = {theirs: ours for ours, theirs in JAX_OF.items()}

# What each 64-bit dtype becomes with x64 off, when the values allow it; None where they never do.
NEEDS_X64: dict[torch.dtype, torch.dtype | None] = {
    torch.int64: torch.int32,
    torch.uint64: torch.uint32,
    torch.float64: None,
    torch.complex128: None,
}


def jax_dtype(dtype: Any) -> np.dtype:
    """The JAX (numpy) dtype that holds the same values as a torch dtype.

    Args:
        dtype: A ``torch.dtype``; or whatever ``jnp.dtype`` understands, returned as an ``np.dtype``
            when torch has a counterpart for it.

    Returns:
        An ``np.dtype``. 64-bit dtypes are returned as they are, whether or not x64 is on: this is a
        table, not a policy.

    Raises:
        DtypeError: The dtype has no counterpart (``torch.complex32``, quantized and sub-byte dtypes).

    >>> import torch
    >>> jax_dtype(torch.bfloat16)
    dtype(bfloat16)
    """
    if isinstance(dtype, torch.dtype):
        if dtype in JAX_OF:
            return JAX_OF[dtype]
        raise DtypeError(f"JAX has no dtype for {dtype}. {torch_dtype_fix(dtype)}")
    known = _as_numpy_dtype(dtype)
    if known in TORCH_OF:
        return known
    raise DtypeError(f"torch has no dtype for {known}, so it is not one of the dtypes that cross.")


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype that holds the same values as a JAX dtype.

    Args:
        dtype: Whatever ``jnp.dtype`` understands (``jnp.float32``, ``"bfloat16"``, an ``np.dtype``);
            or a ``torch.dtype`` that has a counterpart, returned as it is.

    Returns:
        A ``torch.dtype``.

    Raises:
        DtypeError: torch has no such dtype (``int4``, ``float8_e3m4``, PRNG keys, strings, ...).

    >>> import jax.numpy as jnp
    >>> torch_dtype(jnp.bfloat16)
    torch.bfloat16
    """
    if isinstance(dtype, torch.dtype):
        jax_dtype(dtype)
        return dtype
    known = _as_numpy_dtype(dtype)
    if known in TORCH_OF:
        return TORCH_OF[known]
    raise DtypeError(f"torch has no dtype for {known}. {jax_dtype_fix(known)}")


def torch_dtype_fix(dtype: torch.dtype) -> str:
    """What to type when a torch dtype has no JAX counterpart."""
    name = str(dtype).removeprefix("torch.")
    if name.startswith(("qint", "quint")):
        return "Call .dequantize() first, or send .int_repr() with its scale and zero point."
    if name == "complex32":
        return "Cast it to torch.complex64 first."
    if name.startswith(("int", "uint", "bits", "float4")):
        return "It packs values below a byte: view it as torch.uint8, or unpack it to torch.int8, first."
    return "Cast it to one of the dtypes of torchjax_bridge.jax_dtype first."


def jax_dtype_fix(dtype: Any) -> str:
    """What to type when a JAX dtype has no torch counterpart."""
    name = str(dtype)
    if name.startswith("key<"):
        return "Send jax.random.key_data(key), and jax.random.wrap_key_data what comes back."
    if name.startswith(("int", "uint")):
        return "Cast it to jnp.int8 first."
    if name.startswith("float"):
        return "Cast it to jnp.float16 or jnp.float32 first."
    return "Cast it to one of the dtypes of torchjax_bridge.torch_dtype first."


def _as_numpy_dtype(dtype: Any) -> np.dtype:
    try:
        if dtype is None:
            raise TypeError("numpy reads None as float64, which nobody means here")
        return jnp.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as err:  # numpy reads some strings as formats of records
        if str(dtype).startswith("key<"):
            raise DtypeError(f"torch has no dtype for {dtype}. {jax_dtype_fix(dtype)}") from err
        raise DtypeError(f"{dtype!r} is not a dtype that torch, JAX or numpy knows.") from err
