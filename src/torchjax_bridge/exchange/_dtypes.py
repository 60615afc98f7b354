"""The dtype table: which torch dtype is which JAX dtype, and what to do about a dtype without counterpart.

Both maps are derived from `_PAIRS`. ``_tensors`` decides whether a 64-bit dtype may cross with x64 off.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge.errors import DtypeError

__all__ = ["JAX_TO_TORCH", "NEEDS_X64", "TORCH_TO_JAX", "jax_dtype", "torch_dtype"]

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

TORCH_TO_JAX: dict[torch.dtype, np.dtype] = {of_torch: np.dtype(of_jax) for of_torch, of_jax in _PAIRS}
JAX_TO_TORCH: dict[np.dtype, torch.dtype] = {of_jax: of_torch for of_torch, of_jax in TORCH_TO_JAX.items()}

# What each 64-bit dtype becomes with x64 off if all values fit; None for floats, which are never narrowed.
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
        An ``np.dtype``. 64-bit dtypes are returned as they are, whether or not x64 is on.

    Raises:
        DtypeError: The dtype has no counterpart (``torch.complex32``, quantized and sub-byte dtypes).

    >>> import torch
    >>> jax_dtype(torch.bfloat16)
    dtype(bfloat16)
    """
    if isinstance(dtype, torch.dtype):
        if dtype in TORCH_TO_JAX:
            return TORCH_TO_JAX[dtype]
        raise DtypeError(f"JAX has no dtype for {dtype}. {torch_dtype_fix(dtype)}")
    known = _as_numpy_dtype(dtype)
    if known in JAX_TO_TORCH:
        return known
    raise DtypeError(f"torch has no dtype for {known}, so it cannot cross.")


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
    if known in JAX_TO_TORCH:
        return JAX_TO_TORCH[known]
    raise DtypeError(f"torch has no dtype for {known}. {jax_dtype_fix(known)}")


def torch_dtype_fix(dtype: torch.dtype) -> str:
    """Advice for a torch dtype without JAX counterpart."""
    name = str(dtype).removeprefix("torch.")
    if name.startswith(("qint", "quint")):
        return "Call .dequantize() first, or pass .int_repr() with its scale and zero point."
    if name == "complex32":
        return "Cast it to torch.complex64 first."
    if name.startswith(("int", "uint", "bits", "float4")):
        return "It packs values below a byte: view it as torch.uint8, or unpack it to torch.int8, first."
    return "Cast it to one of the dtypes of torchjax_bridge.jax_dtype first."


def jax_dtype_fix(dtype: Any) -> str:
    """Advice for a JAX dtype without torch counterpart."""
    name = str(dtype)
    if name.startswith("key<"):
        return "Pass jax.random.key_data(key), and call jax.random.wrap_key_data on the result."
    if name.startswith(("int", "uint")):
        return "Cast it to jnp.int8 first."
    if name.startswith("float"):
        return "Cast it to jnp.float16 or jnp.float32 first."
    return "Cast it to one of the dtypes of torchjax_bridge.torch_dtype first."


def _as_numpy_dtype(dtype: Any) -> np.dtype:
    try:
        if dtype is None:
            raise TypeError("numpy would read None as float64")
        return jnp.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as err:  # numpy parses some strings as record formats
        if str(dtype).startswith("key<"):
            raise DtypeError(f"torch has no dtype for {dtype}. {jax_dtype_fix(dtype)}") from err
        raise DtypeError(f"{dtype!r} is not a dtype that torch, JAX or numpy knows.") from err
