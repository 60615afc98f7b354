"""Random numbers that torch code draws outside of torch: from ``random``, from NumPy, from generators of its own.

A recording does not show them: what they decided is written down as if it were always so. Finds that they were
drawn, by their state.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from torchjax_bridge.recording import Fault, Recording, SourceLine, restored_random_states

__all__ = ["Generators"]


class Generators:
    """The generators that the code of a module could draw from, as they are before it runs.

    Args:
        module: The module; what runs is a copy of it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._own = dict(_own_states(module))
        self._global = _global_states()
        self._drew: list[str] = []

    @contextmanager
    def restored(self) -> Iterator[None]:
        """What runs inside leaves the global generators as they were."""
        with restored_random_states():
            try:
                yield
            finally:
                after = _global_states()
                self._drew = [name for name, state in after.items() if state != self._global[name]]

    def drawn(self, recording: Recording) -> Iterator[Fault]:
        """A fault for each generator that a recording drew from."""
        own = dict(_own_states(recording.module))
        for name in (*self._drew, *(name for name, state in own.items() if state != self._own.get(name))):
            yield Fault(
                f"random numbers are drawn from {name}, which no recording shows; draw them from torch, as tensors",
                "",
                SourceLine(),
            )


def _global_states() -> dict[str, str]:
    return {
        "Python's module random": repr(random.getstate()),
        "numpy.random": repr(np.random.get_state(legacy=False)),
    }


_STATES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (random.Random, random.Random.getstate),
    (np.random.Generator, lambda generator: generator.bit_generator.state),
    (np.random.RandomState, lambda generator: generator.get_state(legacy=False)),
)


def _own_states(module: nn.Module) -> Iterator[tuple[str, str]]:
    for path, inside in module.named_modules():
        for name, value in vars(inside).items():
            for kind, state in _STATES:
                if isinstance(value, kind):
                    yield f"the attribute {'.'.join(filter(None, (path, name)))}", repr(state(value))
