"""The only file that touches DLPack capsules: borrow torch memory, lend JAX memory.

Two paths do the same work. The *public* one is ``jax.dlpack.from_dlpack`` and ``torch.from_dlpack``. The
*fast* one calls the functions underneath them (``torch._C._to_dlpack``, ``torch._C._from_dlpack`` and
jaxlib's two capsule functions), which are private; so it is tried out once, on real tensors, before the
first crossing, and the public path is taken wherever it does not behave. Set
``TORCHJAX_BRIDGE_DLPACK=public`` to force the public path, ``=fast`` to fail instead of falling back.

Nothing here copies or casts. Callers (``_tensors``) pass only what DLPack carries without loss:

* to `borrow_cpu` and `borrow_cuda` a dense, 64-byte-aligned, strided tensor without ``requires_grad``, conj
  or neg bit, of a dtype in the table and, with x64 off, not a 64-bit one;
* to `lend` any ``jax.Array``; one that is deleted, on several devices, or of a dtype that torch has not raises
  (the trial sees that dtypes do).

CUDA order is kept on streams alone, never by blocking the host: the consumer names the stream it will read
on and the producer makes that stream wait for an event, as DLPack's ``stream`` argument prescribes
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
from ._fork import at_fork, forked, note_start, refuse_in_fork

# The one class of all arrays that are no tracers and no keys. Comparing with it takes a third of an
# isinstance(x, jax.Array); without the name nothing is this class, and every array goes the careful way.
try:
    from jaxlib._jax import ArrayImpl as PlainArray
except ImportError:

    class PlainArray: ...  # type: ignore[no-redef]


__all__ = ["ALIGNMENT", "SWITCH", "Choice", "PlainArray", "borrow_cpu", "borrow_cuda", "choice", "lend"]

SWITCH = "TORCHJAX_BRIDGE_DLPACK"

# XLA's CPU client makes views only of buffers aligned to this many bytes, and copies others without a word.
ALIGNMENT = 64

_OneDevice = jax.sharding.SingleDeviceSharding
_KDL_CPU = 1
_KDL_CUDA = 2


@dataclass(frozen=True)
class Choice:
    """Which path was chosen, and why."""

    path: str
    """``"fast"`` or ``"public"``."""
    reason: str
    """One sentence for a person, as ``torchjax-bridge doctor`` prints it."""


def borrow_cpu(tensor: torch.Tensor) -> jax.Array:
    """A ``jax.Array`` on torch's CPU memory; permuted strides become a permuted layout."""
    choice()
    return borrow_cpu(tensor)  # now rebound to the chosen path


def borrow_cuda(tensor: torch.Tensor) -> jax.Array:
    """A ``jax.Array`` on torch's CUDA memory; JAX's stream waits for torch's current stream."""
    choice()
    return borrow_cuda(tensor)


def lend(array: jax.Array) -> torch.Tensor:
    """A ``torch.Tensor`` on JAX's memory. On the CPU this waits until the array is computed."""
    choice()
    return lend(array)


def choice() -> Choice:
    """Choose the path on the first call, rebind the three functions above, and say what was chosen.

    Raises:
        ExchangeError: The environment variable holds an unknown word, or asks for a fast path that does
            not work here.
    """
    if _chosen is None:
        with _lock:
            if _chosen is None:
                return use(os.environ.get(SWITCH, ""))
    return _chosen


def use(wish: str) -> Choice:
    """Choose again, by ``"fast"``, ``"public"`` or ``""`` (fast if it works), for the whole process.

    For tests, which run everything on both paths. Arrays and tensors that have crossed stay as they are.

    Raises:
        ExchangeError: As for `choice`; then the path in use stays.
    """
    global _chosen
    _chosen = _choose(wish)
    note_start()
    return _chosen


def forget() -> None:
    """Go back to the state before the first crossing; the next one chooses by the environment variable."""
    global _chosen
    _chosen = None
    _bind(*_UNCHOSEN)


_UNCHOSEN = (borrow_cpu, borrow_cuda, lend)
_chosen: Choice | None = None
_lock = threading.Lock()


