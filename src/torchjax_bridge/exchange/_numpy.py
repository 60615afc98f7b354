"""NumPy arrays as tensors on the same memory, and the numbers and strings that are passed through.

A NumPy array crosses as a tensor on its memory. It is copied where torch allows no such tensor: negative strides,
another byte order, read-only memory. Numbers and strings have no memory to share and mean the same on both sides,
so they are passed through. NumPy's scalars are such numbers.
"""

from typing import Any

import jax
import numpy as np
import torch

from torchjax_bridge.errors import DtypeError, UnsupportedLeafError

from ._dtypes import JAX_TO_TORCH, TORCH_TO_JAX, jax_dtype_fix
from ._paths import Path
from ._refusals import cannot_share, leaf_name

__all__ = ["is_number_or_string", "numpy_as_tensor"]

_NUMBERS_AND_STRINGS = (bool, int, float, complex, str, bytes, np.number, np.bool_)
# torch.from_numpy refuses the dtypes of ml_dtypes, so their memory is viewed as unsigned integers of the same size.
_SAME_SIZE_UINTS = {
    of_torch: {1: torch.uint8, 2: torch.uint16}[of_numpy.itemsize]
    for of_numpy, of_torch in JAX_TO_TORCH.items()
    if of_numpy.isbuiltin == 2
}
_PLAIN_CLASSES = (np.ndarray, np.memmap)


def is_number_or_string(leaf: Any) -> bool:
    """Whether a leaf is a number, a bool or a string, NumPy's scalars included."""
    return isinstance(leaf, _NUMBERS_AND_STRINGS) or (
        isinstance(leaf, np.generic) and leaf.dtype in JAX_TO_TORCH
    )


def numpy_as_tensor(
    array: np.ndarray, copy: bool | None, path: Path, framework: str
) -> tuple[torch.Tensor, bool]:
    """A tensor of the array's values, and whether it is a copy.

    Args:
        array: The array.
        copy: ``False`` raises where only a copy is possible.
        path: Where the leaf sits in its tree, for error messages.
        framework: ``"JAX"`` or ``"torch"``: where the tensor goes.

    Raises:
        UnsupportedLeafError: A subclass that may mean more than its memory.
        DtypeError: A dtype that does not cross.
        ShareError: ``copy=False``, and torch allows no tensor on this memory.
    """
    _check_array(array, path, framework)
    dtype = JAX_TO_TORCH[array.dtype.newbyteorder("=")]
    stored_dtype = _SAME_SIZE_UINTS.get(dtype, dtype)
    if stored_dtype is not dtype:
        array = array.view(TORCH_TO_JAX[stored_dtype].newbyteorder(array.dtype.byteorder))
    reason = _why_not_shareable(array, framework)
    if reason:
        if copy is False:
            cannot_share(path, framework, reason)
        tensor = torch.empty(array.shape, dtype=dtype, device="cpu")
        np.copyto(tensor.view(stored_dtype).numpy(), array)
        return tensor, True
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))  # torch warns of read-only memory; JAX never writes
    return torch.from_numpy(array).view(dtype), False


def _why_not_shareable(array: np.ndarray, framework: str) -> str:
    if not array.dtype.isnative:
        return f"its bytes are in another order ({array.dtype.str!r}) than this machine's"
    if array.size and any(stride < 0 or stride % array.itemsize for stride in array.strides):
        return (
            f"its strides {array.strides} are negative or no multiples of its {array.itemsize}-byte elements"
        )
    if not array.flags.aligned:
        return f"its address is not a multiple of its {array.itemsize}-byte elements"
    if framework == "torch" and not array.flags.writeable:
        return "it is read-only, and torch has no read-only tensors"
    return ""


def _check_array(array: np.ndarray, path: Path, framework: str) -> None:
    cls = type(array)
    if cls not in _PLAIN_CLASSES and array.dtype.names is None:
        fix = (
            "Pass it.filled(value): its mask does not cross."
            if isinstance(array, np.ma.MaskedArray)
            else "If only its data matters, pass np.asarray(it)."
        )
        raise UnsupportedLeafError(
            f"cannot share {leaf_name(path)} with {framework}: it is a {cls.__module__}.{cls.__qualname__}, a "
            f"numpy.ndarray subclass that may mean more than its memory. {fix}"
        )
    if array.dtype.newbyteorder("=") not in JAX_TO_TORCH:
        raise DtypeError(
            f"cannot share {leaf_name(path)} with {framework}: it is a numpy.ndarray of dtype {array.dtype}, which "
            f"does not cross. {_fix(array.dtype)}"
        )


def _fix(dtype: np.dtype) -> str:
    if dtype == jax.dtypes.float0:
        return "It is JAX's gradient of an integer input and holds no values: leave it out, or pass zeros."
    if dtype.names is not None:
        return "Pass its fields: {name: array[name] for name in array.dtype.names}."
    if dtype.kind in "OSUT":
        return "Pass array.tolist(), or array.astype(...) with a number's dtype."
    if dtype.kind in "mM":
        return "Pass array.astype(numpy.int64)."
    if dtype in (np.longdouble, np.clongdouble):
        return "Pass array.astype(numpy.float64), or numpy.complex128."
    return jax_dtype_fix(dtype)


class _Writable:
    """Read-only memory presented as writable, through NumPy's array interface."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the memory alive
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}
