"""Errors for what cannot cross: each names the leaf, what it is, and the fix.

Checks only whether a leaf is a plain tensor or array. ``_memory`` decides whether its memory can be shared, and
``_tensors`` what then happens.
"""

import dataclasses
from collections.abc import Iterator, Mapping, MappingView, Set
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge.errors import DtypeError, ExchangeError, ShareError, UnsupportedLeafError

from ._autograd import has_tangent
from ._dtypes import JAX_TO_TORCH, TORCH_TO_JAX, jax_dtype_fix, torch_dtype_fix
from ._paths import Path, join_path

__all__ = [
    "FRAMEWORK_ERRORS",
    "cannot_share",
    "check_array",
    "check_copy",
    "check_no_derivative",
    "check_tensor",
    "leaf_name",
    "raise_with_leaf",
    "refuse",
    "refuse_64_bit",
    "refuse_deleted",
]

# What torch and JAX raise when an operation fails; AssertionError comes from fake tensors and torch.compile.
FRAMEWORK_ERRORS = (RuntimeError, ValueError, TypeError, BufferError, AssertionError)

_SEE_DOCS = "See docs/sharing-memory.md."
_ALLOWED_LEAVES = "Every leaf must be a torch.Tensor, a jax.Array, a numpy.ndarray, a number or a string."
_PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)


def check_copy(copy: Any) -> None:
    """Raise for any other value, such as ``copy="no"``, which Python would treat as true."""
    if copy is not None and copy is not True and copy is not False:
        raise TypeError(f"copy must be None, True or False; got {copy!r}.")


def check_tensor(tensor: Any, path: Path) -> None:
    """Raise unless this is a plain tensor: a dtype, a shape and a block of memory, without gradient."""
    if not isinstance(tensor, torch.Tensor):
        refuse(path, "JAX", _article_and_class(tensor), _fix_for_non_tensor(tensor))
    cls = type(tensor)
    if tensor.is_nested:
        refuse(
            path,
            "JAX",
            f"a nested tensor ({cls.__qualname__})",
            "Call .to_padded_tensor(0.0), or pass the list that .unbind() gives.",
        )
    if cls not in _PLAIN_CLASSES:
        if torch.nn.parameter.is_lazy(tensor):
            refuse(
                path,
                "JAX",
                f"a {cls.__qualname__} of a lazy module, which has no shape yet",
                "Call the module once on an example input first.",
            )
        if tensor.is_meta or "Fake" in cls.__name__:
            refuse(path, "JAX", f"a {cls.__name__}, with a shape but no values", "Pass a real tensor.")
        if hasattr(tensor, "device_mesh"):
            refuse(
                path,
                "JAX",
                "a DTensor, which lies on a mesh",
                "to_jax and to_flax take it. Elsewhere pass .full_tensor(), or .to_local() for this shard.",
            )
        refuse(
            path,
            "JAX",
            f"a {cls.__module__}.{cls.__qualname__}, a torch.Tensor subclass that may mean more "
            "than its memory",
            "If only its data matters, pass .as_subclass(torch.Tensor). Otherwise convert it to a plain tensor.",
        )
    if tensor.is_meta:
        refuse(path, "JAX", "a meta tensor, which holds a shape but no values", "Pass a real tensor.")
    if tensor.is_quantized:
        refuse(path, "JAX", f"a quantized tensor ({tensor.dtype})", torch_dtype_fix(tensor.dtype))
    if tensor.layout is not torch.strided:
        refuse(path, "JAX", f"a sparse tensor ({tensor.layout})", "Call .to_dense() first.")
    check_no_derivative(tensor, path)
    if tensor.dtype not in TORCH_TO_JAX:
        raise DtypeError(
            f"cannot share {leaf_name(path)} with JAX: JAX has no dtype for {tensor.dtype}. "
            f"{torch_dtype_fix(tensor.dtype)}"
        )
    if not _has_storage(tensor):
        refuse(
            path,
            "JAX",
            "a tensor without memory of its own (inside torch.func or torch.compile, or its storage freed)",
            "Cross outside the transform, or wrap the JAX function with as_torch_function.",
        )


def check_no_derivative(tensor: torch.Tensor, path: Path) -> None:
    """Raise for a tensor whose derivative an array would drop."""
    if tensor.requires_grad:
        refuse(
            path,
            "JAX",
            "a tensor that requires grad, and a shared array would drop the gradient",
            "Call .detach() first; or wrap the JAX function with as_torch_function, which keeps gradients.",
        )
    if has_tangent(tensor):
        refuse(
            path,
            "JAX",
            "a dual tensor of forward-mode autograd, and a shared array would drop the tangent",
            "Pass forward_ad.unpack_dual(tensor).primal; or wrap the JAX function with as_torch_function.",
        )


