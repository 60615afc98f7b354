"""Sharded values cross shard by shard: torch's ``DTensor`` <-> a ``jax.Array`` with a ``NamedSharding``.

Each process hands over its own shard, in place where the ``copy=`` contract allows that. Nothing is sent.
``_placements`` says which sharding it is, ``_tensors`` converts the shard. Refuses what lies differently on
the two sides; ``to_flax`` moves such values.
"""

import sys
from typing import TYPE_CHECKING, Any

import jax
import torch
from jax.sharding import NamedSharding

from ._meshes import device_of_this_rank, jax_mesh, ranks_of
from ._paths import Path
from ._placements import Refusal, array_sharding, tensor_placements
from ._refusals import check_array, check_no_derivative, refuse
from ._tensors import array_to_torch, tensor_to_jax

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = [
    "array_of_shard",
    "array_to_leaf",
    "dtensor_class",
    "dtensor_of_shard",
    "leaf_to_jax",
    "local_tensor",
]


def dtensor_class() -> "type[DTensor] | None":
    """The class of sharded tensors; None while nothing has imported it, for then there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def leaf_to_jax(
    leaf: Any, *, copy: bool | None = None, device: Any = None, path: Path = (), mesh: Any = None
) -> Any:
    """A leaf as `tensor_to_jax` converts it, or a ``DTensor`` as an array over a mesh.

    Args:
        leaf: The leaf.
        copy: As for `tensor_to_jax`; it says how this process's shard crosses.
        device: As for `tensor_to_jax`; None for a ``DTensor``.
        path: Where the leaf sits in its tree, for errors.
        mesh: The JAX mesh of the result; None for that of the ``DTensor``.

    Raises:
        UnsupportedLeafError: Also for a pending sum, unequal shards, or ranks that are not in the mesh.
        DeviceError: As for `jax_mesh`.
    """
    if type(leaf) is not dtensor_class():
        return tensor_to_jax(leaf, copy=copy, device=device, path=path)
    if device is not None:
        refuse(
            path,
            "JAX",
            f"a DTensor, and device={device} is one device",
            "Leave device out, or call .full_tensor().",
        )
    check_no_derivative(leaf, path)
    over = jax_mesh(leaf.device_mesh if mesh is None else mesh)
    shape = tuple(leaf.shape)
    sharding = array_sharding(leaf.device_mesh, leaf.placements, shape, over)
    if isinstance(sharding, Refusal):
        refuse(path, "JAX", *sharding)
    local = local_tensor(leaf)
    if tuple(local.shape) != sharding.shard_shape(shape):
        refuse(
            path,
            "JAX",
            f"a DTensor of shape {shape} whose shard here has shape {tuple(local.shape)}, where its placements "
            f"{leaf.placements} give {sharding.shard_shape(shape)}",
            "Make it with DTensor.from_local(..., shape=, stride=) or distribute_tensor.",
        )
    return array_of_shard(local, sharding, shape, copy=copy, path=path)


def array_of_shard(
    local: torch.Tensor,
    sharding: NamedSharding,
    shape: tuple[int, ...],
    *,
    copy: bool | None = None,
    path: Path = (),
) -> jax.Array:
    """An array of this shape of which this process holds ``local``, as `tensor_to_jax` converts it."""
    device: Any
    (device,) = sharding.addressable_devices
    there = local.is_cpu and device.platform == "cpu"
    shard = tensor_to_jax(local, copy=copy, device=None if there else device, path=path)
    return jax.make_array_from_single_device_arrays(shape, sharding, [shard])


def local_tensor(dtensor: "DTensor") -> torch.Tensor:
    """The shard of this process, without autograd, once it has arrived."""
    with torch.no_grad():
        local = dtensor.to_local()
    wait = getattr(local, "wait", None)  # the result of a collective that may still be under way
    return wait() if callable(wait) else local.data


def array_to_leaf(
    array: Any, *, copy: bool | None = None, device: Any = None, path: Path = (), mesh: "DeviceMesh"
) -> Any:
    """A leaf as `array_to_torch` converts it, or an array over a mesh as a ``DTensor``.

    Args:
        array: The leaf. An array with a ``NamedSharding`` becomes a ``DTensor``, any other leaf what it becomes
            without a mesh.
        copy: As for `array_to_torch`; it says how this process's shard crosses.
        device: As for `array_to_torch`; None for an array over a mesh.
        path: Where the leaf sits in its tree, for errors.
        mesh: The torch mesh of the result.

    Raises:
        UnsupportedLeafError: Also for a sharding without a counterpart over this mesh.
    """
    if (
        not isinstance(array, jax.Array)
        or isinstance(array, jax.core.Tracer)
        or not (isinstance(array.sharding, NamedSharding) or array.sharding.num_devices > 1)
    ):
        return array_to_torch(array, copy=copy, device=device, path=path)
    check_array(array, path, sharded=True)
    if device is not None:
        refuse(path, "torch", f"an array over a mesh, and device={device} is one device", "Leave device out.")
    shape = tuple(array.shape)
    placements = tensor_placements(array.sharding, mesh, shape)
    if isinstance(placements, Refusal):
        refuse(path, "torch", *placements)
    here = [shard for shard in array.addressable_shards if shard.device == device_of_this_rank(mesh)]
    if len(here) != 1:
        refuse(
            path,
            "torch",
            f"an array without a shard on a device of ranks {ranks_of(mesh)}",
            "Pass another mesh.",
        )
    local = array_to_torch(here[0].data, copy=copy, path=path)
    return dtensor_of_shard(local, mesh, placements, shape)


def dtensor_of_shard(
    local: torch.Tensor, mesh: "DeviceMesh", placements: Any, shape: tuple[int, ...]
) -> "DTensor":
    """A ``DTensor`` of this shape of which this process holds ``local``, with strides in its order."""
    from torch.distributed.tensor import DTensor

    # The axes in the order in which the shard has them in memory.
    strides, step = [0] * len(shape), 1
    for axis in sorted(range(len(shape)), key=lambda axis: (local.stride(axis), -axis)):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )
