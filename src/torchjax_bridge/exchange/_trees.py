"""The same two verbs over pytrees: `to_jax` and `to_torch`.

A tree is a JAX pytree. Each leaf crosses by the rules of ``_tensors``; a leaf that cannot is tagged with its
path, all such leaves are gathered, and one error names them. Leaves that are one object on one side are one
object on the other. What JAX cannot flatten or rebuild is refused in ``_pytree``.
"""

from collections.abc import Callable
from typing import Any, overload

import jax
import numpy as np
import torch

from torchjax_bridge.errors import ExchangeError

from . import _dlpack
from ._devices import jax_device, torch_device
from ._dlpack import PlainArray
from ._paths import from_jax_keypath
from ._pytree import flatten, rebuild
from ._refusals import FOREIGN, check_copy
from ._tensors import array_to_torch, tensor_to_jax

__all__ = ["to_jax", "to_torch"]


@overload
def to_jax(
    tree: torch.Tensor | jax.Array | np.ndarray, *, copy: bool | None = None, device: Any = None
) -> jax.Array: ...
@overload
def to_jax(tree: Any, *, copy: bool | None = None, device: Any = None) -> Any: ...
def to_jax(tree: Any, *, copy: bool | None = None, device: Any = None) -> Any:
    """The same pytree with every ``torch.Tensor`` and ``numpy.ndarray`` leaf a ``jax.Array``, bit for bit.

    Args:
        tree: A pytree (dicts, tuples, lists, namedtuples, registered dataclasses, ``None``) whose leaves are
            ``torch.Tensor``, ``numpy.ndarray`` or ``jax.Array``; a ``jax.Array`` is passed through, and so are
            Python's and NumPy's numbers, bools and strings, which are the same on both sides. Or one tensor.
        copy: ``None`` shares memory where it can be shared and copies where it cannot; ``False`` shares
            or raises; ``True`` always gives fresh, row-major memory that nothing else holds.
        device: A ``jax.Device``, a ``torch.device`` or a name; ``None`` leaves each leaf where it is.

    Returns:
        A pytree of the same structure. Two leaves that are one tensor become one array.

    Raises:
        ExchangeError: Some leaves cannot cross. The message lists every such leaf with its path, the reason
            and the fix; ``err.faults`` holds one error a leaf; the class is that of the first
            (`UnsupportedLeafError`, `DtypeError`, `NarrowingError`, `ShareError`, `DeviceError`).

    Memory:
        With ``copy=None`` an array shares its tensor's memory when the tensor is gap-free (in any
        permutation of its axes), 64-byte aligned, free of conj and neg bits and not narrowed. Then
        writing to the tensor in place changes the array, also while JAX still computes with it: write only
        after ``jax.block_until_ready`` of the results, or pass ``copy=True``. Nor resize a shared tensor or
        move it to shared memory: that frees what JAX reads. See ``docs/sharing-memory.md``. A NumPy array is
        treated as the tensor on its memory, read-only ones too; it is copied where torch has no such tensor
        (negative strides, another byte order).

    With x64 off, ``int64`` and ``uint64`` leaves become 32-bit when every value fits and raise otherwise;
    ``float64`` and ``complex128`` always raise. Nothing is narrowed in silence.

    >>> import torch
    >>> to_jax({"w": torch.ones(2, 3), "b": None})["w"].shape
    (2, 3)
    """
    if isinstance(tree, torch.Tensor):
        if copy is None and device is None:  # the plain case pays for no keywords
            return tensor_to_jax(tree)
        return tensor_to_jax(tree, copy=copy, device=device)
    return _cross(tensor_to_jax, tree, copy, device)


@overload
def to_torch(
    tree: torch.Tensor | jax.Array | np.ndarray, *, copy: bool | None = None, device: Any = None
) -> torch.Tensor: ...
@overload
def to_torch(tree: Any, *, copy: bool | None = None, device: Any = None) -> Any: ...
def to_torch(tree: Any, *, copy: bool | None = None, device: Any = None) -> Any:
    """The same pytree with every ``jax.Array`` and ``numpy.ndarray`` leaf a ``torch.Tensor``, bit for bit.

    Args:
        tree: A pytree whose leaves are ``jax.Array``, ``numpy.ndarray`` or ``torch.Tensor``; a ``torch.Tensor``
            is passed through, and so are Python's and NumPy's numbers, bools and strings. Or one array.
        copy: ``None`` shares memory where it can be shared and copies where it cannot; ``False`` shares
            or raises; ``True`` always gives fresh, row-major memory that nothing else holds.
        device: A ``torch.device``, a ``jax.Device`` or a name; ``None`` leaves each leaf where it is.

    Returns:
        A pytree of the same structure. A tensor made of an array does not require grad; a tensor passed
        through keeps what it had. Two leaves that are one array become one tensor.

    Raises:
        ExchangeError: As for `to_jax`.

    Memory:
        With ``copy=None`` a tensor shares its array's memory. JAX takes its arrays to be immutable, and
        torch has no read-only tensors: do not write to the result; pass ``copy=True`` for a tensor to write
        to. See ``docs/sharing-memory.md``. A NumPy array is shared as ``torch.from_numpy`` shares it; one that is
        read-only, or laid out as no tensor can be, is copied.

    >>> import jax.numpy as jnp
    >>> to_torch((jnp.zeros(3), jnp.ones(2, jnp.bfloat16)))[1].dtype
    torch.bfloat16
    """
    if type(tree) is PlainArray and copy is None and device is None:
        try:  # as array_to_torch begins: to call it would be a twentieth of the whole
            return _dlpack.lend(tree)
        except FOREIGN:
            pass
    if isinstance(tree, jax.Array):
        return array_to_torch(tree, copy=copy, device=device)
    return _cross(array_to_torch, tree, copy, device)


def _cross(one: Callable[..., Any], tree: Any, copy: bool | None, device: Any) -> Any:
    check_copy(copy)
    if device is not None:  # a fault of the call, not of a leaf
        device = jax_device(device) if one is tensor_to_jax else torch_device(device)
    leaves, structure = flatten(tree)
    crossed: dict[int, Any] = {}  # by identity, so that one leaf stays one leaf
    try:
        if copy is None and device is None:
            for leaf in leaves:
                key = id(leaf)
                if key not in crossed:
                    crossed[key] = one(leaf)
        else:
            for leaf in leaves:
                key = id(leaf)
                if key not in crossed:
                    crossed[key] = one(leaf, copy=copy, device=device)
    except ExchangeError as err:
        _raise_every_fault(one, tree, copy, device, err)
    return rebuild(structure, [crossed[id(leaf)] for leaf in leaves], tree)


def _raise_every_fault(
    one: Callable[..., Any], tree: Any, copy: bool | None, device: Any, first: ExchangeError
) -> None:
    """Cross every leaf once more, now with its path, and raise one error for all that cannot."""
    faults: list[ExchangeError] = []
    for keypath, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        try:
            one(leaf, copy=copy, device=device, path=from_jax_keypath(keypath))
        except ExchangeError as err:
            faults.append(err)
    if len(faults) == 1:
        raise faults[0] from faults[0].__cause__
    if not faults:  # a leaf that changed under our hands
        raise first
    lines = "\n".join(f"  {fault}" for fault in faults)
    gathered = type(faults[0])(f"{len(faults)} leaves cannot cross:\n{lines}")
    gathered.faults = tuple(faults)
    raise gathered from None
