"""The map of placements: torch's ``Shard``, ``Replicate`` and strided shards <-> JAX's ``PartitionSpec``.

A placement says for one mesh dimension which tensor dimension it splits; a spec says for one tensor dimension which
mesh axes split it, the outermost first. If several mesh dimensions split one tensor dimension, torch lets
earlier ones split first. A strided shard splits after as many later ones as its ``split_factor`` counts
pieces (FSDP2 over tensor parallelism).

What was computed is compared with both frameworks' own offsets, so a placement that means anything else is refused
and never wrong. Refuses pending sums, shards of unequal sizes, and placements of classes that are not torch's.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import DeviceError

from ._meshes import axes_of, device_of_this_rank, jax_mesh, ranks_of
from ._paths import Path
from ._refusals import refuse

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["Refusal", "array_sharding", "jax_sharding", "tensor_placements", "torch_placements"]


class Refusal(NamedTuple):
    """Why something has no counterpart, and what to do."""

    what: str
    fix: str

    def raise_for(self, path: Path, framework: str) -> None:
        """Raise it, with the name of the leaf."""
        refuse(path, framework, self.what, self.fix)


def jax_sharding(device_mesh: Any, placements: Sequence[Any], ndim: int) -> NamedSharding:
    """The JAX sharding of a ``DTensor`` with these placements.

    Args:
        device_mesh: Its ``DeviceMesh``, or a part of one.
        placements: A placement for each dimension of the mesh: ``Shard``, ``Replicate``, or the strided shards that
            FSDP2 makes over tensor parallelism.
        ndim: The number of dimensions of the tensor.

    Returns:
        A ``NamedSharding`` over ``jax_mesh(device_mesh)``. Axes of the mesh that do not split the tensor replicate
        it.

    Raises:
        UnsupportedLeafError: Placements without a counterpart, such as a pending sum.
        DeviceError: As for `jax_mesh`, whose first call for a mesh is collective.
    """
    mesh = jax_mesh(device_mesh)
    if isinstance(device_mesh, Mesh):
        raise DeviceError("placements belong to a torch.distributed.device_mesh.DeviceMesh; got a JAX Mesh.")
    # A size that every mesh divides, so that offsets can be compared.
    found = array_sharding(device_mesh, tuple(placements), (mesh.size,) * ndim, mesh)
    if isinstance(found, Refusal):
        refuse((), "JAX", *found)
    return found


def torch_placements(sharding: Any, ndim: int) -> "tuple[Placement, ...]":
    """The placements of a ``DTensor`` that lies as an array with this sharding.

    Args:
        sharding: A ``jax.sharding.NamedSharding``.
        ndim: The number of dimensions of the array.

    Returns:
        A placement for each axis of the sharding's mesh, in their order, for ``torch_mesh(sharding.mesh)``.

    Raises:
        UnsupportedLeafError: Another kind of sharding, one with a pending sum, or one that leaves axes open.

    >>> import jax
    >>> from jax.sharding import NamedSharding, PartitionSpec
    >>> mesh = jax.make_mesh((1, 1), ("dp", "tp"))
    >>> torch_placements(NamedSharding(mesh, PartitionSpec(None, ("dp", "tp"))), 2)
    (Shard(dim=1), Shard(dim=1))
    """
    found = _placements(sharding, [(axis,) for axis in range(_mesh_ndim(sharding))], ndim)
    if isinstance(found, Refusal):
        refuse((), "torch", *found)
    return found


@lru_cache(maxsize=4096)
def array_sharding(
    device_mesh: "DeviceMesh", placements: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh
) -> NamedSharding | Refusal:
    """The sharding over ``mesh`` of a ``DTensor`` of this shape, compared with torch's own offsets."""
    axes = axes_of(device_mesh, mesh)
    if axes is None:
        return Refusal(
            f"a DTensor on ranks {ranks_of(device_mesh)}, and the mesh is over other devices or lies across them",
            "Pass mesh=jax_mesh(dtensor.device_mesh), or leave mesh out.",
        )
    order = _splitting_order(placements, device_mesh, len(shape))
    if isinstance(order, Refusal):
        return order
    for dimension, splitting in enumerate(order):
        parts = [device_mesh.size(at) for at in splitting]
        if shape[dimension] % math.prod(parts):
            return _unequal(shape[dimension], dimension, parts)
    names = [[mesh.axis_names[axis] for at in splitting for axis in axes[at]] for splitting in order]
    sharding = NamedSharding(mesh, _spec(names))
    return sharding if _agree(sharding, device_mesh, placements, shape) else _no_counterpart(placements)


