"""One tensor crosses: the ``copy=`` contract, layouts, autograd and conj bits, the x64 policy.

Understand, then act: the first lines of each public function recognise the plain case and cross at
once; everything else goes to ``_import`` or ``_export``, which learn what the leaf is (``_refusals``) and how its
memory lies (``_memory``), decide between sharing, copying and refusing, and only then move it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge.errors import BridgeError, DeviceError

from . import _dlpack
from ._autograd import carries_tangent
from ._devices import jax_device, torch_device
from ._dtypes import JAX_OF, NEEDS_X64
from ._fork import refuse_in_fork
from ._memory import is_dense, narrow, row_major_copy, why_copy, with_row_major_strides
from ._numpy import numpy_as_tensor, stays
from ._paths import Path
from ._refusals import (
    FOREIGN,
    cannot_share,
    check_copy,
    explain,
    leaf_name,
    refuse_array,
    refuse_deleted,
    refuse_tensor,
    refuse_wide,
)

__all__ = ["array_to_torch", "tensor_to_jax"]

_Tensor = torch.Tensor
_Parameter = torch.nn.Parameter
_strided = torch.strided
# The dtypes that cross whether x64 is on or off and have no conj bit, so that one look is enough.
_PLAIN_REAL = frozenset(dtype for dtype in JAX_OF if not dtype.is_complex) - frozenset(NEEDS_X64)


def tensor_to_jax(tensor: Any, *, copy: bool | None = None, device: Any = None, path: Path = ()) -> jax.Array:
    """One ``torch.Tensor`` as a ``jax.Array`` of the same shape, dtype and bits.

    Args:
        tensor: A ``torch.Tensor`` or ``numpy.ndarray`` of any shape and strides; or a ``jax.Array``, a number or
            a string, passed through.
        copy: ``None`` shares memory where it can be shared and copies where it cannot; ``False``
            shares or raises; ``True`` always gives fresh, row-major memory.
        device: Where the result lives: a ``jax.Device``, a ``torch.device`` or a name. ``None`` stays.
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
        Shares (``copy=None``) when the tensor is dense (any permutation of a row-major layout) and
        its address a multiple of 64 bytes, on the device asked for, with no conj or neg bit to resolve
        and no 64-bit integers to narrow; else copies.
    """
    kind = type(tensor)
    if (kind is _Tensor or kind is _Parameter) and (copy is None or copy is False) and device is None:
        try:
            dtype = tensor.dtype
            if (
                (dtype in _PLAIN_REAL or _crosses_now(dtype, tensor))
                and tensor.is_cpu
                and not tensor.requires_grad
                and not tensor.is_neg()
                # 0 without values, an error without memory (sparse, nested and functorch tensors)
                and (pointer := tensor.data_ptr())
                and not carries_tangent(tensor)
            ):
                row_major = tensor.is_contiguous()
                if not pointer % 64 and (row_major or is_dense(tensor)):
                    if kind is _Parameter or not row_major:
                        # module.to() gives this object other memory (parameter.data = ...), which would free
                        # the old memory under the array; so JAX gets a name of its own. For every tensor
                        # that would cost a quarter of a crossing; beside looking at strides it costs little.
                        tensor = tensor.data
                    if row_major and 1 in tensor.shape:
                        tensor = with_row_major_strides(tensor)
                    return _dlpack.borrow_cpu(tensor)
                if copy is None:  # as for the gradient of every sum, which is expanded
                    return _dlpack.borrow_cpu(row_major_copy(tensor))
        except FOREIGN:
            pass  # not a plain tensor: the careful way names what it is, or raises the same again
    return _import(tensor, copy, device, path)


def array_to_torch(
    array: Any, *, copy: bool | None = None, device: Any = None, path: Path = ()
) -> torch.Tensor:
    """One ``jax.Array`` as a ``torch.Tensor`` of the same shape, dtype and bits.

    Args:
        array: A ``jax.Array`` of any shape on one device; or a ``torch.Tensor``, passed through.
        copy: ``None`` shares memory where it can be shared and copies where it cannot; ``False``
            shares or raises; ``True`` always gives fresh, row-major memory.
        device: Where the result lives: a ``torch.device``, a ``jax.Device`` or a name. ``None`` stays.
        path: Where the leaf sits in its tree, for error messages.

    Returns:
        A ``torch.Tensor`` that does not require grad, row-major unless it shares a permuted layout.

    Raises:
        UnsupportedLeafError: It is a tracer, a PRNG key, deleted, on several devices, or no array.
        DtypeError: torch has no such dtype.
        ShareError: ``copy=False`` and the memory cannot be shared.
        DeviceError: torch does not see the device.

    Memory:
        Shares (``copy=None``) whenever the device stays. JAX holds its arrays to be immutable and torch
        cannot mark memory read-only: writing to a shared result changes the JAX array. On the CPU the call
        waits until the array is computed.
    """
    if type(array) is _dlpack.PlainArray and (copy is None or copy is False) and device is None:
        try:
            return _dlpack.lend(array)
        except FOREIGN:
            pass  # not a plain array: the careful way names what it is, or raises the same again
    return _export(array, copy, device, path)


def _crosses_now(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether a dtype outside `_PLAIN_REAL` crosses as it is: x64 is on if it needs it, no conj bit is set."""
    return dtype in JAX_OF and (dtype not in NEEDS_X64 or x64()) and not tensor.is_conj()


# --- torch -> JAX, the careful way -------------------------------------------------------------------


