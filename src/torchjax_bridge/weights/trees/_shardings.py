"""Where the template wants its leaves, and how a tensor gets there without being whole on one device first.

A template gives a sharding by a struct or an array over several devices, or by names of axes: in the metadata
of an nnx variable or in the box of a linen variable. The mesh of ``jax.set_mesh`` gives the names a meaning.
A leaf on a single device gives none, and follows the source.
"""

from typing import Any

import flax.linen
import jax
import numpy as np
import torch
from flax import nnx
from flax.core import meta
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from torchjax_bridge.errors import PlanError, ShareError
from torchjax_bridge.exchange import join_path, to_jax

from ._flax_tree import FlaxLeaf

__all__ = ["partition_of", "place_on_sharding", "sharding_of"]


def sharding_of(leaf: FlaxLeaf) -> Sharding | None:
    """The sharding that the template gives a leaf; None if it gives none.

    Raises:
        PlanError: It is sharded over a mesh without devices, and ``jax.set_mesh`` gives none.
    """
    sharding = getattr(leaf.value, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        if sharding.mesh.empty:
            return None
        mesh = _mesh(leaf.holder)
        if mesh is None or mesh.abstract_mesh.shape != sharding.mesh.shape:
            raise PlanError(
                f"'{join_path(leaf.path)}' of the template is sharded over {sharding.mesh}, which has no devices: "
                "convert under jax.set_mesh with the mesh that the template was made for."
            )
        return NamedSharding(mesh, sharding.spec)
    if isinstance(sharding, Sharding) and (
        isinstance(leaf.value, jax.ShapeDtypeStruct) or len(sharding.device_set) > 1
    ):
        return sharding
    if (spec := _spec(leaf.holder)) and (mesh := _mesh(leaf.holder)) is not None:
        return NamedSharding(mesh, spec)
    return None


def partition_of(leaf: FlaxLeaf) -> PartitionSpec | None:
    """The names of axes that the template gives a leaf in its metadata; None if it gives none."""
    return _spec(leaf.holder)


def _mesh(holder: Any) -> Mesh | None:
    """The mesh of the metadata, or that of ``jax.set_mesh``."""
    named = (
        holder.get_metadata() if isinstance(holder, nnx.Variable) else {"mesh": getattr(holder, "mesh", None)}
    )
    if isinstance(mesh := named.get("mesh"), Mesh):
        return mesh
    if jax.sharding.get_abstract_mesh().empty:
        return None
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # under jax.jit, where only the abstract mesh is known
        return None


def _spec(holder: Any) -> PartitionSpec | None:
    """The names of the axes, as axes of a mesh; None if there are none."""
    if isinstance(holder, nnx.Variable):
        if not holder.get_metadata().get("out_sharding"):
            return None
        spec = nnx.get_partition_spec(holder).get_raw_value()
        return spec if isinstance(spec, PartitionSpec) else None
    if not isinstance(holder, meta.Partitioned):
        return None
    if isinstance(holder, flax.linen.LogicallyPartitioned):
        return flax.linen.logical_to_mesh(holder.get_partition_spec(), holder.rules)
    return holder.get_partition_spec()


def place_on_sharding(tensor: torch.Tensor, sharding: Sharding, name: str, copy: bool | None) -> jax.Array:
    """A tensor as an array with this sharding. It is cut on the host: each device gets only its part.

    Args:
        tensor: On any device and of any strides.
        sharding: The sharding of the result.
        name: For errors.
        copy: As for `to_jax`; parts on several devices are always copies.

    Raises:
        ExchangeError: The tensor cannot cross, or ``copy=False`` was asked and its memory is elsewhere.
        PlanError: The shape cannot be cut this way.
    """
    at_home = len(sharding.device_set) == 1 and not copy
    array = to_jax({name: tensor}, copy=copy if at_home else None)[name]
    if at_home and sharding.device_set == array.devices():
        return jax.device_put(array, sharding)  # the same memory
    if copy is False:
        raise ShareError(
            f"cannot share '{name}' under copy=False: the template has it on {_devices(sharding)}. Pass copy=None "
            "or copy=True to have it copied there."
        )
    try:
        if next(iter(array.devices())).platform != "cpu":
            return jax.device_put(to_jax(tensor, copy=True) if copy else array, sharding)
        values = np.asarray(array)
        return jax.make_array_from_callback(
            array.shape, sharding, lambda part: np.array(values[part], order="C")
        )
    except ValueError as err:
        raise PlanError(f"'{name}' cannot be placed as the template has it: {err}") from err


def _devices(sharding: Sharding) -> str:
    count = len(sharding.device_set)
    return f"{count} devices" if count > 1 else f"{next(iter(sharding.device_set))}"
