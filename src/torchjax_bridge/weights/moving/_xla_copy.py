"""Copies a large strided CPU tensor into row-major memory with XLA's transposition.

``jax.device_put`` of a numpy array that is not row-major transposes it with vector instructions
(``xla/pjrt/transpose.cc``), on the calling thread and without the GIL. That takes half the processor time of any
route through torch. So several threads with one leaf each are faster than all of torch's threads in one leaf.

Bits are copied and never read as numbers. JAX sees an unsigned integer of the same width (complex64 for eight
bytes), which x64 does not change. So no setting of JAX matters. The threads of `copy_threads` inherit no trace,
default device or transfer guard.
"""

import jax
import torch

from torchjax_bridge.errors import DeviceError
from torchjax_bridge.exchange import array_to_torch, jax_device, numpy_view

__all__ = ["is_fastest_for", "row_major_copy"]

_SAME_WIDTH = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.complex64}
# Below this, the call itself takes a good part of the time: a quarter of a millisecond in Python.
_LARGE_BYTES = 1 << 20
# XLA copies shorter runs (the 3x3 of a kernel) element by element. If it would write such runs, torch is faster.
# If it would read them, torch is faster while the cache holds the source and the copy.
_MIN_RUN = 16
_LARGE_BYTES_IN_SHORT_RUNS = 4 << 20


def is_fastest_for(tensor: torch.Tensor) -> bool:
    """Whether `row_major_copy` can copy this tensor and is the fastest way to do it."""
    return (
        tensor.is_cpu
        and tensor.nbytes >= _LARGE_BYTES
        and (tensor.nbytes >= _LARGE_BYTES_IN_SHORT_RUNS or _longest_run(tensor) >= _MIN_RUN)
        and tensor.shape[-1] >= _MIN_RUN
        and tensor.element_size() in _SAME_WIDTH
        and not (tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj())
        and _cpu_device() is not None
    )


def row_major_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A row-major copy in new memory of XLA's, of a tensor that passed `is_fastest_for`.

    Call it on a thread of `copy_threads`, for the reason given above.
    """
    bits = tensor.view(_SAME_WIDTH[tensor.element_size()])
    # A guard in JAX's configuration holds for every thread, but this is not one of the user's transfers.
    with jax.transfer_guard_host_to_device("allow"):
        # may_alias=False: the source may change as soon as the call has returned.
        array = jax.device_put(numpy_view(bits), _cpu_device(), may_alias=False)
    return array_to_torch(array).view(tensor.dtype)


def _longest_run(tensor: torch.Tensor) -> int:
    """The number of elements that are contiguous along one axis."""
    return max(
        (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride == 1), default=1
    )


def _cpu_device() -> jax.Device | None:
    try:
        return jax_device("cpu")
    except DeviceError:  # JAX_PLATFORMS does not list the CPU
        return None