def _has_storage(tensor: torch.Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:  # a wrapper of functorch or functionalization, which has no storage
        return False


def check_array(array: Any, path: Path, sharded: bool = False) -> None:
    """Raise unless this is an array with values, in the memory of one device unless ``sharded``."""
    if isinstance(array, jax.core.Tracer):
        refuse(
            path,
            "torch",
            f"a tracer ({array}), which has no values while JAX traces a function",
            "Cross outside jit, grad and vmap; or wrap the torch function with as_jax_function.",
        )
    if not isinstance(array, jax.Array):
        refuse(path, "torch", _article_and_class(array), _fix_for_non_leaf(array) or _ALLOWED_LEAVES)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        refuse(path, "torch", f"a PRNG key array ({array.dtype})", jax_dtype_fix(array.dtype))
    if array.dtype not in JAX_TO_TORCH:
        raise DtypeError(
            f"cannot share {leaf_name(path)} with torch: torch has no dtype for {array.dtype}. "
            f"{jax_dtype_fix(array.dtype)}"
        )
    if array.is_deleted():
        refuse_deleted(path, "torch")
    if (count := array.sharding.num_devices) > 1 and not sharded:
        refuse(
            path,
            "torch",
            f"an array on {count} devices ({array.sharding})",
            "Gather it with jax.device_put(array, jax.devices()[0]), or pass array.addressable_data(i)."
            if array.is_fully_addressable
            else "Pass mesh=torch_mesh(array.sharding.mesh) for a DTensor, or array.addressable_data(0).",
        )


def refuse_deleted(path: Path, framework: str) -> NoReturn:
    refuse(
        path,
        framework,
        "a deleted array (its buffer was donated, or .delete() was called)",
        "Cross before the donation, or do not donate the argument.",
    )


def refuse_64_bit(dtype: torch.dtype | np.dtype, path: Path) -> NoReturn:
    half = str(dtype).replace("64", "32").replace("128", "64")
    raise DtypeError(
        f"cannot share {leaf_name(path)} with JAX: dtype {dtype} needs x64, which is off. Cast it to {half} "
        'first, or call jax.config.update("jax_enable_x64", True).'
    )


def cannot_share(path: Path, framework: str, why: str) -> NoReturn:
    raise ShareError(
        f"cannot share {leaf_name(path)} with {framework} under copy=False: {why}. Pass copy=None to let it be "
        f"copied. {_SEE_DOCS}"
    )


def raise_with_leaf(err: BaseException, thing: Any, framework: str, path: Path) -> NoReturn:
    """Raise an `ExchangeError` that names the leaf, caused by an error of torch or JAX."""
    raise ExchangeError(
        f"cannot share {leaf_name(path)} with {framework}: {_article_and_class(thing)} made torch or JAX raise "
        f"{type(err).__name__}: {err}. If a torch mode is active here (fake tensors, torch.compile), cross outside "
        "it. If the array's own computation failed, fix that computation."
    ) from err


def refuse(path: Path, framework: str, what: str, fix: str) -> NoReturn:
    """Raise for a leaf: what it is, and the fix."""
    raise UnsupportedLeafError(f"cannot share {leaf_name(path)} with {framework}: it is {what}. {fix}")


def leaf_name(path: Path) -> str:
    return f"'{join_path(path)}'" if path else "this leaf"


def _article_and_class(thing: Any) -> str:
    cls = type(thing)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    return f"a {name}"


def _fix_for_non_tensor(thing: Any) -> str:
    if isinstance(thing, torch.nn.Module):
        return "Pass its state_dict(), or use to_flax to convert its weights."
    return _fix_for_non_leaf(thing) or _ALLOWED_LEAVES


def _fix_for_non_leaf(thing: Any) -> str:
    """Advice for a container that JAX does not flatten, or for a function; empty for anything else."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return (
            "JAX does not flatten it: register its class with jax.tree_util.register_dataclass, or pass "
            "vars(it)."
        )
    if isinstance(thing, Mapping):
        return "JAX does not flatten it: pass dict(it), or register its class with jax.tree_util."
    if isinstance(thing, tuple | list | Set | Iterator | MappingView):
        return "JAX does not flatten it: pass list(it), or register its class with jax.tree_util."
    if callable(thing):
        return (
            f"{_ALLOWED_LEAVES} Take functions out first, as equinox.partition(tree, equinox.is_array) does."
        )
    return ""
