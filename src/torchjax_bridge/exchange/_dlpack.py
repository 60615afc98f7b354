"""The only file that touches DLPack capsules: imports torch memory into JAX, exports JAX memory to torch.

Two paths do the same work. The *public* path is ``jax.dlpack.from_dlpack`` and ``torch.from_dlpack``. The
*fast* path calls the private functions underneath (``torch._C._to_dlpack``, ``torch._C._from_dlpack`` and
jaxlib's two capsule functions). They are tried once, on real tensors, before the first crossing. If the trial
fails, the public path is used. ``TORCHJAX_BRIDGE_DLPACK=public`` forces the public path; ``=fast`` raises
instead of falling back.

Nothing here copies or casts. The callers (``_tensors``, ``_trees``) pass only what DLPack transfers without loss:

* to `import_cpu` and `import_cuda`: a dense, 64-byte-aligned, strided tensor without ``requires_grad``, conj
  or neg bit, of a dtype in the table and, with x64 off, not a 64-bit one;
* to `export`: any ``jax.Array``. It raises for an array that is deleted, on several devices, or of a dtype that
  torch lacks (the trial checks the dtypes).

On CUDA the order is kept by streams and the host is never blocked. The consumer names the stream it will read
on, and the producer makes that stream wait for an event, as DLPack's ``stream`` argument prescribes
(https://data-apis.org/array-api/latest/API_specification/generated/array_api.array.__dlpack__.html).
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import dlpack as torch_dlpack

from torchjax_bridge.errors import ExchangeError

from ._devices import jax_device
from ._fork import at_fork, forked, note_jax_started, refuse_in_fork

# The class of every array that is neither a tracer nor a PRNG key. Comparing with it takes a third of the time of
# isinstance(x, jax.Array). Where jaxlib lacks the name, no array is of this class and all take the general path.
try:
    from jaxlib._jax import ArrayImpl as PlainArray
except ImportError:

    class PlainArray: ...  # type: ignore[no-redef]


__all__ = [
    "ALIGNMENT",
    "PATH_VARIABLE",
    "Choice",
    "PlainArray",
    "choice",
    "export",
    "import_cpu",
    "import_cuda",
]

# The environment variable that forces a path.
PATH_VARIABLE = "TORCHJAX_BRIDGE_DLPACK"

# XLA's CPU client views only buffers aligned to this many bytes. It copies others silently.
ALIGNMENT = 64

_OneDevice = jax.sharding.SingleDeviceSharding
_KDL_CPU = 1
_KDL_CUDA = 2
_Import = Callable[[torch.Tensor], jax.Array]
_Export = Callable[[jax.Array], torch.Tensor]


@dataclass(frozen=True)
class Choice:
    """Which path was chosen, and why."""

    path: str
    """``"fast"`` or ``"public"``."""
    reason: str
    """One sentence for a person, as ``torchjax-bridge doctor`` prints it."""


def import_cpu(tensor: torch.Tensor) -> jax.Array:
    """A ``jax.Array`` on torch's CPU memory; permuted strides become a permuted layout."""
    choice()
    return import_cpu(tensor)  # now rebound to the chosen path


def import_cuda(tensor: torch.Tensor) -> jax.Array:
    """A ``jax.Array`` on torch's CUDA memory; JAX's stream waits for torch's current stream."""
    choice()
    return import_cuda(tensor)


def export(array: jax.Array) -> torch.Tensor:
    """A ``torch.Tensor`` on JAX's memory. On the CPU this waits until the array is computed."""
    choice()
    return export(array)


def choice() -> Choice:
    """The path in use; the first call chooses it and rebinds the three functions above.

    Raises:
        ExchangeError: The environment variable holds an unknown word, or asks for a fast path that does
            not work here.
    """
    if _chosen is None:
        with _lock:
            if _chosen is None:
                return set_path(os.environ.get(PATH_VARIABLE, ""))
    return _chosen


def set_path(wanted: str) -> Choice:
    """Choose again, by ``"fast"``, ``"public"`` or ``""`` (fast if it works), for the whole process.

    For tests, which run everything on both paths. Existing arrays and tensors stay as they are.

    Raises:
        ExchangeError: As for `choice`; then the path in use stays.
    """
    global _chosen
    _chosen = _choose(wanted)
    note_jax_started()
    return _chosen


