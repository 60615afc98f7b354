"""One tensor crosses: the ``copy=`` contract, layouts, autograd and conj bits, the x64 policy.

The first lines of each public function handle the plain case. Everything else takes the general path, ``_import``
or ``_export``. They check what the leaf is (``_refusals``) and whether its memory can be shared (``_memory``), then
share, copy or raise.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge.errors import BridgeError, DeviceError

from . import _dlpack
from ._autograd import has_tangent
from ._devices import jax_device, torch_device
from ._dtypes import NEEDS_X64, TORCH_TO_JAX
from ._fork import refuse_in_fork
from ._memory import is_dense, narrow, row_major_copy, why_not_shareable, with_row_major_strides
from ._numpy import is_number_or_string, numpy_as_tensor
from ._paths import Path
from ._refusals import (
    FRAMEWORK_ERRORS,
    cannot_share,
    check_array,
    check_copy,
    check_tensor,
    leaf_name,
    raise_with_leaf,
    refuse_64_bit,
    refuse_deleted,
)

__all__ = ["array_to_torch", "tensor_to_jax"]

_Tensor = torch.Tensor
_Parameter = torch.nn.Parameter
_strided = torch.strided
# The dtypes that never need x64 and never have a conj bit: they need no further check.
_PLAIN_REAL = frozenset(dtype for dtype in TORCH_TO_JAX if not dtype.is_complex) - frozenset(NEEDS_X64)


def tensor_to_jax(tensor: Any, *, copy: bool | None = None, device: Any = None, path: Path = ()) -> jax.Array:
    """One ``torch.Tensor`` as a ``jax.Array`` of the same shape, dtype and bits.

    Args:
        tensor: A ``torch.Tensor`` or ``numpy.ndarray`` of any shape and strides; or a ``jax.Array``, a number or
            a string, passed through.
        copy: ``None`` shares memory where it can be shared and copies where it cannot; ``False``
            shares or raises; ``True`` always gives fresh, row-major memory.
        device: Where the result lives: a ``jax.Device``, a ``torch.device`` or a name. ``None`` moves nothing.
        path: Where the leaf sits in its tree, for error messages.

    Returns:
        A ``jax.Array``, row-major unless it shares the memory of a permuted tensor.

    Raises:
        UnsupportedLeafError: It requires grad, or is sparse, quantized, meta, fake, a subclass, no tensor.
        DtypeError: The dtype has no counterpart, or needs x64, which is off.
        NarrowingError: A 64-bit integer does not fit in 32 bits and x64 is off.
        ShareError: ``copy=False`` and the memory cannot be shared.
        DeviceError: JAX does not see the device.

    Memory:
        With ``copy=None``, shares if the tensor is dense (any permutation of a row-major layout), starts at a
        multiple of 64 bytes, is on the requested device, has no conj or neg bit and needs no narrowing. Otherwise
        copies.
    """
    cls = type(tensor)
    if (cls is _Tensor or cls is _Parameter) and (copy is None or copy is False) and device is None:
        try:
            dtype = tensor.dtype
            if (
                (dtype in _PLAIN_REAL or _is_shareable_dtype(dtype, tensor))
                and tensor.is_cpu
                and not tensor.requires_grad
                and not tensor.is_neg()
                # data_ptr() is 0 for an empty tensor and raises without memory (sparse, nested, functorch)
                and (pointer := tensor.data_ptr())
                and not has_tangent(tensor)
            ):
                row_major = tensor.is_contiguous()
                if not pointer % 64 and (row_major or is_dense(tensor)):
                    if cls is _Parameter or not row_major:
                        # module.to() sets parameter.data, which would free the memory that the array uses. So
                        # JAX gets its own tensor object. Doing so for every tensor would add a quarter to a
                        # crossing; for permuted tensors it is cheap next to the check of strides.
                        tensor = tensor.data
                    if row_major and 1 in tensor.shape:
                        tensor = with_row_major_strides(tensor)
                    return _dlpack.import_cpu(tensor)
                if copy is None:  # a common case: the gradient of a sum is expanded
                    return _dlpack.import_cpu(row_major_copy(tensor))
        except FRAMEWORK_ERRORS:
            pass  # not a plain tensor: the general path raises an error that names the leaf
    return _import(tensor, copy, device, path)


def array_to_torch(
    array: Any, *, copy: bool | None = None, device: Any = None, path: Path = ()
) -> torch.Tensor:
    """One ``jax.Array`` as a ``torch.Tensor`` of the same shape, dtype and bits.

    Args:
        array: A ``jax.Array`` of any shape on one device; or a ``torch.Tensor``, passed through.
        copy: ``None`` shares memory where it can be shared and copies where it cannot; ``False``
            shares or raises; ``True`` always gives fresh, row-major memory.
        device: Where the result lives: a ``torch.device``, a ``jax.Device`` or a name. ``None`` moves nothing.
        path: Where the leaf sits in its tree, for error messages.

    Returns:
        A ``torch.Tensor`` that does not require grad, row-major unless it shares a permuted layout.

    Raises:
        UnsupportedLeafError: It is a tracer, a PRNG key, deleted, on several devices, or no array.
        DtypeError: torch has no such dtype.
        ShareError: ``copy=False`` and the memory cannot be shared.
        DeviceError: torch does not see the device.

    Memory:
        With ``copy=None``, shares unless the array changes device or is in host memory of a GPU. torch cannot
        mark memory read-only, so writing to a shared result changes the JAX array, which JAX assumes to be
        immutable. On the CPU the call waits until the array is computed.
    """
    if type(array) is _dlpack.PlainArray and (copy is None or copy is False) and device is None:
        try:
            return _dlpack.export(array)
        except FRAMEWORK_ERRORS:
            pass  # not a plain array: the general path raises an error that names the leaf
    return _export(array, copy, device, path)


def _is_shareable_dtype(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether a tensor of a dtype outside `_PLAIN_REAL` can be shared: x64 is on if needed, no conj bit is set."""
    return dtype in TORCH_TO_JAX and (dtype not in NEEDS_X64 or x64()) and not tensor.is_conj()


