"""Weights that lie on many processes: each process converts its own shards, and only what must move is moved.

Owns the conversion of sharded modules: which layouts keep a shard a shard (`_laid_out`), how values lie and move
between processes (`_spread`, `_moves`), and that all processes do the same in the same order (`_agreement`).
Refuses ranks that disagree, and shardings that the mesh cannot give. Knows no layers and no rules. Gives
`arrays_of_sharded` and `tensors_of_sharded` to the conversion, and `mesh_of` to find out whether it is needed.
"""

from ._agreement import mesh_of
from ._to_flax import arrays_of_sharded
from ._to_torch import tensors_of_sharded

__all__ = ["arrays_of_sharded", "mesh_of", "tensors_of_sharded"]
