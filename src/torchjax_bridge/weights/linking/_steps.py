"""One move of a plan, bound to the live tensors of the module, to be run again and again in both directions."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import torch
from jax.sharding import Sharding

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import join_path

from ..pairing import Move
from ._torch_side import Seen, Slot

__all__ = ["Step"]


class Step:
    """One move.

    Attributes:
        move: The move.
        slots: The places of its torch tensors.
        first: The place of its first Flax leaf among all that cross.
        shardings: The sharding of each Flax leaf; None for a leaf that follows its source.
    """

    __slots__ = ("_arrays", "_device", "first", "move", "shardings", "slots")

    def __init__(
        self,
        move: Move,
        slots: Sequence[Slot],
        first: int,
        shardings: Sequence[Sharding | None],
        device: torch.device,
    ) -> None:
        self.move = move
        self.slots = tuple(slots)
        self.first = first
        self.shardings = tuple(shardings)
        self._device = device  # of a constant, which has no source
        self._arrays: list[weakref.ref[jax.Array]] = []

    def forward(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The tensors as the Flax side holds them; views where the layout allows it."""
        if tensors:
            return self.move.layout.forward(tensors)
        with self._device:
            return self.move.layout.forward(tensors)

    def inverse(
        self, tensors: Sequence[torch.Tensor], before: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """The tensors as the torch side holds them; views where the layout allows it."""
        try:
            return self.move.layout.inverse(tensors, before)
        except ValueError as err:
            paths = "', '".join(join_path(path) for path in self.move.flax_paths)
            raise PlanError(f"'{paths}' cannot be pulled to torch: {err}.") from err

    def unchanged(self, held: Sequence[Any] | None) -> bool:
        """Whether the tensors are as at the last push, and Flax still holds the arrays of that push.

        Args:
            held: What Flax holds now; None if a push gives a new tree.
        """
        for slot in self.slots:
            if not slot.unchanged():
                return False
        place = self.first
        for reference in self._arrays:
            array = reference()
            if array is None or (held is not None and held[place] is not array):
                return False
            place += 1
        return bool(self._arrays)

    def last(self) -> list[jax.Array | None]:
        """The arrays of the last push; None for one that is gone."""
        return [reference() for reference in self._arrays]

    def note(self, seen: Iterable[Seen], arrays: Sequence[jax.Array | None]) -> None:
        """Note what was pushed, for `unchanged`."""
        for slot, one in zip(self.slots, seen, strict=True):
            slot.last = one
        pushed = arrays[self.first : self.first + len(self.move.flax_paths)]
        self._arrays = [weakref.ref(array) for array in pushed if array is not None]
