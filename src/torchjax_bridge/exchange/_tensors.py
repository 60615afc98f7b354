"""One tensor crosses: the ``copy=`` contract, layouts, autograd and conj bits, the x64 policy.

Understand, then act: the first lines of each public function recognise the plain case and cross at
once; everything else goes to ``_import`` or ``_export``, which name what the leaf is, decide between sharing,
copying and refusing, and only then move it. Refuses whatever the other framework cannot hold, with the
leaf's path, the reason and the fix.
"""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge.errors import (
    DeviceError,
    DtypeError,
    ExchangeError,
    NarrowingError,
    ShareError,
    UnsupportedLeafError,
)

from . import _dlpack
from ._autograd import carries_tangent
from ._devices import jax_device, torch_device
from ._dtypes import JAX_OF, NEEDS_X64, TORCH_OF, jax_dtype_fix, torch_dtype_fix
from ._paths import Path, join_path

__all__ = ["array_to_torch", "tensor_to_jax"]

# What torch and JAX raise for what they cannot do; AssertionError comes from fake tensors and torch.compile.
_FOREIGN = (RuntimeError, ValueError, TypeError, BufferError, AssertionError)

HAZARDS = "See docs/sharing-memory.md."

_Tensor = torch.Tensor
_Parameter = torch.nn.Parameter
_strided = torch.strided
# The dtypes that cross whether x64 is on or off and have no conj bit, so that one look is enough.
_PLAIN_REAL = frozenset(dtype for dtype in JAX_OF if not dtype.is_complex) - frozenset(NEEDS_X64)
_PLAIN_JAX = frozenset(TORCH_OF)
_OneDevice = jax.sharding.SingleDeviceSharding


def tensor_to_jax(tensor: Any, *, copy: bool | None = None, device: Any = None, path: Path = ()) -> jax.Array:
    """One ``torch.Tensor`` as a ``jax.Array`` of the same shape, dtype and bits.

    Args:
        tensor: A ``torch.Tensor`` of any shape and strides; or a ``jax.Array``, passed through.
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
                and tensor.is_contiguous()
                and not tensor.is_neg()
                # 0 without values, an error without memory (sparse, nested and functorch tensors)
                and (pointer := tensor.data_ptr())
                and not pointer % 64
                and not carries_tangent(tensor)
            ):
                if 1 in tensor.shape:
                    tensor = _with_row_major_strides(tensor)
                return _dlpack.borrow_cpu(tensor)
        except _FOREIGN:
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
    if (copy is None or copy is False) and device is None and isinstance(array, jax.Array):
        try:
            sharding = array.sharding
            if array.dtype in _PLAIN_JAX and (type(sharding) is _OneDevice or sharding.num_devices == 1):
                return _dlpack.lend(array)
        except (*_FOREIGN, AttributeError):
            pass  # not a plain array: the careful way names what it is, or raises the same again
    return _export(array, copy, device, path)


def _crosses_now(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether a dtype outside `_PLAIN_REAL` crosses as it is: x64 is on if it needs it, no conj bit is set."""
    return dtype in JAX_OF and (dtype not in NEEDS_X64 or _x64()) and not tensor.is_conj()


# --- torch -> JAX, the careful way -------------------------------------------------------------------


def _import(tensor: Any, copy: bool | None, device: Any, path: Path) -> jax.Array:
    _check_copy(copy)
    try:
        if isinstance(tensor, jax.Array):
            return _pass_array(tensor, copy, device, path)
        return _import_tensor(tensor, copy, device, path)
    except _FOREIGN as err:
        if isinstance(err, ExchangeError):
            raise
        _explain(err, tensor, "JAX", path)


def _import_tensor(tensor: Any, copy: bool | None, device: Any, path: Path) -> jax.Array:
    _refuse_tensor(tensor, path)
    target = jax_device(tensor.device if device is None else device)
    if target.platform == "cpu" and not tensor.is_cpu:
        if copy is False:
            _cannot_share(path, "JAX", f"it is on '{tensor.device}' and device={target} was asked for")
        tensor = tensor.cpu()
    source = jax_device(tensor.device)
    if copy is False and target != source:
        _cannot_share(path, "JAX", f"it is on {source} and device={target} was asked for")

    narrow = None
    if tensor.dtype in NEEDS_X64 and not _x64():
        narrow = NEEDS_X64[tensor.dtype]
        if narrow is None:
            _refuse_wide(tensor.dtype, path)
    reason = _why_copy(tensor)
    if reason and copy is False:
        _cannot_share(path, "JAX", reason)
    if narrow is not None:
        if copy is False:
            _cannot_share(
                path, "JAX", f"{tensor.dtype} needs x64, which is off, and becomes {narrow} by a copy"
            )
        tensor = _narrow(tensor, narrow, path)
    elif copy or reason:
        tensor = _row_major_copy(tensor)
    elif tensor.is_contiguous():
        tensor = _with_row_major_strides(tensor)

    array = _dlpack.borrow_cpu(tensor) if tensor.is_cpu else _dlpack.borrow_cuda(tensor)
    if target == source:
        return array
    # The transfer reads borrowed memory in the background; torch may write to it after we return.
    return jax.block_until_ready(jax.device_put(array, target))


