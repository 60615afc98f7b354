"""How to time: interleaved rounds, each ratio taken within one round.

A *round* takes one sample of every candidate, the baseline first, the others in an order shuffled anew; so a
disturbance of the machine falls on all alike, none always follows the same neighbour (whose threads may
still be spinning), and a ratio is formed inside a round before the median over rounds is taken. A *sample* is
as many calls as fill a given time, then one wait for whatever they left running. Owns no opinion on what is
timed, and refuses to average: medians and quartiles only.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np

from ._memory import give_back_memory

__all__ = ["Pace", "Rounds", "Spread", "Timed", "measure"]


@dataclass(frozen=True)
class Pace:
    """How much effort one question is worth."""

    rounds: int
    """Rounds to take, unless ``seconds`` runs out first."""
    least_rounds: int
    """Rounds to take in any case."""
    sample_seconds: float
    """A sample repeats the call until it lasts about this long."""
    seconds: float
    """No new round begins after this long."""
    cold: bool = False
    """A sample is one call, in a process whose allocator holds no memory that an earlier call gave back."""

    def times(self, factor: int) -> "Pace":
        """The same pace with more rounds, for a question that a promise hangs on."""
        return replace(self, rounds=self.rounds * factor, seconds=self.seconds * factor)


@dataclass(frozen=True)
class Timed:
    """A function of one argument, with the argument, under a name."""

    name: str
    call: Callable[[Any], Any]
    operand: Any


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, and the smallest value seen."""

    q1: float
    median: float
    q3: float
    best: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        q1, median, q3 = (float(v) for v in np.percentile(values, (25, 50, 75)))
        return cls(q1, median, q3, float(min(values)))


@dataclass(frozen=True)
class Rounds:
    """The seconds per call of every candidate in every round: ``seconds[name][round]``."""

    seconds: dict[str, list[float]]
    calls: dict[str, int]
    """Calls in one sample of each candidate."""

    def microseconds(self, name: str) -> Spread:
        """The spread of one candidate's time per call, in microseconds."""
        return Spread.of([1e6 * second for second in self.seconds[name]])

    def ratio(self, name: str, to: str) -> Spread:
        """The spread, over rounds, of one candidate's time divided by another's in the same round."""
        return Spread.of(
            [own / other for own, other in zip(self.seconds[name], self.seconds[to], strict=True)]
        )

    def combine(self, recipe: Callable[[dict[str, float]], float]) -> Spread:
        """The spread, over rounds, of a number computed from one round's seconds."""
        names = list(self.seconds)
        rounds = zip(*self.seconds.values(), strict=True)
        return Spread.of([recipe(dict(zip(names, values, strict=True))) for values in rounds])


def measure(candidates: Sequence[Timed], pace: Pace, settle: Callable[[Any], None]) -> Rounds:
    """Time every candidate, interleaved.

    Args:
        candidates: At least one; the first is the baseline and opens each round.
        pace: Rounds, sample length and time limit.
        settle: Given the last result of a sample, returns when all work that was started has ended.

    Returns:
        As many values for each candidate as rounds were taken, in the order of the rounds.
    """
    with _garbage_collector_off():
        if pace.cold:
            calls = dict.fromkeys((one.name for one in candidates), 1)
        else:
            calls = {one.name: _calls_for(one, pace.sample_seconds, settle) for one in candidates}
        seconds: dict[str, list[float]] = {one.name: [] for one in candidates}
        first, *others = candidates
        order = random.Random(0)
        end = time.perf_counter() + pace.seconds
        for count in range(pace.rounds):
            if count >= pace.least_rounds and time.perf_counter() > end:
                break
            for one in (first, *order.sample(others, len(others))):
                if pace.cold:
                    give_back_memory()
                seconds[one.name].append(_sample(one, calls[one.name], settle))
    return Rounds(seconds, calls)


def _calls_for(one: Timed, sample_seconds: float, settle: Callable[[Any], None]) -> int:
    """How many calls fill a sample; trying it out is the warm-up."""
    calls = 1
    while True:
        took = _sample(one, calls, settle) * calls
        if took >= sample_seconds / 2:
            return max(1, round(calls * sample_seconds / took))
        # Grow by no more than tenfold: the first calls compile and fill caches, and say little.
        calls = max(calls + 1, int(calls * min(10.0, sample_seconds / max(took, 1e-9))))


def _sample(one: Timed, calls: int, settle: Callable[[Any], None]) -> float:
    call, operand = one.call, one.operand
    last = None
    start = time.perf_counter()
    for _ in repeat(None, calls):
        last = call(operand)
    settle(last)
    return (time.perf_counter() - start) / calls


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