# --- torch -> JAX, the general path -------------------------------------------------------------------


def _import(tensor: Any, copy: bool | None, device: Any, path: Path) -> jax.Array:
    check_copy(copy)
    if is_number_or_string(tensor):
        return tensor
    try:
        if isinstance(tensor, jax.Array):
            return _pass_array_through(tensor, copy, device, path)
        if isinstance(tensor, np.ndarray):
            as_tensor, copied = numpy_as_tensor(tensor, copy, path, "JAX")
            if NEEDS_X64.get(as_tensor.dtype, as_tensor.dtype) is None and not x64():
                refuse_64_bit(tensor.dtype.newbyteorder("="), path)
            return _import_tensor(as_tensor, None if copied else copy, device, path)
        return _import_tensor(tensor, copy, device, path)
    except FRAMEWORK_ERRORS as err:
        if isinstance(err, BridgeError):
            raise
        raise_with_leaf(err, tensor, "JAX", path)


def _import_tensor(tensor: Any, copy: bool | None, device: Any, path: Path) -> jax.Array:
    check_tensor(tensor, path)
    target = _device_of(tensor, path) if device is None else jax_device(device)
    if target.platform == "cpu" and not tensor.is_cpu:
        if copy is False:
            cannot_share(path, "JAX", f"it is on '{tensor.device}' and device={target} was asked for")
        tensor = tensor.cpu()
    source = _device_of(tensor, path)
    if copy is False and target != source:
        cannot_share(path, "JAX", f"it is on {source} and device={target} was asked for")

    narrower = None
    if tensor.dtype in NEEDS_X64 and not x64():
        narrower = NEEDS_X64[tensor.dtype]
        if narrower is None:
            refuse_64_bit(tensor.dtype, path)
    reason = why_not_shareable(tensor)
    if reason and copy is False:
        cannot_share(path, "JAX", reason)
    if narrower is not None:
        if copy is False:
            cannot_share(
                path, "JAX", f"{tensor.dtype} needs x64, which is off, and becomes {narrower} by a copy"
            )
        tensor = narrow(tensor, narrower, path)
    elif copy or reason or (target != source and not tensor.is_contiguous()):
        tensor = row_major_copy(tensor)
    else:
        tensor = tensor.data  # so that the caller's later `tensor.data = new` frees no memory that JAX uses
        if tensor.is_contiguous():
            tensor = with_row_major_strides(tensor)

    if target != source:
        refuse_in_fork(f"copy to {target}")
    array = _dlpack.import_cpu(tensor) if tensor.is_cpu else _dlpack.import_cuda(tensor)
    if target == source:
        return array
    with jax.ensure_compile_time_eval():  # copy now, even inside jit
        # The transfer reads torch's memory in the background, and torch may write to it after this call.
        return jax.block_until_ready(jax.device_put(array, target))


def _device_of(tensor: torch.Tensor, path: Path) -> jax.Device:
    try:
        return jax_device(tensor.device)
    except DeviceError as err:
        raise DeviceError(f"cannot share {leaf_name(path)} with JAX: {err}") from err


def x64() -> bool:
    """Whether x64 is on in this thread, by the global setting or an ``enable_x64`` context."""
    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]  # created at run time


def _pass_array_through(array: jax.Array, copy: bool | None, device: Any, path: Path) -> jax.Array:
    target = None if device is None else jax_device(device)
    if isinstance(array, jax.core.Tracer):
        return _pass_tracer_through(array, copy, target, path)
    if target is None and not copy:
        return array
    if array.is_deleted():
        refuse_deleted(path, "JAX")
    moves = target is not None and array.devices() != {target}
    if not (moves or copy):
        return array
    if moves and copy is False:
        cannot_share(path, "JAX", f"it is not on {target}, which was asked for")
    refuse_in_fork("have JAX copy an array")
    # Copy now, even inside jit. A NaN in the array must not raise, even under jax_debug_nans.
    with jax.ensure_compile_time_eval(), jax.debug_nans(False), jax.debug_infs(False):
        if not _is_row_major(array):
            copied = jnp.array(array, copy=True)  # row-major, which device_put alone would not make it
            copied = jax.device_put(copied, target) if moves else copied
        elif moves or array.committed:
            # device_put works under jax.set_mesh too; a computation would refuse an array outside the mesh.
            copied = jax.device_put(array, target if moves else array.sharding, may_alias=False)
        else:
            copied = jnp.array(array, copy=True)  # stays uncommitted
        # The copy runs in the background and may read torch's memory, which torch may write to after this call.
        return jax.block_until_ready(copied)


