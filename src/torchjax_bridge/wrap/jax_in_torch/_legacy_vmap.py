"""Batched tensors of torch's older vmap, packed and unpacked.

``torch.autograd.grad(is_grads_batched=True)`` and ``vectorize=True`` of ``torch.autograd.functional`` run a
backward pass on tensors that hide a batch axis. Their vmap is older than ``torch.func``, and an
``autograd.Function`` has no hook for it. The functions that show the hidden axis are private. Without them
such a call raises, as it does for every function that calls anything but torch's operators.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["LegacyBatch"]


@dataclass(frozen=True, slots=True)
class LegacyBatch:
    """The leaves of a call with their hidden batch axis put first."""

    leaves: list[Any]
    axes: tuple[int | None, ...]
    """For each leaf, 0 if it had a hidden axis."""
    size: int
    level: int

    @classmethod
    def of(cls, leaves: Sequence[Any]) -> "LegacyBatch | None":
        """The leaves unpacked; None if no leaf hides an axis, or one hides several."""
        hidden = [isinstance(leaf, torch.Tensor) and _is_batched(leaf) for leaf in leaves]
        if True not in hidden:
            return None
        level = _level()
        if level != 1:
            return None
        # torch uses the size (here 1) only to expand a tensor that is not batched.
        shown = [
            torch._remove_batch_dim(leaf, level, 1, 0) if hides else leaf
            for leaf, hides in zip(leaves, hidden, strict=True)
        ]
        size = next(leaf.shape[0] for leaf, hides in zip(shown, hidden, strict=True) if hides)
        return cls(shown, tuple(0 if hides else None for hides in hidden), size, level)

    def pack(self, result: Any) -> Any:
        """Hide the first axis of a result."""
        if not isinstance(result, torch.Tensor):
            return result
        return torch._add_batch_dim(result, 0, self.level)


def _is_batched(tensor: torch.Tensor) -> bool:
    try:
        keys: Any = torch._C._dispatch_keys(tensor)
        return bool(keys.has(torch._C._dispatch_key_parse("Batched")))
    except (AttributeError, RuntimeError):  # private names, gone
        return False


def _level() -> int:
    """How many of these vmaps are running."""
    try:
        level: Any = torch._C._vmapmode_increment_nesting()
        torch._C._vmapmode_decrement_nesting()
    except AttributeError:
        return 0
    return int(level) - 1