def _refuse_tensor(tensor: Any, path: Path) -> None:
    """Raise unless this is a tensor whose whole meaning is a dtype, a shape and a block of memory."""
    if not isinstance(tensor, torch.Tensor):
        _refuse(path, "JAX", _what(tensor), _fix_for_no_tensor(tensor))
    kind = type(tensor)
    if tensor.is_nested:
        _refuse(
            path,
            "JAX",
            f"a nested tensor ({kind.__qualname__})",
            "Call .to_padded_tensor(0.0), or pass the list that .unbind() gives.",
        )
    if kind is not _Tensor and kind is not _Parameter:
        if torch.nn.parameter.is_lazy(tensor):
            _refuse(
                path,
                "JAX",
                f"a {kind.__qualname__} of a lazy module, which has no shape yet",
                "Call the module once on an example input first.",
            )
        if tensor.is_meta or "Fake" in kind.__name__:
            _refuse(path, "JAX", f"a {kind.__name__}, with a shape but no values", "Pass a real tensor.")
        _refuse(
            path,
            "JAX",
            f"a {kind.__module__}.{kind.__qualname__}, a torch.Tensor subclass that may mean more "
            "than its memory",
            "If its data is all that matters, pass .as_subclass(torch.Tensor); "
            "else convert it to a plain tensor.",
        )
    if tensor.is_meta:
        _refuse(path, "JAX", "a meta tensor, which holds a shape but no values", "Pass a real tensor.")
    if tensor.is_quantized:
        _refuse(path, "JAX", f"a quantized tensor ({tensor.dtype})", torch_dtype_fix(tensor.dtype))
    if tensor.layout is not _strided:
        _refuse(path, "JAX", f"a sparse tensor ({tensor.layout})", "Call .to_dense() first.")
    if tensor.requires_grad:
        _refuse(
            path,
            "JAX",
            "a tensor that requires grad, and a shared array would drop the gradient",
            "Call .detach() first; or wrap the JAX function with as_torch_function, which keeps gradients.",
        )
    if carries_tangent(tensor):
        _refuse(
            path,
            "JAX",
            "a dual tensor of forward-mode autograd, and a shared array would drop the tangent",
            "Pass forward_ad.unpack_dual(tensor).primal; or wrap the JAX function with as_torch_function.",
        )
    if tensor.dtype not in JAX_OF:
        raise DtypeError(
            f"cannot share {_leaf(path)} with JAX: JAX has no dtype for {tensor.dtype}. "
            f"{torch_dtype_fix(tensor.dtype)}"
        )
    if not _has_storage(tensor):
        _refuse(
            path,
            "JAX",
            "a tensor without memory of its own (inside torch.func or torch.compile, or its storage freed)",
            "Cross outside the transform, or wrap the JAX function with as_torch_function.",
        )