def _pass_tracer_through(tracer: Any, copy: bool | None, target: jax.Device | None, path: Path) -> jax.Array:
    """Pass a tracer through; a requested move or copy is traced into the computation."""
    if target is not None:
        if copy is False:
            cannot_share(
                path, "JAX", f"it is a tracer, so its device is not known yet; {target} was asked for"
            )
        tracer = jax.device_put(tracer, target)
    return jnp.array(tracer, copy=True) if copy else tracer


def _is_row_major(array: jax.Array) -> bool:
    if not hasattr(array, "format"):  # a PRNG key does not expose its layout
        return False
    layout = array.format.layout
    return layout is None or tuple(layout.major_to_minor) == tuple(range(array.ndim))


# --- JAX -> torch, the general path -------------------------------------------------------------------


def _export(array: Any, copy: bool | None, device: Any, path: Path) -> torch.Tensor:
    check_copy(copy)
    if is_number_or_string(array):
        return array
    try:
        if isinstance(array, torch.Tensor):
            return _pass_tensor_through(array, copy, device, path)
        if isinstance(array, np.ndarray):
            tensor, copied = numpy_as_tensor(array, copy, path, "torch")
            return _pass_tensor_through(tensor, None if copied else copy, device, path)
        return _export_array(array, copy, device, path)
    except FRAMEWORK_ERRORS as err:
        if isinstance(err, BridgeError):
            raise
        raise_with_leaf(err, array, "torch", path)


def _export_array(array: Any, copy: bool | None, device: Any, path: Path) -> torch.Tensor:
    check_array(array, path)
    (jax_source,) = array.devices()
    try:
        target = torch_device(jax_source if device is None else device)
    except DeviceError as err:
        raise DeviceError(f"cannot share {leaf_name(path)} with torch: {err}") from err
    if target.type == "cpu" and jax_source.platform != "cpu":
        if copy is False:
            cannot_share(path, "torch", f"it is on {jax_source} and device='{target}' was asked for")
        refuse_in_fork(f"copy from {jax_source}")
        with jax.ensure_compile_time_eval():  # copy now, even inside jit
            array, jax_source = jax.device_put(array, jax_device("cpu")), jax_device("cpu")
    if jax_source.platform != "cpu":
        array = _in_device_memory(array, copy, path)
    source = torch_device(jax_source)
    if target != source:
        if copy is False:
            cannot_share(path, "torch", f"it is on {jax_source} and device='{target}' was asked for")
        return _move(_dlpack.export(array), target, path)
    tensor = _dlpack.export(array)
    return row_major_copy(tensor) if copy else tensor


def _in_device_memory(array: jax.Array, copy: bool | None, path: Path) -> jax.Array:
    """The array, copied to its device if it is in host memory, which torch takes from no JAX array on a GPU."""
    kind = array.sharding.memory_kind
    if kind in (None, "device"):
        return array
    if copy is False:
        cannot_share(path, "torch", f"it is in memory of kind '{kind}', and torch takes only device memory")
    (device,) = array.devices()
    with jax.ensure_compile_time_eval():  # copy now, even inside jit
        return jax.device_put(array, jax.sharding.SingleDeviceSharding(device, memory_kind="device"))


def _pass_tensor_through(tensor: torch.Tensor, copy: bool | None, device: Any, path: Path) -> torch.Tensor:
    target = tensor.device if device is None else torch_device(device)
    if target != tensor.device:
        if copy is False:
            cannot_share(path, "torch", f"it is on '{tensor.device}' and device='{target}' was asked for")
        return _move(tensor, target, path)
    if not copy:
        return tensor
    return (
        tensor.clone(memory_format=torch.contiguous_format) if tensor.layout is _strided else tensor.clone()
    )


def _move(tensor: torch.Tensor, target: torch.device, path: Path) -> torch.Tensor:
    if target.type == "meta":
        raise DeviceError(
            f"cannot move {leaf_name(path)}: device='meta' holds no values. Pass a device with memory, or call "
            ".to('meta') afterwards."
        )
    try:
        if tensor.layout is _strided:
            return tensor.to(target, memory_format=torch.contiguous_format)
        return tensor.to(target)
    except (RuntimeError, AssertionError) as err:  # AssertionError: torch without CUDA
        raise DeviceError(
            f"cannot move {leaf_name(path)}: torch cannot move it to '{target}': {err}"
        ) from err
