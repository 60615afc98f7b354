"""How a checkpoint is cut into blocks that are converted one by one, and which part of a job converts which.

A leaf is stored in chunks of one shape. A chunk lies in one shard of the template, so that a process that
restores a shard reads no other; a shard larger than the limit is several chunks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import Path

from ._boxes import Box, box_shape, grid
from ._fresh import row_major
from ._leaf import Leaf, size_of

__all__ = ["MAX_BLOCK_BYTES", "Block", "blocks_of_part", "cut"]

MAX_BLOCK_BYTES = 256 << 20


@dataclass(frozen=True)
class Block:
    """A chunk of a leaf.

    Attributes:
        leaf: The leaf.
        cell: The shape of its chunks.
        box: The elements of this one.
    """

    leaf: Leaf
    cell: tuple[int, ...]
    box: Box

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return size_of(self.leaf.dtype, box_shape(self.box))

    def read(self) -> torch.Tensor:
        """The values, row-major on the CPU.

        Raises:
            CheckpointError: They have another dtype than the leaf says.
        """
        values = row_major(self.leaf.slice(self.box))
        if values.dtype != self.leaf.dtype:
            raise CheckpointError(f"'{self.leaf.name}' is {values.dtype}, not {self.leaf.dtype}.")
        return values

    @property
    def place(self) -> tuple[int, ...]:
        """Its indices in the grid of chunks."""
        return tuple(part.start // step for part, step in zip(self.box, self.cell, strict=True))


def cut(leaves: Sequence[Leaf], shards: Mapping[Path, tuple[int, ...]], limit: int) -> list[Block]:
    """The blocks of all leaves, in order.

    Args:
        leaves: In order.
        shards: The shape of a shard, by the path of a leaf; a leaf without one is one shard.
        limit: Bytes of a block.
    """
    blocks = []
    for leaf in leaves:
        cell = _cell(leaf.shape, shards.get(leaf.path, leaf.shape), leaf.dtype.itemsize, limit)
        blocks += [Block(leaf, cell, box) for box in grid(leaf.shape, cell)]
    return blocks


def blocks_of_part(blocks: Sequence[Block], part: int, count: int) -> list[Block]:
    """The blocks of one part of ``count``: neighbours, and about as many bytes as every other part."""
    total = max(sum(block.nbytes for block in blocks), 1)
    found, before = [], 0
    for block in blocks:
        middle = before + block.nbytes / 2
        if min(int(middle * count / total), count - 1) == part:
            found.append(block)
        before += block.nbytes
    return found


def _cell(shape: Sequence[int], shard: Sequence[int], itemsize: int, limit: int) -> tuple[int, ...]:
    cell = [max(size, 1) for size in shard]
    # An axis that is not sharded may be cut anywhere.
    for axis in sorted(range(len(cell)), key=lambda axis: cell[axis] < shape[axis]):
        pieces = min(-(-math.prod(cell) * itemsize // limit), cell[axis])
        if pieces > 1 and cell[axis] < shape[axis]:
            pieces = next(n for n in range(pieces, cell[axis] + 1) if not cell[axis] % n)
        cell[axis] = -(-cell[axis] // pieces)
    return tuple(cell)
