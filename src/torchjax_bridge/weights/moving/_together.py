"""Copies many small CPU tensors into arrays by one compiled call for up to 64 of them.

An array of its own for each, through DLPack, takes several microseconds to make and as many to drop. A compiled
program makes all of its outputs at once, in a third of that time. The tensors are its arguments, as NumPy arrays,
and their copies its results. Programs are compiled for shapes and dtypes, of which a model repeats a few, and kept.
That takes half a millisecond a tensor, so only what is copied a second time is copied so.

Bits are copied and never read as numbers. The memory of the copies is XLA's.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import torch

from torchjax_bridge.errors import DeviceError
from torchjax_bridge.exchange import jax_device, jax_dtype, numpy_view

from ._executor import copy_threads
from ._row_major import cast_to

__all__ = ["Together"]

_GROUP = 64  # with more, a call is no faster, and a program takes longer to compile
_FEW = 32  # with fewer, little is gained
_SMALL_BYTES = 1 << 14

# What NumPy sees of each dtype. 64 bits may have to be narrowed, and complex numbers may have a conj bit.
_BITS = {
    dtype: dtype
    for dtype in (
        torch.float32, torch.float16, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
        torch.uint32, torch.bool,
    )
} | {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}  # fmt: skip

Signature = tuple[tuple[torch.Size, torch.dtype], ...]


class Together:
    """The small ones among some tensors, by their places, in groups that are copied by one call each.

    Args:
        tensors: The tensors; later ones have the same shapes, dtypes and devices.
        cast: What floating-point tensors are cast to; None keeps every dtype.
    """

    def __init__(self, tensors: Mapping[int, torch.Tensor], cast: torch.dtype | None) -> None:
        kinds = {
            place: (tensor.shape, dtype)
            for place, tensor in tensors.items()
            if tensor.is_cpu
            and tensor.nbytes <= _SMALL_BYTES
            and (dtype := cast_to(tensor.dtype, cast)) in _BITS
        }
        # Layers of one shape are neighbours, so that most groups have the same program.
        order = sorted(kinds, key=lambda place: (str(kinds[place][1]), tuple(kinds[place][0])))
        starts = range(0, len(order), _GROUP) if len(order) >= _FEW and _has_cpu() else ()
        groups = [order[start : start + _GROUP] for start in starts]
        self._groups = [_Group(group, tuple(kinds[place] for place in group)) for group in groups]

    def copy(self, tensors: Mapping[int, torch.Tensor]) -> dict[int, jax.Array]:
        """Copies of the tensors of each group that is here completely, from the second time on, by their places.

        They are finished when this returns.
        """
        copies: dict[int, jax.Array] = {}
        # A guard in JAX's configuration is for the user's transfers, and a NaN is a value as any other.
        with (
            jax.transfer_guard_host_to_device("allow"),
            jax.debug_nans(False),
            jax.debug_infs(False),
            jax.disable_jit(False),
        ):
            for group in self._groups:
                if all(map(tensors.__contains__, group.places)):
                    copies.update(group.copy([tensors[place] for place in group.places]))
            jax.block_until_ready(list(copies.values()))  # until then, the sources may be read in place
        return copies


class _Group:
    def __init__(self, places: Sequence[int], signature: Signature) -> None:
        self.places = places
        self._signature = signature
        self._program: Any = None
        self._used = False
        self._last: tuple[Sequence[torch.Tensor], Sequence[Any]] = [], []

    def copy(self, tensors: Sequence[torch.Tensor]) -> Iterable[tuple[int, jax.Array]]:
        if self._program is None:
            if not self._used:
                self._used = True
                return ()
            self._program = _program(self._signature)
        before, sources = self._last
        if len(before) != len(tensors) or not all(map(operator.is_, tensors, before)):
            try:
                if any(map(torch.Tensor.is_neg, tensors)):  # DLPack leaves the bit out
                    return ()
                sources = [
                    _as_numpy(tensor, dtype)
                    for tensor, (_, dtype) in zip(tensors, self._signature, strict=True)
                ]
            except (RuntimeError, BufferError):  # inside torch.func: each is refused by name
                return ()
            # A cast makes memory of its own, whose values would be old the next time.
            same = all(one.dtype is dtype for one, (_, dtype) in zip(tensors, self._signature, strict=True))
            self._last = (tensors, sources) if same else ([], [])
        return zip(self.places, self._program(*sources), strict=True)


def _as_numpy(tensor: torch.Tensor, dtype: torch.dtype) -> Any:
    """The bits of a tensor, which share its memory if it has this dtype."""
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    bits = _BITS[dtype]
    return numpy_view(tensor if bits is dtype else tensor.view(bits))


def _has_cpu() -> bool:
    try:
        return jax_device("cpu") is not None
    except DeviceError:  # JAX_PLATFORMS does not list the CPU
        return False


@lru_cache(maxsize=256)
def _program(signature: Signature) -> Any:
    """The compiled copies. Compiled on a thread without the caller's trace, mesh, default device and guards."""
    return copy_threads().submit(_compile, signature).result()


def _compile(signature: Signature) -> Any:
    host = jax.sharding.SingleDeviceSharding(jax_device("cpu"))
    dtypes = [jax_dtype(dtype) for _, dtype in signature]

    def copies(*arrays: jax.Array) -> list[jax.Array]:
        return [
            jnp.copy(array) if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)
            for array, dtype in zip(arrays, dtypes, strict=True)
        ]

    arguments = [
        jax.ShapeDtypeStruct(tuple(shape), jax_dtype(_BITS[dtype]), sharding=host)
        for shape, dtype in signature
    ]
    return jax.jit(copies, out_shardings=host).lower(*arguments).compile()
