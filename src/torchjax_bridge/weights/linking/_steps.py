"""One move of a plan, bound to the live tensors of the module, to be run again and again in both directions."""

from collections.abc import Sequence

import torch
from jax.sharding import Sharding

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import join_path

from ..pairing import Move
from ._torch_side import TorchSide

__all__ = ["Step"]


class Step:
    """One move.

    Attributes:
        move: The move.
        slots: Its torch tensors.
        places: Their places among all of the module's.
        first: The place of its first Flax leaf among all that cross.
        leaves: The places of all of them.
        shardings: The sharding of each Flax leaf; None for a leaf that follows its source.
    """

    __slots__ = ("_device", "first", "leaves", "move", "places", "shardings", "slots")

    def __init__(
        self,
        move: Move,
        side: TorchSide,
        first: int,
        shardings: Sequence[Sharding | None],
        device: torch.device,
    ) -> None:
        self.move = move
        self.places = [side.places[key] for key in move.torch_keys]
        self.slots = [side.slots[place] for place in self.places]
        self.first = first
        self.leaves = range(first, first + len(move.flax_paths))
        self.shardings = tuple(shardings)
        self._device = device  # of a constant, which has no source

    @property
    def has_buffers(self) -> bool:
        """Whether a source is a buffer."""
        return any(slot.is_buffer for slot in self.slots)

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
