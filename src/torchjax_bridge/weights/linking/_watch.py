"""What the last push found and gave, so that the next one can leave out what has not changed.

All tensors are compared at once, by functions of C: a loop of Python over their attributes would take longer than
a copy of small tensors.
"""

import operator
import weakref
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import jax
import torch

from ._steps import Step
from ._torch_side import Slot

__all__ = ["Watch"]

State = tuple[int, int, tuple[int, ...], tuple[int, ...]]

_VERSION, _SHAPE = operator.attrgetter("_version"), operator.attrgetter("shape")


class Watch:
    """The tensors of every step as they were at its last push, and the arrays that Flax got for them.

    Holds the memory of the tensors, so that another tensor cannot get the same address, and no arrays.
    """

    def __init__(self, slots: Sequence[Slot], steps: Sequence[Step]) -> None:
        self._holders = [slot.holder for slot in slots]
        self._names = [slot.name for slot in slots]
        self._places = {slot.key: place for place, slot in enumerate(slots)}
        self._steps = steps
        self._tensors: list[torch.Tensor | None] = [None] * len(slots)
        self._states: list[State | None] = [None] * len(slots)
        self._memory: list[torch.Tensor | None] = [None] * len(slots)
        leaves = sum(len(step.move.flax_paths) for step in steps)
        self._arrays: list[Callable[[], jax.Array | None]] = [_nothing] * leaves
        self._seen = self._tensors, self._states

    def changed(self, held: Sequence[Any] | None) -> tuple[Sequence[Step], list[jax.Array | None]]:
        """The steps to run: a tensor is not as at the last push, or Flax does not hold the arrays of that push.

        Args:
            held: What Flax holds now; None if a push gives a new tree.

        Returns:
            The steps, and the arrays of the last push; None for one that is gone.
        """
        tensors = list(map(dict.get, self._holders, self._names))
        try:
            states: list[State | None] = list(
                zip(
                    map(_VERSION, tensors),
                    map(torch.Tensor.data_ptr, tensors),  # type: ignore[arg-type]
                    map(torch.Tensor.stride, tensors),  # type: ignore[arg-type]
                    map(_SHAPE, tensors),
                    strict=True,
                )
            )
        except (AttributeError, TypeError, RuntimeError):  # one is missing, or counts no versions
            states = [_state(tensor) for tensor in tensors]
        self._seen = tensors, states
        arrays = [array() for array in self._arrays]
        kept = arrays if held is None else held
        if (
            states == self._states
            and all(map(operator.is_, tensors, self._tensors))
            and all(map(operator.is_, arrays, kept))
            and all(map(operator.is_not, arrays, repeat(None)))
            and all(map(operator.is_not, states, repeat(None)))
        ):
            return [], arrays
        same = [
            state is not None and state == before and tensor is was
            for tensor, state, was, before in zip(tensors, states, self._tensors, self._states, strict=True)
        ]
        there = [array is not None and array is other for array, other in zip(arrays, kept, strict=True)]
        steps = [
            step
            for step in self._steps
            if not all(same[self._places[slot.key]] for slot in step.slots)
            or not all(there[step.first : step.first + len(step.move.flax_paths)])
        ]
        return steps, arrays

    def note(self, step: Step, sources: Sequence[torch.Tensor], arrays: Sequence[jax.Array | None]) -> None:
        """Note what was pushed. The tensors are taken as `changed` saw them, before they were copied.

        Args:
            step: A step that `changed` gave.
            sources: Its tensors, as they were read.
            arrays: The arrays of all steps.
        """
        tensors, states = self._seen
        for slot, source in zip(step.slots, sources, strict=True):
            place = self._places[slot.key]
            self._tensors[place], self._states[place] = tensors[place], states[place]
            self._memory[place] = source
        for place in range(step.first, step.first + len(step.move.flax_paths)):
            array = arrays[place]
            self._arrays[place] = _nothing if array is None else weakref.ref(array)


def _nothing() -> None:
    return None


def _state(tensor: torch.Tensor | None) -> State | None:
    """What changes with the tensor's values; None if it is missing, or is an inference tensor, without versions."""
    if tensor is None or tensor.is_inference():
        return None
    return tensor._version, tensor.data_ptr(), tensor.stride(), tensor.shape
