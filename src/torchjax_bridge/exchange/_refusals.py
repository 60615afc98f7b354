"""What cannot cross, and the words for it: every error names the leaf, what it is, and what to type.

Decides only whether a leaf is a plain tensor or array at all; whether its memory can be shared is ``_memory``'s
business, and what then happens ``_tensors``'s.
"""

import dataclasses
from collections.abc import Iterator, Mapping, MappingView, Set
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge.errors import DtypeError, ExchangeError, ShareError, UnsupportedLeafError

from ._autograd import carries_tangent
from ._dtypes import JAX_OF, TORCH_OF, jax_dtype_fix, torch_dtype_fix
from ._paths import Path, join_path

__all__ = [
    "FOREIGN",
    "cannot_share",
    "check_copy",
    "explain",
    "leaf_name",
    "refuse_array",
    "refuse_deleted",
    "refuse_tensor",
    "refuse_wide",
]

# What torch and JAX raise for what they cannot do; AssertionError comes from fake tensors and torch.compile.
FOREIGN = (RuntimeError, ValueError, TypeError, BufferError, AssertionError)

_HAZARDS = "See docs/sharing-memory.md."
_LEAVES = "Every leaf must be a torch.Tensor, a jax.Array, a numpy.ndarray, a number or a string."
_PLAIN_KINDS = (torch.Tensor, torch.nn.Parameter)


def check_copy(copy: Any) -> None:
    """Raise for what Python would take for true or false: ``copy="no"`` asks for no copy."""
    if copy is not None and copy is not True and copy is not False:
        raise TypeError(f"copy must be None, True or False; got {copy!r}.")


def refuse_tensor(tensor: Any, path: Path) -> None:
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
    if kind not in _PLAIN_KINDS:
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
    if tensor.layout is not torch.strided:
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
            f"cannot share {leaf_name(path)} with JAX: JAX has no dtype for {tensor.dtype}. "
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


def refuse_array(array: Any, path: Path) -> None:
    """Raise unless this is an array whose values lie in the memory of one device."""
    if isinstance(array, jax.core.Tracer):
        _refuse(
            path,
            "torch",
            f"a tracer ({array}), which has no values while JAX traces a function",
            "Cross outside jit, grad and vmap; or wrap the torch function with as_jax_function.",
        )
    if not isinstance(array, jax.Array):
        _refuse(path, "torch", _what(array), _fix_for_no_pytree(array) or _LEAVES)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        _refuse(path, "torch", f"a PRNG key array ({array.dtype})", jax_dtype_fix(array.dtype))
    if array.dtype not in TORCH_OF:
        raise DtypeError(
            f"cannot share {leaf_name(path)} with torch: torch has no dtype for {array.dtype}. "
            f"{jax_dtype_fix(array.dtype)}"
        )
    if array.is_deleted():
        refuse_deleted(path, "torch")
    if (count := array.sharding.num_devices) > 1:
        _refuse(
            path,
            "torch",
            f"an array on {count} devices ({array.sharding})",
            "Gather it with jax.device_put(array, jax.devices()[0]), or send array.addressable_data(i).",
        )


def refuse_deleted(path: Path, other: str) -> NoReturn:
    _refuse(
        path,
        other,
        "a deleted array (its buffer was donated, or .delete() was called)",
        "Cross before the donation, or do not donate the argument.",
    )


def refuse_wide(dtype: torch.dtype | np.dtype, path: Path) -> NoReturn:
    half = str(dtype).replace("64", "32").replace("128", "64")
    raise DtypeError(
        f"cannot share {leaf_name(path)} with JAX: dtype {dtype} needs x64, which is off. Cast it to {half} "
        'first, or call jax.config.update("jax_enable_x64", True).'
    )


def cannot_share(path: Path, other: str, why: str) -> NoReturn:
    raise ShareError(
        f"cannot share {leaf_name(path)} with {other} under copy=False: {why}. Pass copy=None to let it be "
        f"copied. {_HAZARDS}"
    )


def explain(err: BaseException, thing: Any, other: str, path: Path) -> NoReturn:
    """What torch or JAX raised, with the leaf it was about."""
    raise ExchangeError(
        f"cannot share {leaf_name(path)} with {other}: {_what(thing)} was refused below with "
        f"{type(err).__name__}: {err}. If a torch mode is active here (fake tensors, torch.compile), or the "
        "array's own computation failed, cross outside the mode or mend the computation."
    ) from err


def _refuse(path: Path, other: str, what: str, fix: str) -> NoReturn:
    raise UnsupportedLeafError(f"cannot share {leaf_name(path)} with {other}: it is {what}. {fix}")


def leaf_name(path: Path) -> str:
    return f"'{join_path(path)}'" if path else "this leaf"


def _what(thing: Any) -> str:
    kind = type(thing)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"a {name}"


def _fix_for_no_tensor(thing: Any) -> str:
    if isinstance(thing, torch.nn.Module):
        return "Pass its state_dict(), or use to_flax to convert its weights."
    return _fix_for_no_pytree(thing) or _LEAVES


def _fix_for_no_pytree(thing: Any) -> str:
    """What to type for something that holds leaves and that JAX does not open; empty for anything else."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return "JAX does not open it: register its class with jax.tree_util.register_dataclass, or pass vars(it)."
    if isinstance(thing, Mapping):
        return "JAX does not open it: pass dict(it), or register its class with jax.tree_util."
    if isinstance(thing, tuple | list | Set | Iterator | MappingView):
        return "JAX does not open it: pass list(it), or register its class with jax.tree_util."
    if callable(thing):
        return f"{_LEAVES} Take functions out first, as equinox.partition(tree, equinox.is_array) does."
    return ""
