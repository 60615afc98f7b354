"""What a pull writes: first everything is checked, then each tensor is written once."""

from collections.abc import Iterable

import torch

from torchjax_bridge.errors import PlanError

from ..layouts import same_bits
from ..moving import WIDER, copy_into
from ._overlaps import Write, conflicts, repeats

__all__ = ["Writes"]


class Writes:
    """Tensors of the module, and what they get.

    Args:
        cast: Whether floating-point values are cast.
    """

    def __init__(self, *, cast: bool) -> None:
        self._cast = cast
        self._faults: list[str] = []
        self._writes: dict[object, Write] = {}

    def add(self, key: str, target: torch.Tensor, pointer: int, value: torch.Tensor) -> None:
        """Have a tensor, whose memory starts at a pointer, written to."""
        if value.dtype is not target.dtype:
            self._faults += self._misfit(key, target, value)
        if not target.is_contiguous() and repeats(target):
            self._faults.append(
                f"'{key}' has several elements that are one in memory, as an expanded tensor. Replace it by its "
                "clone"
            )
        # By memory, so that a tied tensor is written once. Views may begin at the same address.
        first = self._writes.setdefault(pointer or key, (key, target, value))
        if first[1] is target:
            return
        if (first[1].shape, first[1].stride()) != (target.shape, target.stride()):
            self._writes[key] = (key, target, value)
        elif not same_bits(first[2], value):
            self._faults.append(
                f"'{key}' is the same tensor as '{first[0]}' in torch, but Flax holds two values"
            )

    def run(self) -> None:
        """Write.

        Raises:
            PlanError: Something was at fault; it is listed, and nothing is written.
        """
        if not self._faults:
            self._faults += [
                f"'{key}' and '{other}' share memory in torch, but Flax holds two values for it"
                for key, other in conflicts([*self._writes.values()])
            ]
        if self._faults:
            listed = "\n".join(f"  {line}" for line in self._faults)
            raise PlanError(f"cannot pull these weights to torch:\n{listed}")
        for _, target, value in self._writes.values():
            plain = target.is_cpu and value.is_cpu and target.is_contiguous() and not target.is_neg()
            if target.nbytes >= _SMALL_BYTES and plain and not target.is_conj():
                copy_into(target, value)
            else:
                target.copy_(value)

    def _misfit(self, key: str, target: torch.Tensor, value: torch.Tensor) -> Iterable[str]:
        if WIDER.get(value.dtype) is target.dtype:
            return
        if not (self._cast and value.is_floating_point() and target.is_floating_point()):
            yield (
                f"'{key}' is {target.dtype} in torch and {value.dtype} in Flax: pass dtype= to link() to have "
                "floating-point values cast"
            )


_SMALL_BYTES = 1 << 18  # `copy_into` leaves smaller tensors to copy_