def _import(tensor: Any, copy: bool | None, device: Any, path: Path) -> jax.Array:
    check_copy(copy)
    if stays(tensor):
        return tensor
    try:
        if isinstance(tensor, jax.Array):
            return _pass_array(tensor, copy, device, path)
        if isinstance(tensor, np.ndarray):
            laid, copied = numpy_as_tensor(tensor, copy, path, "JAX")
            if NEEDS_X64.get(laid.dtype, laid.dtype) is None and not x64():
                refuse_wide(tensor.dtype.newbyteorder("="), path)
            return _import_tensor(laid, None if copied else copy, device, path)
        return _import_tensor(tensor, copy, device, path)
    except FOREIGN as err:
        if isinstance(err, BridgeError):
            raise
        explain(err, tensor, "JAX", path)


def _import_tensor(tensor: Any, copy: bool | None, device: Any, path: Path) -> jax.Array:
    refuse_tensor(tensor, path)
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
            refuse_wide(tensor.dtype, path)
    reason = why_copy(tensor)
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
        tensor = tensor.data  # a name of its own, so that `tensor.data = other` frees no memory under JAX
        if tensor.is_contiguous():
            tensor = with_row_major_strides(tensor)

    if target != source:
        refuse_in_fork(f"copy to {target}")
    array = _dlpack.borrow_cpu(tensor) if tensor.is_cpu else _dlpack.borrow_cuda(tensor)
    if target == source:
        return array
    with jax.ensure_compile_time_eval():  # inside jit, too, the copy is made now
        # The transfer reads borrowed memory in the background; torch may write to it after we return.
        return jax.block_until_ready(jax.device_put(array, target))


def _device_of(tensor: torch.Tensor, path: Path) -> jax.Device:
    try:
        return jax_device(tensor.device)
    except DeviceError as err:
        raise DeviceError(f"cannot share {leaf_name(path)} with JAX: {err}") from err


def x64() -> bool:
    """Whether x64 is on in this thread: the global setting or an ``enable_x64`` context."""
    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]  # made at run time


def _pass_array(array: jax.Array, copy: bool | None, device: Any, path: Path) -> jax.Array:
    target = None if device is None else jax_device(device)
    if isinstance(array, jax.core.Tracer):
        return _pass_tracer(array, copy, target, path)
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
    # Inside jit, too, the copy is made now; and a NaN is a value like any other, also when it is being hunted.
    with jax.ensure_compile_time_eval(), jax.debug_nans(False), jax.debug_infs(False):
        if not _is_row_major(array):
            copied = jnp.array(array, copy=True)  # row-major, which device_put alone would not make it
            copied = jax.device_put(copied, target) if moves else copied
        elif moves or array.committed:
            # Also under jax.set_mesh, where a computation would refuse an array that is not on the mesh.
            copied = jax.device_put(array, target if moves else array.sharding, may_alias=False)
        else:
            copied = jnp.array(array, copy=True)  # stays uncommitted
        # The copy runs in the background and may read memory that torch lent us.
        return jax.block_until_ready(copied)


def _pass_tracer(tracer: Any, copy: bool | None, target: jax.Device | None, path: Path) -> jax.Array:
    """A value that JAX has yet to compute: what is asked for becomes a step of the computation."""
    if target is not None:
        if copy is False:
            cannot_share(
                path, "JAX", f"it is a tracer, and where it will lie is not known; {target} was asked for"
            )
        tracer = jax.device_put(tracer, target)
    return jnp.array(tracer, copy=True) if copy else tracer


def _is_row_major(array: jax.Array) -> bool:
    if not hasattr(array, "format"):  # a PRNG key hides how its words lie
        return False
    layout = array.format.layout
    return layout is None or tuple(layout.major_to_minor) == tuple(range(array.ndim))


# --- JAX -> torch, the careful way -------------------------------------------------------------------


def _export(array: Any, copy: bool | None, device: Any, path: Path) -> torch.Tensor:
    check_copy(copy)
    if stays(array):
        return array
    try:
        if isinstance(array, torch.Tensor):
            return _pass_tensor(array, copy, device, path)
        if isinstance(array, np.ndarray):
            tensor, copied = numpy_as_tensor(array, copy, path, "torch")
            return _pass_tensor(tensor, None if copied else copy, device, path)
        return _export_array(array, copy, device, path)
    except FOREIGN as err:
        if isinstance(err, BridgeError):
            raise
        explain(err, array, "torch", path)


def _export_array(array: Any, copy: bool | None, device: Any, path: Path) -> torch.Tensor:
    refuse_array(array, path)
    (jax_side,) = array.devices()
    try:
        target = torch_device(jax_side if device is None else device)
    except DeviceError as err:
        raise DeviceError(f"cannot share {leaf_name(path)} with torch: {err}") from err
    if target.type == "cpu" and jax_side.platform != "cpu":
        if copy is False:
            cannot_share(path, "torch", f"it is on {jax_side} and device='{target}' was asked for")
        refuse_in_fork(f"copy from {jax_side}")
        with jax.ensure_compile_time_eval():  # inside jit, too, the copy is made now
            array, jax_side = jax.device_put(array, jax_device("cpu")), jax_device("cpu")
    source = torch_device(jax_side)
    if target != source:
        if copy is False:
            cannot_share(path, "torch", f"it is on {jax_side} and device='{target}' was asked for")
        return _move(_dlpack.lend(array), target, path)
    tensor = _dlpack.lend(array)
    return row_major_copy(tensor) if copy else tensor


def _pass_tensor(tensor: torch.Tensor, copy: bool | None, device: Any, path: Path) -> torch.Tensor:
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
            ".to('meta') after."
        )
    try:
        if tensor.layout is _strided:
            return tensor.to(target, memory_format=torch.contiguous_format)
        return tensor.to(target)
    except (RuntimeError, AssertionError) as err:  # AssertionError: torch without CUDA
        raise DeviceError(
            f"cannot move {leaf_name(path)}: torch cannot move it to '{target}': {err}"
        ) from err