def reset_path() -> None:
    """Return to the state before the first crossing; the next crossing reads the environment variable."""
    global _chosen
    _chosen = None
    _bind(*_UNCHOSEN)


_UNCHOSEN = (import_cpu, import_cuda, export)
_chosen: Choice | None = None
_lock = threading.Lock()


def _choose(wanted: str) -> Choice:
    if wanted not in ("", "fast", "public"):
        raise ExchangeError(
            f"{PATH_VARIABLE}={wanted!r} is neither 'fast' nor 'public'. Unset it, or set one of these."
        )
    if wanted == "public":
        _bind(_public_import_cpu, _public_import_cuda, _public_export)
        return Choice("public", f"{PATH_VARIABLE}=public asks for it.")
    try:
        refuse_in_fork("try the private capsule functions")  # the trial needs JAX's threads
        fast = _fast_functions()
        # In its own thread, where no jit trace, fake mode or default device of the caller is active.
        with ThreadPoolExecutor(1, "torchjax-bridge-trial") as pool:
            pool.submit(_try_functions, fast[0], fast[2]).result()
    except _TRIAL_ERRORS as err:
        reason = f"the private capsule functions do not work here: {type(err).__name__}: {err}"
        if wanted == "fast":
            raise ExchangeError(
                f"{PATH_VARIABLE}=fast, but {reason}. Unset it to use the public path."
            ) from err
        _bind(_public_import_cpu, _public_import_cuda, _public_export)
        return Choice("public", reason)
    _bind(*fast)
    return Choice("fast", "the private capsule functions passed their trial.")


def _refuse_unfinished(export_finished: _Export) -> _Export:
    """`export` for a forked child, where an array whose computation had not finished never will."""

    def export(array: Any) -> torch.Tensor:
        if not array.is_deleted() and not array.is_ready():
            refuse_in_fork("wait for an array that was being computed")
        return export_finished(array)

    return export


def _bind(from_cpu: _Import, from_cuda: _Import, to_torch: _Export) -> None:
    """Make these the module's `import_cpu`, `import_cuda` and `export`."""
    namespace = globals()
    if forked():
        to_torch = _refuse_unfinished(to_torch)
    namespace["import_cpu"], namespace["import_cuda"], namespace["export"] = from_cpu, from_cuda, to_torch


def _rebind_in_child() -> None:
    if forked() and _chosen is not None:
        _bind(import_cpu, import_cuda, export)


at_fork(_rebind_in_child)


# --- the public path -------------------------------------------------------------------------------


