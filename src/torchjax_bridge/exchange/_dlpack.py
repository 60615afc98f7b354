"""The only file that touches DLPack capsules on the CPU: imports torch memory into JAX, and back.

Two paths do the same work. The *public* path is ``jax.dlpack.from_dlpack`` and ``torch.from_dlpack``. The
*fast* path calls the private functions underneath (``torch._C._to_dlpack``, ``torch._C._from_dlpack`` and
jaxlib's two capsule functions). They are tried once, on real tensors, before the first crossing. If the trial
fails, the public path is used. ``TORCHJAX_BRIDGE_DLPACK=public`` forces the public path; ``=fast`` raises
instead of falling back. ``_dlpack_cuda`` does the same on a GPU.

Nothing here copies or casts. The callers (``_tensors``, ``_trees``) pass only what DLPack transfers without loss:

* to `import_cpu` and `import_cuda`: a dense, 64-byte-aligned, strided tensor without ``requires_grad``, conj
  or neg bit, of a dtype in the table and, with x64 off, not a 64-bit one;
* to `export`: any ``jax.Array``. It raises for an array that is deleted, on several devices, in host memory of a
  GPU, or of a dtype that torch lacks (the trial checks the dtypes).
"""

import threading
from typing import Any

import jax
import numpy as np
import torch
from torch.utils import dlpack as torch_dlpack

from ._devices import jax_device
from ._dlpack_cuda import cuda_choice, export_cuda, import_cuda, set_cuda_path
from ._dlpack_trial import PATH_VARIABLE, Choice, Export, Import, choose, wanted_path
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
    "cuda_choice",
    "export",
    "import_cpu",
    "import_cuda",
    "numpy_view",
]

# XLA's CPU client views only buffers aligned to this many bytes. It copies others silently.
ALIGNMENT = 64

_OneDevice = jax.sharding.SingleDeviceSharding
_KDL_CPU = 1


def import_cpu(tensor: torch.Tensor, device: Any = None) -> jax.Array:
    """A ``jax.Array`` on torch's CPU memory; permuted strides become a permuted layout.

    Args:
        tensor: The tensor.
        device: The host device; None for the first. On the public path, any other gets a copy.
    """
    choice()
    return import_cpu(tensor, device)  # now rebound to the chosen path


def export(array: jax.Array) -> torch.Tensor:
    """A ``torch.Tensor`` on JAX's memory. On the CPU this waits until the array is computed."""
    choice()
    return export(array)


def numpy_view(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A NumPy array on torch's CPU memory, of any strides and of a dtype that NumPy has; without the neg bit.

    ``Tensor.numpy()`` would make the storage one that the caller can no longer resize.
    """
    return np.from_dlpack(tensor)


def choice() -> Choice:
    """The path in use; the first call chooses it and rebinds the two functions above.

    Raises:
        ExchangeError: The environment variable holds an unknown word, or asks for a fast path that does
            not work here.
    """
    if _chosen is None:
        with _lock:
            if _chosen is None:
                return set_path(None)
    return _chosen


def set_path(wanted: str | None) -> Choice:
    """Choose again, by ``"fast"``, ``"public"`` or ``""`` (fast if it works), for the whole process.

    For tests, which run everything on both paths. Existing arrays and tensors stay as they are. ``None`` reads the
    environment variable.

    Raises:
        ExchangeError: As for `choice`; then the path in use stays.
    """
    global _chosen
    _chosen = _choose(wanted_path() if wanted is None else wanted)
    set_cuda_path(wanted)
    note_jax_started()
    return _chosen


def reset_path() -> None:
    """Return to the state before the first crossing; the next crossing reads the environment variable."""
    global _chosen
    _chosen = None
    _bind(*_UNCHOSEN)
    set_cuda_path(None)


_UNCHOSEN = (import_cpu, export)
_chosen: Choice | None = None
_lock = threading.Lock()


def _choose(wanted: str) -> Choice:
    chosen, (from_torch, to_torch) = choose(
        wanted, _fast_functions, (_public_import, torch.from_dlpack), torch.device("cpu")
    )
    _bind(from_torch, to_torch if _cpu_only() else _export_any_device(to_torch))
    return chosen


def _refuse_unfinished(export_finished: Export) -> Export:
    """`export` for a forked child, where an array whose computation had not finished never will."""

    def export(array: Any) -> torch.Tensor:
        if not array.is_deleted() and not array.is_ready():
            refuse_in_fork("wait for an array that was being computed")
        return export_finished(array)

    return export


def _bind(from_cpu: Import, to_torch: Export) -> None:
    """Make these the module's `import_cpu` and `export`."""
    namespace = globals()
    if forked():
        to_torch = _refuse_unfinished(to_torch)
    namespace["import_cpu"], namespace["export"] = from_cpu, to_torch


def _rebind_in_child() -> None:
    if forked() and _chosen is not None:
        _bind(import_cpu, export)


at_fork(_rebind_in_child)


def _export_any_device(export_cpu: Export) -> Export:
    def export_any_device(array: jax.Array) -> torch.Tensor:
        (device,) = array.devices()
        return export_cpu(array) if device.platform == "cpu" else export_cuda(array)

    return export_any_device


def _cpu_only() -> bool:
    if {device.platform for device in jax.local_devices()} != {"cpu"}:
        return False
    try:
        return not jax.local_devices(backend="gpu")
    except RuntimeError:  # JAX has no such backend
        return True


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


def _public_import(tensor: torch.Tensor, device: Any = None) -> jax.Array:
    array = jax.dlpack.from_dlpack(_HostMemory(tensor))
    if device is None or array.devices() == {device}:
        return array
    return jax.block_until_ready(jax.device_put(array, device))


# --- the fast path: the private names that touch capsules ------------------------------------------


def _fast_functions() -> tuple[Import, Export]:
    from jaxlib import _jax

    array_from_capsule = _jax.dlpack_managed_tensor_to_buffer
    capsule_from_array = _jax.buffer_to_dlpack_managed_tensor
    capsule_from_tensor: Any = torch._C._to_dlpack
    tensor_from_capsule: Any = torch._C._from_dlpack
    host = jax_device("cpu")

    # Before 0.10.2 jaxlib read the kind of memory from the capsule and took no argument for it.
    if "dl_device_type" in (array_from_capsule.__doc__ or ""):

        def import_cpu(tensor: torch.Tensor, device: Any = host) -> jax.Array:
            return array_from_capsule(capsule_from_tensor(tensor), device or host, None, None, _KDL_CPU)

    else:

        def import_cpu(tensor: torch.Tensor, device: Any = host) -> jax.Array:
            return array_from_capsule(capsule_from_tensor(tensor), device or host, None, None)

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

    return import_cpu, export_cpu
