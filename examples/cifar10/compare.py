"""Two networks on the same images: their logits, their time, and how far they are apart."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-4  # of a logit: float32 rounding through twenty layers stays well below


@dataclass(frozen=True)
class Outcome:
    """What a network made of the images.

    Attributes:
        logits: ``(N, 10)`` float32.
        seconds: The median time of a warm pass over all images.
    """

    logits: NDArray[np.float32]
    seconds: float

    @property
    def predictions(self) -> NDArray[np.int64]:
        """The class of the largest logit of each image, ``(N,)``."""
        return self.logits.argmax(1)

    def accuracy(self, labels: NDArray[np.uint8]) -> float:
        """The fraction of predictions that are the labels."""
        return float((self.predictions == labels).mean())

    def loss(self, labels: NDArray[np.uint8]) -> float:
        """The mean cross-entropy."""
        logits = self.logits.astype(np.float64)
        logits = logits - logits.max(1, keepdims=True)
        right = logits[np.arange(len(labels)), labels]
        return float((np.log(np.exp(logits).sum(1)) - right).mean())


def observe(forward: Callable[[Any], Any], batches: Sequence[Any]) -> Outcome:
    """Run ``forward`` on every batch, repeatedly, until its time is known.

    Args:
        forward: A batch to its logits; what it returns is on the CPU and can be read as a numpy array.
        batches: The images, in the form that ``forward`` takes.
    """
    for batch in {batch.shape: batch for batch in batches}.values():
        forward(batch)  # compiles what must be compiled, once for each shape
    times: list[float] = []
    while sum(times) < 0.5 and len(times) < 50:
        start = time.perf_counter()
        logits = [np.asarray(forward(batch)) for batch in batches]  # reading a result waits for it
        times.append(time.perf_counter() - start)
    return Outcome(np.concatenate(logits), median(times))


def difference(one: Outcome, other: Outcome) -> float:
    """The largest absolute difference of two logits; NaN where one of them is."""
    return float(np.abs(one.logits - other.logits).max())


def agreeing(one: Outcome, other: Outcome) -> int:
    """The number of images that both put into the same class."""
    return int((one.predictions == other.predictions).sum())


def disagreements(name: str, reference: Outcome, outcome: Outcome, labels: NDArray[np.uint8]) -> list[str]:
    """Every difference of ``outcome`` from ``reference``, in words; empty when they agree."""
    faults = []
    apart, agree = difference(reference, outcome), agreeing(reference, outcome)
    if not apart <= TOLERANCE:  # also true of NaN
        faults.append(f"{name}: max |difference of logits| is {apart:.2g}, more than {TOLERANCE:g}")
    if agree < len(labels):
        faults.append(f"{name}: {len(labels) - agree} of {len(labels)} predictions differ")
    theirs, ours = reference.accuracy(labels), outcome.accuracy(labels)
    if theirs != ours:
        faults.append(f"{name}: accuracy is {ours:.2%}, not {theirs:.2%}")
    return faults