class _HostMemory:
    """A CPU tensor as a producer of the DLPack protocol.

    ``Tensor.__dlpack_device__`` reports a CUDA device for pinned memory, and JAX would look for that device.
    Pinned memory is host memory.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return torch_dlpack.to_dlpack(self._tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _KDL_CPU, 0


def _public_import_cpu(tensor: torch.Tensor) -> jax.Array:
    return jax.dlpack.from_dlpack(_HostMemory(tensor))


def _public_import_cuda(tensor: torch.Tensor) -> jax.Array:
    # torch exports only memory of its current device.
    with torch.cuda.device(tensor.device):
        return jax.dlpack.from_dlpack(tensor)


def _public_export(array: jax.Array) -> torch.Tensor:
    return torch.from_dlpack(array)


# --- the fast path: the private names that touch capsules ------------------------------------------

# Raised when a function is missing, takes other arguments or fails, and by `_try_functions` for a wrong result.
_TRIAL_ERRORS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, BufferError)


def _fast_functions() -> tuple[_Import, _Import, _Export]:
    from jaxlib import _jax

    array_from_capsule = _jax.dlpack_managed_tensor_to_buffer
    capsule_from_array = _jax.buffer_to_dlpack_managed_tensor
    capsule_from_tensor: Any = torch._C._to_dlpack
    tensor_from_capsule: Any = torch._C._from_dlpack
    host = jax_device("cpu")

    # Before 0.10.2 jaxlib read the kind of memory from the capsule and took no argument for it.
    if "dl_device_type" in (array_from_capsule.__doc__ or ""):

        def import_cpu(tensor: torch.Tensor) -> jax.Array:
            return array_from_capsule(capsule_from_tensor(tensor), host, None, None, _KDL_CPU)

        on_gpu: tuple[int, ...] = (_KDL_CUDA,)
    else:

        def import_cpu(tensor: torch.Tensor) -> jax.Array:
            return array_from_capsule(capsule_from_tensor(tensor), host, None, None)

        on_gpu = ()

    def import_cuda(tensor: torch.Tensor) -> jax.Array:
        device: Any = jax_device(tensor.device)
        stream = device.get_stream_for_external_ready_events()
        with torch.cuda.device(tensor.device):  # torch exports only memory of its current device
            capsule = tensor.__dlpack__(stream=stream)
        return array_from_capsule(capsule, device, stream, None, *on_gpu)

    # The capsule must hold its own reference to the buffer. If it held the caller's array, array.delete() would
    # abort the process while torch still reads ("Non-zero type 1 hold on destruction"). array.clone() gives such
    # a reference. So does addressable_data(0), but for a fresh result it first builds a sharding, which takes
    # longer than the rest of the crossing.
    new_reference: Any = getattr(_jax.ArrayImpl, "clone", None) or (lambda array: array.addressable_data(0))

    def export_cpu(array: Any) -> torch.Tensor:
        sharding = array.sharding
        if type(sharding) is not _OneDevice and sharding.num_devices != 1:
            raise ValueError("the array is on several devices")  # its capsule would hold only one shard
        if array.is_deleted():  # its clone would be a null pointer
            raise RuntimeError("Array has been deleted.")
        return tensor_from_capsule(capsule_from_array(new_reference(array)))

    def export_any_device(array: jax.Array) -> torch.Tensor:
        (device,) = array.devices()
        if device.platform == "cpu":
            return export_cpu(array)
        if array.sharding.memory_kind not in (None, "device"):
            return _public_export(array)
        # DLPack writes the legacy default stream, which torch calls 0, as 1.
        stream = torch.cuda.current_stream(device.local_hardware_id).cuda_stream or 1
        return tensor_from_capsule(capsule_from_array(array.addressable_data(0), stream=stream))

    cpu_only = {device.platform for device in jax.local_devices()} == {"cpu"} and not _has_gpu()
    is_cuda = torch.version.hip is None  # ROCm is another DLPack device; the public path serves it
    return (
        import_cpu,
        import_cuda if is_cuda else _public_import_cuda,
        export_cpu if cpu_only else export_any_device,
    )


def _has_gpu() -> bool:
    try:
        return bool(jax.local_devices(backend="gpu"))
    except RuntimeError:  # JAX has no such backend
        return False


# Dtypes that only JAX has. JAX exports no capsule for some of them; torch refuses the capsules of the others.
_NOT_IN_TORCH = (
    "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"
)  # fmt: skip


def _raises(function: Callable[[Any], Any], array: Any) -> bool:
    try:
        function(array)
    except (RuntimeError, BufferError):
        return True
    return False


def _try_functions(from_torch: Callable[[Any], Any], to_torch: Callable[[Any], Any]) -> None:
    """Raise unless both functions share memory, keep values and strides, and raise where they must."""
    tensor = torch.arange(12, dtype=torch.float32, device="cpu").view(3, 4).t()
    array = from_torch(tensor)
    if not isinstance(array, jax.Array) or array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise RuntimeError("an imported tensor does not share memory")
    if array.shape != (4, 3) or array.dtype != np.float32 or float(np.asarray(array)[3, 1]) != 7.0:
        raise RuntimeError("an imported tensor has other values")
    exported = to_torch(jax.device_put(np.arange(6, dtype=np.int32).reshape(2, 3), jax_device("cpu")))
    if exported.dtype != torch.int32 or exported.tolist() != [[0, 1, 2], [3, 4, 5]]:
        raise RuntimeError("an exported array has other values")
    for name in _NOT_IN_TORCH:
        dtype = getattr(jnp, name, None)  # older releases have fewer of them
        if dtype is not None and not _raises(to_torch, jax.device_put(np.zeros(4, dtype), jax_device("cpu"))):
            raise RuntimeError(f"an array of {name}, which torch lacks, is exported")
    exported = to_torch(array)
    if exported.data_ptr() != tensor.data_ptr() or not torch.equal(exported, tensor):
        raise RuntimeError("an exported array does not share memory")
