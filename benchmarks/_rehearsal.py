"""Whether this process rehearses the proof on a GPU with the CPU in its place; the words that mark its files."""

import os

__all__ = ["MARK", "VARIABLE", "rehearsing"]

VARIABLE = "TORCHJAX_BRIDGE_REHEARSAL"
"""Set to 1 in every process of a rehearsal."""

MARK = "REHEARSAL, NOT A RESULT: the CPU stood in for the GPU"
"""In every file that a rehearsal writes."""


def rehearsing() -> bool:
    """Whether this process rehearses."""
    return os.environ.get(VARIABLE) == "1"
