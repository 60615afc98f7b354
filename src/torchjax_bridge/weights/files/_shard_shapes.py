"""The shape of a shard of every leaf of a template, also on a mesh that has no devices here."""

from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import Path, join_path

from ..trees import FlaxLeaf, partition_of, read_flax

__all__ = ["shard_shapes"]


def shard_shapes(template: Any, mesh: Mesh | AbstractMesh | None) -> dict[Path, tuple[int, ...]]:
    """The shape of a shard by the path of a leaf, for the leaves that the template shards.

    Args:
        template: As for `to_flax`.
        mesh: Gives the names of axes a size, where the template does not.

    Raises:
        CheckpointError: The shape of a leaf cannot be cut this way, or a mesh is given and no leaf names an axis.
    """
    found: dict[Path, tuple[int, ...]] = {}
    named = False
    for leaf in read_flax(template).root.flat().values():
        try:
            sharding = _sharding(leaf, mesh)
            shard = None if sharding is None else sharding.shard_shape(leaf.shape)
        except ValueError as err:
            reason = str(err).splitlines()[0]
            raise CheckpointError(
                f"'{join_path(leaf.path)}' of the template cannot be sharded as it says: {reason}"
            ) from err
        if shard is not None:
            found[leaf.path] = shard
            named |= any(part is not None for part in getattr(sharding, "spec", ()))
    if mesh is not None and not named:
        raise CheckpointError(
            f"mesh= gives {', '.join(map(repr, mesh.axis_names))} a size, but no leaf of the template names an "
            "axis: annotate them, as with nnx.with_partitioning, or leave mesh= out."
        )
    return found


def _sharding(leaf: FlaxLeaf, mesh: Mesh | AbstractMesh | None) -> Sharding | None:
    sharding = getattr(leaf.value, "sharding", None)
    if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
        return sharding
    if isinstance(sharding, Sharding) and not isinstance(sharding, NamedSharding):
        return sharding
    spec = partition_of(leaf)
    return None if spec is None or mesh is None else NamedSharding(mesh, spec)
