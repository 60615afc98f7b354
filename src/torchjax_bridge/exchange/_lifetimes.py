"""Memory on CUDA that is freed while work that reads it is still queued. The host never waits.

On CUDA a call returns before its kernels run. Each framework frees memory in the order of its own streams and does
not know the other's:

* A tensor shared with JAX. XLA lets go of it as soon as all kernels that read it are *queued*, and torch's
  allocator would give the memory out at once. `record_xla_stream` tells the allocator XLA's compute stream, so that
  it waits for an event there (``Tensor.record_stream``).
* An array shared with torch. When the tensor dies, kernels on torch's stream may still read it. `hold_for_torch`
  keeps the memory until an event on torch's current stream of that moment has passed.

Neither helps work on streams that are current in neither framework when the memory is freed.
"""

import atexit
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import torch

from ._fork import forked

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # it is experimental
    buffer_callback = None  # type: ignore[assignment]

__all__ = ["hold_for_torch", "record_xla_stream"]


def record_xla_stream(tensor: torch.Tensor, device: jax.Device) -> None:
    """Let torch's allocator reuse a tensor's memory only after what XLA has queued when the memory is freed.

    Does nothing for memory that is not from torch's caching allocator, and where XLA does not tell its stream.
    """
    stream = _compute_streams.get(device, _UNKNOWN)
    if stream is _UNKNOWN:
        stream = _learn(tensor.device, device)
    _release()
    if stream is None:
        return
    try:
        tensor.record_stream(stream)
    except RuntimeError as err:
        if "ptr_info" not in str(err):  # how the backend cudaMallocAsync says that the memory is not its own
            raise


_UNKNOWN: Any = object()
_compute_streams: dict[jax.Device, Any] = {}
_lock = threading.Lock()


def _learn(torch_device: torch.device, device: jax.Device) -> Any:
    """The stream on which XLA computes on a device, or None; found once, by a callback that is told it."""
    with _lock:
        if device not in _compute_streams:
            pointer = None
            if buffer_callback is not None:
                # In its own thread, where no trace and no default device of the caller is active.
                with ThreadPoolExecutor(1, "torchjax-bridge-stream") as pool:
                    pointer = pool.submit(_compute_stream, device).result()
            _compute_streams[device] = torch.cuda.ExternalStream(pointer, torch_device) if pointer else None
    return _compute_streams[device]


def _compute_stream(device: jax.Device) -> int | None:
    told: list[int] = []

    def note(context: Any, out: Any, x: Any) -> None:
        del out, x  # the result is not used, so nothing is written to it
        told.append(int(context.stream))

    x = jax.device_put(np.zeros(1, np.int32), device)  # integers, for jax_debug_nans looks at the result
    try:
        jax.block_until_ready(jax.jit(buffer_callback(note, jax.ShapeDtypeStruct(x.shape, x.dtype)))(x))
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return None
    return told[0] if told else None


def hold_for_torch(tensor: torch.Tensor, owner: torch.Tensor) -> None:
    """Keep JAX's memory until torch has read it: until an event on the stream that is current when ``tensor`` dies.

    Args:
        tensor: What the caller gets. It dies with the last tensor, view or graph that uses its storage.
        owner: A tensor of another storage that owns the memory, even if the array is deleted.

    Whether the event has passed is looked up at later crossings, and until then the memory is not JAX's again. A
    tensor that dies while a CUDA graph is captured is read at each replay, so its memory is kept for good.
    """
    _release()
    reference = weakref.ref(tensor.untyped_storage(), _died)
    _exported[id(reference)] = reference, owner  # by number, since a reference compares as what it refers to


_exported: dict[int, tuple[weakref.ref, torch.Tensor]] = {}
_in_flight: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()
_kept: list[torch.Tensor] = []
atexit.register(_exported.clear)  # at exit, CUDA may be gone before the tensors


def _died(reference: weakref.ref) -> None:
    _, owner = _exported.pop(id(reference))
    if forked() or torch.cuda.is_current_stream_capturing():  # a forked child has no CUDA to ask
        _kept.append(owner)
        return
    _in_flight.append((torch.cuda.current_stream(owner.device).record_event(), owner))
    del owner
    _release()


def _release() -> None:
    """Let go of the memory whose events have passed. Any thread may call it, also from within itself."""
    if not _in_flight or torch.cuda.is_current_stream_capturing():  # a query would end the capture
        return
    while True:
        try:
            first = _in_flight.popleft()  # so that no other thread looks at the same one
        except IndexError:
            return
        passed = False
        try:
            passed = first[0].query()
        finally:
            if not passed:  # also if CUDA cannot be asked
                _in_flight.appendleft(first)
        if not passed:
            return