def _choose(wish: str) -> Choice:
    if wish not in ("", "fast", "public"):
        raise ExchangeError(
            f"{SWITCH}={wish!r} is neither 'fast' nor 'public'. Unset it, or set one of these."
        )
    if wish == "public":
        _bind(_public_borrow_cpu, _public_borrow_cuda, _public_lend)
        return Choice("public", f"{SWITCH}=public asks for it.")
    try:
        refuse_in_fork("try out the private capsule functions")  # which reads arrays by JAX's threads
        borrow, borrow_gpu, give = _fast_functions()
        # In a thread of its own, where no jit trace, fake mode or default device of the caller is active.
        with ThreadPoolExecutor(1, "torchjax-bridge-trial") as pool:
            pool.submit(_try_out, borrow, give).result()
    except _PROBE_ERRORS as err:
        reason = f"the private capsule functions do not behave here: {type(err).__name__}: {err}"
        if wish == "fast":
            raise ExchangeError(f"{SWITCH}=fast, but {reason}. Unset it to use the public path.") from err
        _bind(_public_borrow_cpu, _public_borrow_cuda, _public_lend)
        return Choice("public", reason)
    _bind(borrow, borrow_gpu, give)
    return Choice("fast", "the private capsule functions passed their trial.")


def _refuse_unfinished(give: Callable[[jax.Array], torch.Tensor]) -> Callable[[jax.Array], torch.Tensor]:
    """`lend` in a forked child, where an array that was being computed never will be."""

    def lend(array: Any) -> torch.Tensor:
        if not array.is_deleted() and not array.is_ready():
            refuse_in_fork("wait for an array that was being computed")
        return give(array)

    return lend


def _bind(
    borrow: Callable[[torch.Tensor], jax.Array],
    borrow_gpu: Callable[[torch.Tensor], jax.Array],
    give: Callable[[jax.Array], torch.Tensor],
) -> None:
    namespace = globals()
    if forked():
        give = _refuse_unfinished(give)
    namespace["borrow_cpu"], namespace["borrow_cuda"], namespace["lend"] = borrow, borrow_gpu, give


def _in_child() -> None:
    if forked() and _chosen is not None:
        _bind(borrow_cpu, borrow_cuda, lend)


at_fork(_in_child)


# --- the public path -------------------------------------------------------------------------------