@lru_cache(maxsize=4096)
def tensor_placements(
    sharding: Any, device_mesh: "DeviceMesh", shape: tuple[int, ...]
) -> "tuple[Placement, ...] | Refusal":
    """The placements over ``device_mesh`` of an array of this shape, compared with torch's own offsets."""
    if not isinstance(sharding, NamedSharding):
        return _not_named(sharding)
    axes = axes_of(device_mesh, sharding.mesh)
    if axes is None:
        return Refusal(
            f"an array over {sharding.mesh.size} devices, and mesh= is over the ranks {ranks_of(device_mesh)}",
            "Pass mesh=torch_mesh(array.sharding.mesh).",
        )
    placements = _placements(sharding, axes, len(shape))
    if isinstance(placements, Refusal) or _agree(sharding, device_mesh, placements, shape):
        return placements
    return _no_counterpart(sharding.spec)


def _splitting_order(
    placements: Sequence[Any], device_mesh: "DeviceMesh", ndim: int
) -> list[list[int]] | Refusal:
    """For each tensor dimension the mesh dimensions that split it, the outermost first."""
    from torch.distributed.tensor import Replicate, Shard

    strided = _strided_shard()
    if len(placements) != device_mesh.ndim:
        return Refusal(
            f"a DTensor with {len(placements)} placements on a mesh of {device_mesh.ndim} dimensions",
            "Give one for each.",
        )
    order: list[list[int]] = [[] for _ in range(ndim)]
    for at in reversed(range(len(placements))):  # a dimension goes before or behind later ones
        placement = placements[at]
        if type(placement) is Replicate:
            continue
        if getattr(placement, "is_partial", bool)():
            name = (device_mesh.mesh_dim_names or [f"dim_{i}" for i in range(at + 1)])[at]
            return Refusal(
                f"a DTensor with a pending sum over mesh dim '{name}'",
                "Call .redistribute(placements=[Replicate()]) first.",
            )
        if type(placement) not in (Shard, strided) or not -ndim <= placement.dim < ndim:
            return _no_counterpart(placements)
        splitting = order[placement.dim % ndim]
        pieces = placement.split_factor if type(placement) is strided else 1
        sizes = [device_mesh.size(later) for later in splitting]
        before = next((n for n in range(len(sizes) + 1) if math.prod(sizes[:n]) == pieces), None)
        if before is None:
            return _no_counterpart(placements)
        splitting.insert(before, at)
    return order


