"""The two public functions over pytrees: `to_jax` and `to_torch`.

A tree is a JAX pytree. ``_tensors`` converts each leaf, ``_dtensors`` a sharded one. One error names every
leaf that cannot cross, with its path. A leaf that occurs several times is one object in the result, too.
``_pytree`` raises for what JAX cannot flatten or rebuild.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, overload

import jax
import numpy as np
import torch

from torchjax_bridge.errors import ExchangeError

from . import _dlpack
from ._cut import leaf_over_devices
from ._devices import jax_device, torch_device
from ._dlpack import PlainArray
from ._dtensors import array_to_leaf, dtensor_class, leaf_to_jax
from ._meshes import jax_mesh, torch_mesh
from ._paths import from_jax_keypath
from ._pytree import flatten, rebuild
from ._refusals import FRAMEWORK_ERRORS, check_copy
from ._tensors import array_to_torch, tensor_to_jax

__all__ = ["to_jax", "to_torch"]

_Tensor = torch.Tensor
_Parameter = torch.nn.Parameter


@overload
def to_jax(
    tree: torch.Tensor | jax.Array | np.ndarray,
    *,
    copy: bool | None = None,
    device: Any = None,
    mesh: Any = None,
) -> jax.Array: ...
@overload
def to_jax(tree: Any, *, copy: bool | None = None, device: Any = None, mesh: Any = None) -> Any: ...
def to_jax(tree: Any, *, copy: bool | None = None, device: Any = None, mesh: Any = None) -> Any:
    """The same pytree with every ``torch.Tensor`` and ``numpy.ndarray`` leaf a ``jax.Array``, bit for bit.

    Args:
        tree: One tensor, or a pytree (dicts, tuples, lists, namedtuples, registered dataclasses, ``None``) of
            ``torch.Tensor``, ``numpy.ndarray`` or ``jax.Array`` leaves. A ``jax.Array`` is passed through. So are
            Python's and NumPy's numbers, bools and strings.
        copy: ``None`` shares memory where it can be shared and copies where it cannot; ``False`` shares
            or raises; ``True`` always gives fresh, row-major memory that nothing else holds.
        device: A ``jax.Device``, a ``torch.device`` or a name; ``None`` leaves each leaf where it is. A
            ``jax.sharding.Sharding`` over host devices cuts each leaf; parts that are rows stay where they are.
        mesh: For ``DTensor`` leaves: the ``jax.sharding.Mesh`` or ``DeviceMesh`` over which the arrays lie.
            ``None`` is `jax_mesh` of each one's own mesh. Other leaves ignore it.

    Returns:
        A pytree of the same structure. Two leaves that are one tensor become one array. A ``DTensor`` becomes an
        array with a ``NamedSharding``; it crosses shard by shard, each process its own, and nothing is sent.

    Raises:
        ExchangeError: Some leaves cannot cross. The message lists every such leaf with its path, the reason
            and the fix. ``err.faults`` holds one error per leaf. The class is that of the first error
            (`UnsupportedLeafError`, `DtypeError`, `NarrowingError`, `ShareError`, `DeviceError`).

    Memory:
        With ``copy=None`` an array shares its tensor's memory if the tensor is gap-free (in any permutation
        of its axes), 64-byte aligned, free of conj and neg bits and not narrowed. Writing to the tensor in
        place then changes the array, even while JAX computes with it. So write only after
        ``jax.block_until_ready`` of the results, or pass ``copy=True``. Do not resize a shared tensor or move it
        to shared memory: that frees memory that JAX reads. See ``docs/sharing-memory.md``. A NumPy array is
        treated as a tensor on its memory, even if it is read-only. It is copied where torch allows no such
        tensor (negative strides, another byte order).

    With x64 off, ``int64`` and ``uint64`` leaves become 32-bit if every value fits, and raise otherwise.
    ``float64`` and ``complex128`` always raise. Nothing is narrowed silently.

    >>> import torch
    >>> to_jax({"w": torch.ones(2, 3), "b": None})["w"].shape
    (2, 3)
    """
    cls = type(tree)
    if cls is _Tensor or cls is _Parameter:
        if copy is None and device is None:  # skip the cost of keyword arguments
            return tensor_to_jax(tree)
        if not isinstance(device, jax.sharding.Sharding):
            return tensor_to_jax(tree, copy=copy, device=device)
    if mesh is not None:
        mesh = jax_mesh(mesh)
    return _convert_tree("JAX", tree, copy, device, mesh)


@overload
def to_torch(
    tree: torch.Tensor | jax.Array | np.ndarray,
    *,
    copy: bool | None = None,
    device: Any = None,
    mesh: Any = None,
) -> torch.Tensor: ...
@overload
def to_torch(tree: Any, *, copy: bool | None = None, device: Any = None, mesh: Any = None) -> Any: ...
def to_torch(tree: Any, *, copy: bool | None = None, device: Any = None, mesh: Any = None) -> Any:
    """The same pytree with every ``jax.Array`` and ``numpy.ndarray`` leaf a ``torch.Tensor``, bit for bit.

    Args:
        tree: One array, or a pytree of ``jax.Array``, ``numpy.ndarray`` or ``torch.Tensor`` leaves. A
            ``torch.Tensor`` is passed through. So are Python's and NumPy's numbers, bools and strings.
        copy: ``None`` shares memory where it can be shared and copies where it cannot; ``False`` shares
            or raises; ``True`` always gives fresh, row-major memory that nothing else holds.
        device: A ``torch.device``, a ``jax.Device`` or a name; ``None`` leaves each leaf where it is.
        mesh: A ``DeviceMesh`` or ``jax.sharding.Mesh``: arrays with a ``NamedSharding`` become ``DTensor``s
            over it. Other leaves ignore it. ``None`` refuses arrays on several devices.

    Returns:
        A pytree of the same structure. A new tensor does not require grad; a tensor that is passed through is
        unchanged. Two leaves that are one array become one tensor.

    Raises:
        ExchangeError: As for `to_jax`.

    Memory:
        With ``copy=None`` a tensor shares its array's memory. JAX assumes that its arrays are immutable, and torch
        has no read-only tensors. So do not write to the result; pass ``copy=True`` for a tensor to write to. See
        ``docs/sharing-memory.md``. A NumPy array is shared as by ``torch.from_numpy``. It is copied if it is
        read-only or has strides that no tensor can have.

    >>> import jax.numpy as jnp
    >>> to_torch((jnp.zeros(3), jnp.ones(2, jnp.bfloat16)))[1].dtype
    torch.bfloat16
    """
    if type(tree) is PlainArray and copy is None and device is None and mesh is None:
        try:  # inlined from array_to_torch: the call would cost a twentieth of the crossing
            return _dlpack.export(tree)
        except FRAMEWORK_ERRORS:
            pass
    if mesh is not None:
        mesh = torch_mesh(mesh)
    elif isinstance(tree, jax.Array):
        return array_to_torch(tree, copy=copy, device=device)
    return _convert_tree("torch", tree, copy, device, mesh)


def _convert_tree(framework: str, tree: Any, copy: bool | None, device: Any, mesh: Any) -> Any:
    check_copy(copy)
    over_devices = framework == "JAX" and isinstance(device, jax.sharding.Sharding)
    if device is not None and not over_devices:
        # Here, so that a wrong device is reported once and not per leaf.
        device = jax_device(device) if framework == "JAX" else torch_device(device)
    leaves, structure = flatten(tree)
    convert_leaf: Callable[..., Any]
    if over_devices:
        convert_leaf = partial(leaf_over_devices, device=device)
    elif framework == "JAX":
        kind = dtensor_class()
        sharded = kind is not None and kind in set(map(type, leaves))
        convert_leaf = partial(leaf_to_jax, mesh=mesh) if sharded else tensor_to_jax
    else:
        convert_leaf = array_to_torch if mesh is None else partial(array_to_leaf, mesh=mesh)
    converted: dict[int, Any] = {}  # by identity, so that a repeated leaf is converted once
    try:
        if copy is None and device is None:
            for leaf in leaves:
                key = id(leaf)
                if key not in converted:
                    converted[key] = convert_leaf(leaf)
        else:
            for leaf in leaves:
                key = id(leaf)
                if key not in converted:
                    converted[key] = convert_leaf(leaf, copy=copy, device=device)
    except ExchangeError as err:
        _raise_all_faults(convert_leaf, tree, copy, device, err)
    return rebuild(structure, [converted[id(leaf)] for leaf in leaves], tree)


def _raise_all_faults(
    convert_leaf: Callable[..., Any], tree: Any, copy: bool | None, device: Any, first: ExchangeError
) -> None:
    """Convert every leaf again, now with its path, and raise one error for all that cannot cross."""
    faults: list[ExchangeError] = []
    for keypath, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        try:
            convert_leaf(leaf, copy=copy, device=device, path=from_jax_keypath(keypath))
        except ExchangeError as err:
            faults.append(err)
    if len(faults) == 1:
        raise faults[0] from faults[0].__cause__
    if not faults:  # another thread changed the leaf between the two passes
        raise first
    lines = "\n".join(f"  {fault}" for fault in faults)
    gathered = type(faults[0])(f"{len(faults)} leaves cannot cross:\n{lines}")
    gathered.faults = tuple(faults)
    raise gathered from None
