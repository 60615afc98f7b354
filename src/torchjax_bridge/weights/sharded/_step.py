"""One move of a plan between models that lie on a mesh, prepared without communication, in either direction."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..pairing import Move
from ._moves import move
from ._spread import Spread

__all__ = ["Step"]


@dataclass(frozen=True)
class Step:
    """A move.

    Attributes:
        move: The move.
        inputs: Its tensors, or its arrays as tensors, and how each lies; None for a plain one. Of a sharded array
            a ``DTensor``, or where torch's mesh cannot express it, the shard of this process.
        results: This process's shard of each result and how it lies; None if the inputs must be whole first.
        targets: How each result shall lie.
    """

    move: Move
    inputs: tuple[tuple[Any, Spread | None], ...]
    results: Sequence[tuple[torch.Tensor, Spread]] | None
    targets: tuple[Spread, ...]

    def __str__(self) -> str:
        lies = [spread for _, spread in (*self.inputs, *(self.results or ()))]
        return f"{self.move.torch_keys} {self.move.flax_paths} {self.move.layout} {lies} {self.targets}"

    def must_move(self) -> list[bool]:
        """For each result, whether it must move between processes."""
        lies = [None] * len(self.targets) if self.results is None else [spread for _, spread in self.results]
        sharded = any(spread is not None for _, spread in self.inputs)
        pairs = zip(lies, self.targets, strict=True)
        return [sharded and (spread is None or not spread.is_like(target)) for spread, target in pairs]

    def shards(self) -> Iterator[tuple[torch.Tensor, bool]] | None:
        """This process's shard of each result as it shall lie, and whether it is new row-major memory.

        Returns:
            None if the inputs must be whole first.
        """
        return None if self.results is None else self._moved(self.results)

    def _moved(self, results: Sequence[tuple[torch.Tensor, Spread]]) -> Iterator[tuple[torch.Tensor, bool]]:
        for (local, spread), target in zip(results, self.targets, strict=True):
            stays = spread.is_like(target)
            yield (local, False) if stays else (move(local, spread, target), True)