def _placements(
    sharding: Any, axes: Sequence[tuple[int, ...]], ndim: int
) -> "tuple[Placement, ...] | Refusal":
    """The placements for mesh dimensions that are these axes of the sharding's mesh."""
    from torch.distributed.tensor import Replicate, Shard

    if not isinstance(sharding, NamedSharding):
        return _not_named(sharding)
    spec, sizes = sharding.spec, sharding.mesh.devices.shape
    if getattr(spec, "unreduced", None):  # releases of JAX without it have no pending sums
        return Refusal(f"an array with a pending sum over {sorted(spec.unreduced)}", "Reshard it first.")
    if len(spec) > ndim or any(part is PartitionSpec.UNCONSTRAINED for part in spec):
        return _no_counterpart(spec)
    place_of = {group[0]: (at, group) for at, group in enumerate(axes) if group}
    found: list[Any] = [Replicate() for _ in axes]
    for dimension, part in enumerate(spec):
        names = (part,) if isinstance(part, str) else tuple(part or ())
        numbers = [sharding.mesh.axis_names.index(name) for name in names]
        splitting: list[int] = []
        while numbers:
            at, group = place_of.get(numbers[0], (None, (numbers[0],)))
            if (at is None and sizes[numbers[0]] > 1) or tuple(numbers[: len(group)]) != group:
                return _no_counterpart(spec)
            numbers = numbers[len(group) :]
            splitting += [] if at is None else [at]
        for place, at in enumerate(splitting):
            outer = [axis for other in splitting[:place] if other > at for axis in axes[other]]
            pieces = math.prod(sizes[axis] for axis in outer)
            strided: Any = _strided_shard()
            if pieces > 1 and strided is None:
                return _no_counterpart(spec)
            found[at] = strided(dimension, split_factor=pieces) if pieces > 1 else Shard(dimension)
    return tuple(found)


def _strided_shard() -> Any:
    """The class of strided shards, for which torch has no public name; None where it is missing."""
    from torch.distributed.tensor import placement_types

    return getattr(placement_types, "_StridedShard", None)


def _agree(
    sharding: NamedSharding, device_mesh: "DeviceMesh", placements: Sequence[Any], shape: tuple[int, ...]
) -> bool:
    """Whether torch and JAX give this rank the same elements of a tensor of this shape."""
    from torch.distributed.tensor import DTensor

    if not shape:  # nothing can split it
        return True
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    empty = torch.empty(0, device=device_mesh.device_type)
    of_torch = DTensor.from_local(
        empty, device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    ).__create_chunk_list__()
    try:
        of_jax = sharding.devices_indices_map(shape)[device_of_this_rank(device_mesh)]
    except (ValueError, KeyError):  # JAX does not split this shape so, or has no part of it here
        return False
    ranges = [part.indices(size) for part, size in zip(of_jax, shape, strict=True)]
    sizes = tuple(max(stop - start, 0) for start, stop, _ in ranges)
    offsets = tuple(start for start, _, _ in ranges)
    return (
        len(of_torch) == 1
        and tuple(of_torch[0].sizes) == sizes
        and (0 in sizes or tuple(of_torch[0].offsets) == offsets)
    )


def _spec(names: Sequence[Sequence[Any]]) -> PartitionSpec:
    parts = [None if not part else part[0] if len(part) == 1 else tuple(part) for part in names]
    return PartitionSpec(*parts)


def _mesh_ndim(sharding: Any) -> int:
    return sharding.mesh.devices.ndim if isinstance(sharding, NamedSharding) else 0


def _no_counterpart(placements: Any) -> Refusal:
    shown = tuple(placements) if not isinstance(placements, PartitionSpec) else placements
    return Refusal(
        f"laid out as {shown}, which the other framework cannot express",
        "Redistribute it (torch), or jax.device_put it to a sharding that splits each axis by whole mesh axes.",
    )


def _not_named(sharding: Any) -> Refusal:
    return Refusal(
        f"an array with {what_kind(sharding)}",
        "jax.device_put it to a jax.sharding.NamedSharding over the mesh first.",
    )


def _unequal(size: int, dimension: int, parts: Sequence[int]) -> Refusal:
    counts = [size]
    for part in parts:
        counts = [max(min(-(-n // part), n - i * -(-n // part)), 0) for n in counts for i in range(part)]
    what = "rows" if dimension == 0 else f"elements of axis {dimension}"
    return Refusal(
        f"a DTensor whose {size} {what} on {len(counts)} ranks lie {', '.join(map(str, counts))}; a jax.Array "
        "needs equal shards",
        "Replicate it, shard another dimension, or use to_flax, which moves it.",
    )
