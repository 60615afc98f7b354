"""What the last push found and gave, so that the next one can leave out what has not changed.

All tensors are compared at once, by functions of C: a loop of Python over their attributes would take longer than
a copy of small tensors. Where nothing changed, no object that the garbage collector tracks outlives its comparison:
a thousand of them would start the collector, which takes longer than all else.
"""

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any

import jax
import torch

from ._steps import Step
from ._torch_side import Reading

__all__ = ["Watch"]

_VERSION, _BYTES, _DTYPE = map(operator.attrgetter, ("_version", "nbytes", "dtype"))


class Watch:
    """The tensors of every step as they were at its last push, and the arrays that Flax got for them.

    Buffers are never taken for unchanged: torch writes the statistics of a BatchNorm without raising a version.
    Holds the memory of the tensors, so that another tensor cannot get the same address, and no arrays.
    """

    def __init__(self, count: int, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._with_buffers = [step for step in steps if step.has_buffers]
        # Per tensor: itself, where its memory starts, its version, its strides, its bytes, and its dtype.
        self._known: tuple[list[Any], ...] = tuple([None] * count for _ in range(6))
        self._seen = self._known
        self._equal: dict[Any, Any] = {}  # strides, kept once: less memory to read at each push
        self._memory: list[torch.Tensor | None] = [None] * count
        leaves = sum(len(step.move.flax_paths) for step in steps)
        self._arrays: list[Callable[[], Any]] = [_nothing] * leaves

    def arrays(self) -> dict[int, jax.Array]:
        """The arrays of the last push that are still there, by their places."""
        found = enumerate(map(operator.call, self._arrays))
        return {place: array for place, array in found if array is not None and not array.is_deleted()}

    def changed(self, reading: Reading, held: Sequence[Any]) -> Sequence[Step]:
        """The steps to run: a tensor is not as at the last push, or Flax does not hold the arrays of that push.

        Args:
            reading: The tensors as they are now.
            held: What Flax holds now, in the order of the leaves; None for nothing.
        """
        if self._all_as_known(reading, held):
            self._seen = self._known
            return self._with_buffers
        self._seen = self._see(reading)
        same = [
            now[0] is before[0] and now[1:] == before[1:]
            for now, before in zip(zip(*self._seen, strict=True), zip(*self._known, strict=True), strict=True)
        ]
        there = [
            one is not None and one is array() and not one.is_deleted()
            for one, array in zip(held, self._arrays, strict=True)
        ]
        steps = [
            step
            for step in self._steps
            if step.has_buffers
            or not all(same[place] for place in step.places)
            or not all(there[place] for place in step.leaves)
        ]
        return self._steps if len(steps) == len(self._steps) else steps

    def _all_as_known(self, reading: Reading, held: Sequence[Any]) -> bool:
        tensors, (known, pointers, versions, strides, sizes, dtypes) = reading.tensors, self._known
        try:
            return (
                all(map(operator.is_, tensors, known))
                and reading.pointers == pointers
                and list(map(_VERSION, tensors)) == versions
                and all(map(operator.eq, map(torch.Tensor.stride, tensors), strides))  # no list of tuples
                and list(map(_BYTES, tensors)) == sizes
                and list(map(_DTYPE, tensors)) == dtypes
                and all(map(operator.is_, held, map(operator.call, self._arrays)))
                and all(map(operator.is_not, held, repeat(None)))
                and not any(map(_is_deleted, held))
            )
        except RuntimeError:  # an inference tensor has no version
            return False

    def _see(self, reading: Reading) -> tuple[list[Any], ...]:
        tensors = reading.tensors
        try:
            versions: list[Any] = list(map(_VERSION, tensors))
        except RuntimeError:  # an inference tensor counts none; what is unknown equals nothing
            versions = [object() if tensor.is_inference() else tensor._version for tensor in tensors]
        unknown: list[Any] = [object() for _ in tensors] if reading.pointers is None else []
        pointers = reading.pointers or unknown
        strides = [self._equal.setdefault(one, one) for one in map(torch.Tensor.stride, tensors)]
        return tensors, pointers, versions, strides, list(map(_BYTES, tensors)), list(map(_DTYPE, tensors))

    def note(self, steps: Sequence[Step], arrays: Mapping[int, jax.Array]) -> None:
        """Note what was pushed. The tensors are taken as `changed` saw them, before they were copied.

        Args:
            steps: The steps that `changed` gave.
            arrays: The arrays of these steps, by their places.
        """
        for step in steps:
            for place in step.places:
                if self._memory[place] is None or self._known[1][place] != self._seen[1][place]:
                    self._memory[place] = self._seen[0][place].detach()
                for known, seen in zip(self._known, self._seen, strict=True):
                    known[place] = seen[place]
            for place in step.leaves:
                self._arrays[place] = weakref.ref(arrays[place])


_is_deleted = operator.methodcaller("is_deleted")


def _nothing() -> None:
    return None
