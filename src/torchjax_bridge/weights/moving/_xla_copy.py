"""Copying a large strided host tensor into row-major memory with the transposition inside of XLA.

``jax.device_put`` of a numpy array that is not row-major lays it out with a vectorised plan of XLA's
(``xla/pjrt/transpose.cc``), on the calling thread and without the GIL. That takes half the processor time of any
route through torch; so several threads, each with a leaf of its own, outrun torch's threads inside one leaf.

Owns that detour and the one reason to take it, size. Bits are moved and never read as numbers: what crosses is an
unsigned integer of the same width (a pair of floats for eight bytes, which x64 does not concern), so no setting of
JAX has a say, and a thread of its own has no trace, default device or transfer guard around it.
"""

import jax
import torch

from torchjax_bridge.errors import DeviceError
from torchjax_bridge.exchange import array_to_torch, jax_device

__all__ = ["lay_out", "pays"]

_STANDS_FOR = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.complex64}
# Below this the call itself, a quarter of a millisecond in Python, is a good part of the time.
_LARGE_BYTES = 1 << 20
# Runs shorter than this (the 3x3 of a kernel) are gone through element by element. Where such are written, torch is
# faster; where such are read, it is for as long as its cache holds what it reads and writes.
_SHORTEST_RUN = 16
_LARGE_BYTES_IN_SHORT_RUNS = 4 << 20


def pays(tensor: torch.Tensor) -> bool:
    """Whether `lay_out` can copy this tensor, and is the fastest way to."""
    return (
        tensor.is_cpu
        and tensor.nbytes >= _LARGE_BYTES
        and (tensor.nbytes >= _LARGE_BYTES_IN_SHORT_RUNS or _run(tensor) >= _SHORTEST_RUN)
        and tensor.shape[-1] >= _SHORTEST_RUN
        and tensor.element_size() in _STANDS_FOR
        and not (tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj())
        and _host() is not None
    )


def lay_out(tensor: torch.Tensor) -> torch.Tensor:
    """A row-major copy of a tensor for which it `pays`, in memory of XLA's that nothing else holds.

    To be called on a thread of its own, as the module says.
    """
    bits = tensor.view(_STANDS_FOR[tensor.element_size()])
    # A guard in JAX's configuration reaches every thread, and is about the user's transfers; this is none.
    with jax.transfer_guard_host_to_device("allow"):
        # may_alias=False: the source may change as soon as the call has returned.
        array = jax.device_put(bits.numpy(), _host(), may_alias=False)
    return array_to_torch(array).view(tensor.dtype)


def _run(tensor: torch.Tensor) -> int:
    """How many elements lie one after another along one axis."""
    return max(
        (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride == 1), default=1
    )


def _host() -> jax.Device | None:
    try:
        return jax_device("cpu")
    except DeviceError:  # JAX_PLATFORMS leaves the CPU out
        return None