class _HostMemory:
    """A CPU tensor as a producer of the DLPack protocol.

    ``Tensor.__dlpack_device__`` calls pinned memory a CUDA device's, which JAX then looks for; it is host
    memory like any other.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return torch_dlpack.to_dlpack(self._tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _KDL_CPU, 0


def _public_borrow_cpu(tensor: torch.Tensor) -> jax.Array:
    return jax.dlpack.from_dlpack(_HostMemory(tensor))


def _public_borrow_cuda(tensor: torch.Tensor) -> jax.Array:
    # torch hands out memory of its current device only.
    with torch.cuda.device(tensor.device):
        return jax.dlpack.from_dlpack(tensor)


def _public_lend(array: jax.Array) -> torch.Tensor:
    return torch.from_dlpack(array)


# --- the fast path: every private name in the exchange room is in this section -----------------------

# A function that is gone, takes other arguments, or raises; and a result that is not what it should be.
_PROBE_ERRORS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, BufferError)


def _fast_functions() -> tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], Any]]:
    from jaxlib import _jax

    to_array = _jax.dlpack_managed_tensor_to_buffer
    to_jax_capsule = _jax.buffer_to_dlpack_managed_tensor
    to_torch_capsule: Any = torch._C._to_dlpack
    to_tensor: Any = torch._C._from_dlpack
    host = jax_device("cpu")

    # Before 0.10.2 jaxlib was not told the kind of memory, and read it off the capsule.
    if "dl_device_type" in (to_array.__doc__ or ""):

        def borrow(tensor: torch.Tensor) -> jax.Array:
            return to_array(to_torch_capsule(tensor), host, None, None, _KDL_CPU)

        on_gpu: tuple[int, ...] = (_KDL_CUDA,)
    else:

        def borrow(tensor: torch.Tensor) -> jax.Array:
            return to_array(to_torch_capsule(tensor), host, None, None)

        on_gpu = ()

    def borrow_gpu(tensor: torch.Tensor) -> jax.Array:
        device: Any = jax_device(tensor.device)
        stream = device.get_stream_for_external_ready_events()
        with torch.cuda.device(tensor.device):  # torch hands out memory of its current device only
            capsule = tensor.__dlpack__(stream=stream)
        return to_array(capsule, device, stream, None, *on_gpu)

    # The capsule must hold a handle of its own: were it made of the caller's array, array.delete() while
    # torch still reads would abort the process ("Non-zero type 1 hold on destruction"). A clone is a handle on
    # the same buffer; addressable_data(0) is one, too, but for a result that has just been computed it first
    # builds a sharding, which takes longer than the rest of the crossing.
    handle: Any = getattr(_jax.ArrayImpl, "clone", None) or (lambda array: array.addressable_data(0))

    def lend_cpu(array: Any) -> torch.Tensor:
        sharding = array.sharding
        if type(sharding) is not _OneDevice and sharding.num_devices != 1:
            raise ValueError("the array is on several devices")  # its capsule would hold one of the shards
        if array.is_deleted():  # a clone of it would be a null pointer
            raise RuntimeError("Array has been deleted.")
        return to_tensor(to_jax_capsule(handle(array)))

    def lend_anywhere(array: jax.Array) -> torch.Tensor:
        (device,) = array.devices()
        if device.platform == "cpu":
            return lend_cpu(array)
        if array.sharding.memory_kind not in (None, "device"):
            return _public_lend(array)
        # DLPack writes the legacy default stream, which torch calls 0, as 1.
        stream = torch.cuda.current_stream(device.local_hardware_id).cuda_stream or 1
        return to_tensor(to_jax_capsule(array.addressable_data(0), stream=stream))

    only_cpu = {device.platform for device in jax.local_devices()} == {"cpu"} and not _has_gpu()
    on_cuda = torch.version.hip is None  # ROCm's memory is another DLPack device: leave it to the public path
    return borrow, borrow_gpu if on_cuda else _public_borrow_cuda, lend_cpu if only_cpu else lend_anywhere


def _has_gpu() -> bool:
    try:
        return bool(jax.local_devices(backend="gpu"))
    except RuntimeError:  # JAX's way of saying that there is no such backend
        return False


# Dtypes of JAX alone. Capsules of some of them do not exist, and torch refuses those of the others.
_NOT_IN_TORCH = (
    "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"
)  # fmt: skip


def _refuses(give: Callable[[Any], Any], array: Any) -> bool:
    try:
        give(array)
    except (RuntimeError, BufferError):
        return True
    return False


def _try_out(borrow: Callable[[Any], Any], give: Callable[[Any], Any]) -> None:
    """Raise unless both functions share memory, keep values and strides, and say no where they must."""
    tensor = torch.arange(12, dtype=torch.float32, device="cpu").view(3, 4).t()
    array = borrow(tensor)
    if not isinstance(array, jax.Array) or array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise RuntimeError("an imported tensor does not share memory")
    if array.shape != (4, 3) or array.dtype != np.float32 or float(np.asarray(array)[3, 1]) != 7.0:
        raise RuntimeError("an imported tensor has other values")
    back = give(jax.device_put(np.arange(6, dtype=np.int32).reshape(2, 3), jax_device("cpu")))
    if back.dtype != torch.int32 or back.tolist() != [[0, 1, 2], [3, 4, 5]]:
        raise RuntimeError("an exported array has other values")
    for name in _NOT_IN_TORCH:
        dtype = getattr(jnp, name, None)  # older releases have fewer of them
        if dtype is not None and not _refuses(give, jax.device_put(np.zeros(4, dtype), jax_device("cpu"))):
            raise RuntimeError(f"an array of {name}, which torch has not, is exported")
    again = give(array)
    if again.data_ptr() != tensor.data_ptr() or not torch.equal(again, tensor):
        raise RuntimeError("an exported array does not share memory")
