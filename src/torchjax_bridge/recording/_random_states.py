"""The random states of Python and NumPy, put back after code that may draw from them.

Knows the global generators alone. torch's own have ``torch.random.fork_rng``.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

__all__ = ["restored_random_states"]


@contextmanager
def restored_random_states() -> Iterator[None]:
    """The random numbers of Python and NumPy afterwards go on as if nothing had been drawn."""
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
