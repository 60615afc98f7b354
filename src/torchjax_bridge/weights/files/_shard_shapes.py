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
        CheckpointError: The shape of a leaf cannot be cut this way.
    """
    found = {}
    for leaf in read_flax(template).root.flat().values():
        try:
            sharding = _sharding(leaf, mesh)
            if sharding is not None:
                found[leaf.path] = sharding.shard_shape(leaf.shape)
        except ValueError as err:
            reason = str(err).splitlines()[0]
            raise CheckpointError(
                f"'{join_path(leaf.path)}' of the template cannot be sharded as it says: {reason}"
            ) from err
    return found


def _sharding(leaf: FlaxLeaf, mesh: Mesh | AbstractMesh | None) -> Sharding | None:
    sharding = getattr(leaf.value, "sharding", None)
    if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
        return sharding
    if isinstance(sharding, Sharding) and not isinstance(sharding, NamedSharding):
        return sharding
    spec = partition_of(leaf)
    return None if spec is None or mesh is None else NamedSharding(mesh, spec)