def _has_storage(tensor: torch.Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:  # functorch's and functionalization's wrappers have none
        return False


def _why_copy(tensor: torch.Tensor) -> str:
    """Why this tensor's memory cannot be read by XLA as it lies; empty when it can."""
    if tensor.is_conj():
        return "its conjugate bit is set, and JAX would read the unconjugated memory"
    if tensor.is_neg():
        return "its negative bit is set, and JAX would read the memory without the sign"
    if tensor.numel() == 0:
        return ""
    if not _is_dense(tensor):
        return (
            f"its strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)} leave gaps or overlap, "
            "and XLA reads only gap-free layouts"
        )
    if offset := tensor.data_ptr() % _dlpack.ALIGNMENT:
        return (
            f"its address is {offset} bytes past a multiple of {_dlpack.ALIGNMENT}, "
            "and XLA reads only aligned buffers"
        )
    return ""


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether some permutation of the axes makes this tensor row-major without gaps."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _with_row_major_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, with the strides of size-1 axes set as in a row-major array.

    torch ignores the stride of an axis of size 1; XLA would read it as a permuted layout, and every new
    layout costs a compilation (https://github.com/jax-ml/jax/issues/24680).
    """
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= max(size, 1)
    strides.reverse()
    return tensor if tensor.stride() == tuple(strides) else tensor.as_strided(tensor.shape, strides)


def _x64() -> bool:
    """Whether x64 is on in this thread: the global setting or an ``enable_x64`` context."""
    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]  # made at run time


def _narrow(tensor: torch.Tensor, dtype: torch.dtype, path: Path) -> torch.Tensor:
    """A row-major 32-bit copy, if every value fits."""
    if tensor.numel():
        if tensor.dtype is torch.uint64:
            # As int64, values of 2**63 and above are negative.
            low, high = (int(v) for v in torch.aminmax(tensor.view(torch.int64)))
            worst = high if low >= 0 and high >= 2**32 else (low % 2**64 if low < 0 else None)
        else:
            low, high = (int(v) for v in torch.aminmax(tensor))
            worst = low if low < -(2**31) else (high if high >= 2**31 else None)
        if worst is not None:
            raise NarrowingError(
                f"cannot share {_leaf(path)} with JAX: x64 is off, so {tensor.dtype} becomes {dtype}, which "
                f"cannot hold {worst}. Set jax_enable_x64, or bring the values into range first."
            )
    return tensor.to(dtype, memory_format=torch.contiguous_format)


def _refuse_wide(dtype: torch.dtype, path: Path) -> NoReturn:
    half = {torch.float64: torch.float32, torch.complex128: torch.complex64}[dtype]
    raise DtypeError(
        f"cannot share {_leaf(path)} with JAX: dtype {dtype} needs x64, which is off. Cast it to {half} "
        'first, or call jax.config.update("jax_enable_x64", True).'
    )


def _pass_array(array: jax.Array, copy: bool | None, device: Any, path: Path) -> jax.Array:
    target = None if device is None else jax_device(device)
    if isinstance(array, jax.core.Tracer):
        return jnp.array(array, copy=True) if copy else array
    if target is None and not copy:
        return array
    if array.is_deleted():
        _refuse_deleted(path, "JAX")
    moves = target is not None and array.devices() != {target}
    if not (moves or copy):
        return array
    if moves and copy is False:
        _cannot_share(path, "JAX", f"it is not on {target}, which was asked for")
    copied = jax.device_put(array, target) if moves else jnp.array(array, copy=True)
    # The copy runs in the background and may read memory that torch lent us.
    return jax.block_until_ready(copied)


# --- JAX -> torch, the careful way -------------------------------------------------------------------


def _export(array: Any, copy: bool | None, device: Any, path: Path) -> torch.Tensor:
    _check_copy(copy)
    try:
        if isinstance(array, torch.Tensor):
            return _pass_tensor(array, copy, device, path)
        return _export_array(array, copy, device, path)
    except _FOREIGN as err:
        if isinstance(err, ExchangeError):
            raise
        _explain(err, array, "torch", path)


def _export_array(array: Any, copy: bool | None, device: Any, path: Path) -> torch.Tensor:
    _refuse_array(array, path)
    (jax_side,) = array.devices()
    target = torch_device(jax_side if device is None else device)
    if target.type == "cpu" and jax_side.platform != "cpu":
        if copy is False:
            _cannot_share(path, "torch", f"it is on {jax_side} and device='{target}' was asked for")
        array, jax_side = jax.device_put(array, jax_device("cpu")), jax_device("cpu")
    source = torch_device(jax_side)
    if target != source:
        if copy is False:
            _cannot_share(path, "torch", f"it is on {jax_side} and device='{target}' was asked for")
        return _move(_dlpack.lend(array), target)
    tensor = _dlpack.lend(array)
    return _row_major_copy(tensor) if copy else tensor


def _refuse_array(array: Any, path: Path) -> None:
    """Raise unless this is an array whose values lie in the memory of one device."""
    if isinstance(array, jax.core.Tracer):
        _refuse(
            path,
            "torch",
            f"a tracer ({array}), which has no values while JAX traces a function",
            "Cross outside jit, grad and vmap; or wrap the torch function with as_jax_function.",
        )
    if not isinstance(array, jax.Array):
        _refuse(path, "torch", _what(array), _fix_for_no_array(array))
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        _refuse(path, "torch", f"a PRNG key array ({array.dtype})", jax_dtype_fix(array.dtype))
    if array.dtype not in TORCH_OF:
        raise DtypeError(
            f"cannot share {_leaf(path)} with torch: torch has no dtype for {array.dtype}. "
            f"{jax_dtype_fix(array.dtype)}"
        )
    if array.is_deleted():
        _refuse_deleted(path, "torch")
    if (count := array.sharding.num_devices) > 1:
        _refuse(
            path,
            "torch",
            f"an array on {count} devices ({array.sharding})",
            "Gather it with jax.device_put(array, jax.devices()[0]), or send array.addressable_data(i).",
        )


def _refuse_deleted(path: Path, other: str) -> NoReturn:
    _refuse(
        path,
        other,
        "a deleted array (its buffer was donated, or .delete() was called)",
        "Cross before the donation, or do not donate the argument.",
    )


def _pass_tensor(tensor: torch.Tensor, copy: bool | None, device: Any, path: Path) -> torch.Tensor:
    target = tensor.device if device is None else torch_device(device)
    if target != tensor.device:
        if copy is False:
            _cannot_share(path, "torch", f"it is on '{tensor.device}' and device='{target}' was asked for")
        return _move(tensor, target)
    if not copy:
        return tensor
    return (
        tensor.clone(memory_format=torch.contiguous_format) if tensor.layout is _strided else tensor.clone()
    )


def _move(tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
    if target.type == "meta":
        raise DeviceError(
            "device='meta' holds no values. Pass a device with memory, or call .to('meta') after."
        )
    try:
        return tensor.to(target)
    except (RuntimeError, AssertionError) as err:  # AssertionError: torch without CUDA
        raise DeviceError(f"torch cannot move a tensor to '{target}': {err}") from err


# --- both directions ---------------------------------------------------------------------------------


def _row_major_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Fresh row-major memory with the tensor's values, its conj and neg bits resolved."""
    if tensor.is_complex() and tensor.data_ptr() % tensor.element_size():
        return _copy_by_parts(tensor)
    return tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _copy_by_parts(tensor: torch.Tensor) -> torch.Tensor:
    """The same for a complex tensor whose address is not a multiple of its element size.

    Only memory that torch did not allocate (a mapped file) lies so. Some of torch's complex128 loops, clone
    among them, read 16 aligned bytes at once and end in a segmentation fault there; its float64 loops do not.
    """
    conj = tensor.is_conj()
    parts = torch.view_as_real(tensor.conj() if conj else tensor)
    copied = torch.view_as_complex(parts.resolve_neg().clone(memory_format=torch.contiguous_format))
    return copied.conj_physical() if conj else copied


def _check_copy(copy: Any) -> None:
    if copy is not None and copy is not True and copy is not False:
        raise TypeError(f"copy must be None, True or False; got {copy!r}.")


# --- words -------------------------------------------------------------------------------------------


def _leaf(path: Path) -> str:
    return f"'{join_path(path)}'" if path else "this leaf"


def _explain(err: BaseException, thing: Any, other: str, path: Path) -> NoReturn:
    """What torch or JAX raised, with the leaf it was about."""
    raise ExchangeError(
        f"cannot share {_leaf(path)} with {other}: {_what(thing)} was refused below with "
        f"{type(err).__name__}: {err}. If a torch mode is active here (fake tensors, torch.compile), or the "
        "array's own computation failed, cross outside the mode or mend the computation."
    ) from err


def _refuse(path: Path, other: str, what: str, fix: str) -> NoReturn:
    raise UnsupportedLeafError(f"cannot share {_leaf(path)} with {other}: it is {what}. {fix}")


def _cannot_share(path: Path, other: str, why: str) -> NoReturn:
    raise ShareError(
        f"cannot share {_leaf(path)} with {other} under copy=False: {why}. Pass copy=None to let it be "
        f"copied. {HAZARDS}"
    )


def _what(thing: Any) -> str:
    kind = type(thing)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"a {name}"


def _fix_for_no_tensor(thing: Any) -> str:
    if isinstance(thing, torch.nn.Module):
        return "Pass its state_dict(), or use to_flax to convert its weights."
    if isinstance(thing, np.ndarray | np.generic):
        return "Call torch.as_tensor (or jnp.asarray) on it first."
    if isinstance(thing, bool | int | float | complex):
        return "Call torch.tensor (or jnp.asarray) on it first."
    return "Every leaf must be a torch.Tensor or a jax.Array."


def _fix_for_no_array(thing: Any) -> str:
    if isinstance(thing, np.ndarray | np.generic):
        return "Call jnp.asarray (or torch.from_numpy) on it first."
    if isinstance(thing, bool | int | float | complex):
        return "Call jnp.asarray (or torch.tensor) on it first."
    return "Every leaf must be a jax.Array or a torch.Tensor."
