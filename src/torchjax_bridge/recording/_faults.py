"""What a recording does not hold, and what it holds for its own inputs alone."""

from dataclasses import dataclass, field
from typing import Any

from ._source import SourceLine

__all__ = ["Decision", "Fault"]


@dataclass(frozen=True)
class Fault:
    """Something that the recording does not hold.

    Attributes:
        reason: What and why, in words.
        path: The module whose ``forward`` ran.
        source: The author's line.
        follows: Whether it may be what Python made of values that it had asked for: then that is the cause.
    """

    reason: str
    path: str
    source: SourceLine
    follows: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Decision(Fault):
    """Something that Python code asked for and that other inputs may answer in another way.

    Attributes:
        by_size: Whether it was asked of sizes (``x.shape[2] % 2 == 0``); otherwise of the values of a tensor.
        question: For a size: what was asked, as (left, operator, right).
        asked: Otherwise the tensors that were asked.
        inside: For a size: the line of torch's own that asked, which the author's called; None where that asked.
        outcome: The answer, of a question that is answered by yes or no; None for any other.
    """

    by_size: bool = False
    question: tuple[Any, str, Any] | None = None
    outcome: bool | None = None
    asked: tuple[Any, ...] = ()
    inside: SourceLine | None = None
