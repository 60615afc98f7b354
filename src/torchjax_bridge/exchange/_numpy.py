"""NumPy arrays as tensors on the same memory, and the Python values that no crossing changes.

A NumPy array crosses as the tensor would that lies on its memory; where torch can lay none (negative strides,
another byte order, memory that may not be written to) it is copied. Numbers and strings have no memory to share and
mean the same on both sides, so they stay as they are, NumPy's scalars among them.
"""

from typing import Any

import jax
import numpy as np
import torch

from torchjax_bridge.errors import DtypeError, UnsupportedLeafError

from ._dtypes import JAX_OF, TORCH_OF, jax_dtype_fix
from ._paths import Path
from ._refusals import cannot_share, leaf_name

__all__ = ["numpy_as_tensor", "stays"]

_STAYS = (bool, int, float, complex, str, bytes, np.number, np.bool_)
# For a dtype that NumPy has from ml_dtypes, and that torch does not know there: words of its size.
_CARRIERS = {
    theirs: {1: torch.uint8, 2: torch.uint16}[dtype.itemsize]
    for dtype, theirs in TORCH_OF.items()
    if dtype.isbuiltin == 2
}
_PLAIN_KINDS = (np.ndarray, np.memmap)


def stays(leaf: Any) -> bool:
    """Whether a leaf is a number or a string, which is the same on both sides."""
    return isinstance(leaf, _STAYS) or (isinstance(leaf, np.generic) and leaf.dtype in TORCH_OF)


def numpy_as_tensor(
    array: np.ndarray, copy: bool | None, path: Path, other: str
) -> tuple[torch.Tensor, bool]:
    """A tensor of the array's values, and whether it is a copy; ``other`` (JAX or torch) is where it goes.

    Raises:
        UnsupportedLeafError: A subclass that means more than its memory.
        DtypeError: A dtype that does not cross.
        ShareError: ``copy=False``, and torch cannot lay a tensor there.
    """
    _refuse(array, path, other)
    dtype = TORCH_OF[array.dtype.newbyteorder("=")]
    carrier = _CARRIERS.get(dtype, dtype)
    if carrier is not dtype:
        array = array.view(JAX_OF[carrier].newbyteorder(array.dtype.byteorder))
    reason = _why_copy(array, other)
    if reason:
        if copy is False:
            cannot_share(path, other, reason)
        tensor = torch.empty(array.shape, dtype=dtype, device="cpu")
        np.copyto(tensor.view(carrier).numpy(), array)
        return tensor, True
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))  # torch warns of the flag; JAX never writes
    return torch.from_numpy(array).view(dtype), False


def _why_copy(array: np.ndarray, other: str) -> str:
    if not array.dtype.isnative:
        return f"its bytes are in another order ({array.dtype.str!r}) than this machine's"
    if array.size and any(stride < 0 or stride % array.itemsize for stride in array.strides):
        return f"its strides {array.strides} are negative or no multiples of {array.itemsize} bytes, as torch's are"
    if not array.flags.aligned:
        return f"its address is no multiple of its {array.itemsize} bytes"
    if other == "torch" and not array.flags.writeable:
        return "it is read-only, and torch has no read-only tensors"
    return ""


def _refuse(array: np.ndarray, path: Path, other: str) -> None:
    kind = type(array)
    if kind not in _PLAIN_KINDS and array.dtype.names is None:
        fix = (
            "Pass it.filled(value): its mask does not cross."
            if isinstance(array, np.ma.MaskedArray)
            else "If its data is all that matters, pass np.asarray(it)."
        )
        raise UnsupportedLeafError(
            f"cannot share {leaf_name(path)} with {other}: it is a {kind.__module__}.{kind.__qualname__}, a "
            f"numpy.ndarray subclass that may mean more than its memory. {fix}"
        )
    if array.dtype.newbyteorder("=") not in TORCH_OF:
        raise DtypeError(
            f"cannot share {leaf_name(path)} with {other}: it is a numpy.ndarray of dtype {array.dtype}, which "
            f"does not cross. {_fix(array.dtype)}"
        )


def _fix(dtype: np.dtype) -> str:
    if dtype == jax.dtypes.float0:
        return "It is JAX's gradient of an integer input and holds no values: leave it out, or send zeros."
    if dtype.names is not None:
        return "Pass its fields: {name: array[name] for name in array.dtype.names}."
    if dtype.kind in "OSUT":
        return "Pass array.tolist(), or array.astype(...) a number."
    if dtype.kind in "mM":
        return "Pass array.astype(numpy.int64)."
    if dtype in (np.longdouble, np.clongdouble):
        return "Pass array.astype(numpy.float64), or numpy.complex128."
    return jax_dtype_fix(dtype)


class _Writable:
    """Read-only memory in NumPy's array protocol, without the flag."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the memory
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}
