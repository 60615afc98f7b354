"""The crossing on a GPU: streams keep the order, the host is never blocked, freed memory is not reused too soon.

The consumer names the stream it will read on, and the producer makes that stream wait for an event, as DLPack's
``stream`` argument prescribes
(https://data-apis.org/array-api/latest/API_specification/generated/array_api.array.__dlpack__.html). The first
crossing on a GPU tries the fast path there, so that a process that uses none pays for none.
"""

import threading
from typing import Any

import jax
import torch
from torch.utils import dlpack as torch_dlpack

from torchjax_bridge.errors import ExchangeError

from ._devices import jax_device
from ._dlpack_trial import Choice, Export, Import, choose, wanted_path
from ._lifetimes import hold_for_torch, record_xla_stream

__all__ = ["cuda_choice", "export_cuda", "import_cuda", "set_cuda_path"]

_KDL_CUDA = 2


def import_cuda(tensor: torch.Tensor) -> jax.Array:
    """A ``jax.Array`` on torch's CUDA memory; JAX's stream waits for torch's current stream."""
    _refuse_in_capture()
    device = jax_device(tensor.device)
    array = _pair()[0](tensor)
    record_xla_stream(tensor, device)
    return array


def export_cuda(array: jax.Array) -> torch.Tensor:
    """A ``torch.Tensor`` on JAX's CUDA memory; torch's current stream waits for JAX's.

    Raises:
        BufferError: The array is in host memory, which torch takes from no JAX array on a GPU.
        ExchangeError: A CUDA graph is captured.
    """
    _refuse_in_capture()
    kind = array.sharding.memory_kind
    if kind not in (None, "device"):
        raise BufferError(f"the array is in memory of kind {kind!r}, and torch takes only device memory")
    # A reference of its own: the capsule must not hold the caller's array, which may be deleted.
    owner = _pair()[1](array.addressable_data(0))
    # What the caller gets has a storage of its own, whose end is seen while `owner` still has the memory.
    tensor = torch_dlpack.from_dlpack(torch_dlpack.to_dlpack(owner))
    hold_for_torch(tensor, owner)
    return tensor


def _refuse_in_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise ExchangeError(
            "cannot cross between torch and JAX while a CUDA graph is captured: what JAX does is not part of the "
            "graph. Cross before the capture, or call what needs JAX outside of it (with torch.compile, in "
            "another mode than 'reduce-overhead')."
        )


def cuda_choice() -> Choice | None:
    """The path in use on the GPU; None where torch and JAX do not both see one."""
    if not torch.cuda.is_available():
        return None
    try:
        jax.local_devices(backend="gpu")
    except RuntimeError:  # JAX has no such backend
        return None
    _pair()
    return _chosen


def set_cuda_path(wanted: str | None) -> None:
    """Let the next crossing on a GPU choose again; ``None`` lets it read the environment variable."""
    global _wanted, _functions, _chosen
    _wanted, _functions, _chosen = wanted, None, None


_wanted: str | None = None
_functions: tuple[Import, Export] | None = None
_chosen: Choice | None = None
_lock = threading.Lock()


def _pair() -> tuple[Import, Export]:
    global _functions, _chosen
    if _functions is None:
        with _lock:
            if _functions is None:
                wanted = wanted_path() if _wanted is None else _wanted
                public = _public_import, torch.from_dlpack
                if torch.version.hip is not None:  # ROCm is another DLPack device
                    _chosen, _functions = Choice("public", "the fast path knows CUDA, not ROCm."), public
                else:
                    _chosen, _functions = choose(wanted, _fast_functions, public, _current_device())
    return _functions


def _current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _public_import(tensor: torch.Tensor) -> jax.Array:
    with torch.cuda.device(tensor.device):  # torch exports only memory of its current device
        return jax.dlpack.from_dlpack(tensor)


def _fast_functions() -> tuple[Import, Export]:
    from jaxlib import _jax

    array_from_capsule = _jax.dlpack_managed_tensor_to_buffer
    capsule_from_array = _jax.buffer_to_dlpack_managed_tensor
    tensor_from_capsule: Any = torch._C._from_dlpack
    # Before 0.10.2 jaxlib read the kind of memory from the capsule and took no argument for it.
    kind = (_KDL_CUDA,) if "dl_device_type" in (array_from_capsule.__doc__ or "") else ()

    def fast_import(tensor: torch.Tensor) -> jax.Array:
        device: Any = jax_device(tensor.device)
        stream = _stream_of(device)
        with torch.cuda.device(tensor.device):  # torch exports only memory of its current device
            capsule = tensor.__dlpack__(stream=stream)
        return array_from_capsule(capsule, device, stream, None, *kind)

    def fast_export(array: Any) -> torch.Tensor:
        (device,) = array.devices()
        # DLPack writes the legacy default stream, which torch calls 0, as 1.
        stream = torch.cuda.current_stream(device.local_hardware_id).cuda_stream or 1
        return tensor_from_capsule(capsule_from_array(array, stream=stream))

    return fast_import, fast_export


def _stream_of(device: Any) -> int | None:
    """The stream on which XLA waits for others; None if this client has none."""
    try:
        return device.get_stream_for_external_ready_events()
    except jax.errors.JaxRuntimeError as err:
        if "UNIMPLEMENTED" not in str(err):
            raise
        return None
