"""Two networks on the same images: their logits, their times, and their differences."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-4  # for a logit; float32 rounding through twenty layers is much smaller


@dataclass(frozen=True)
class ForwardResult:
    """The logits of a network for all images, and its time.

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
        """The fraction of correct predictions."""
        return float((self.predictions == labels).mean())

    def loss(self, labels: NDArray[np.uint8]) -> float:
        """The mean cross-entropy."""
        logits = self.logits.astype(np.float64)
        logits = logits - logits.max(1, keepdims=True)
        right = logits[np.arange(len(labels)), labels]
        return float((np.log(np.exp(logits).sum(1)) - right).mean())


def run_timed(forward: Callable[[Any], Any], batches: Sequence[Any]) -> ForwardResult:
    """Run ``forward`` on all batches, repeatedly, and take the median time.

    Args:
        forward: Returns the logits of a batch, on the CPU and readable as a numpy array.
        batches: The images, in the form that ``forward`` takes.
    """
    for batch in {batch.shape: batch for batch in batches}.values():
        forward(batch)  # compile once for each shape
    times: list[float] = []
    while sum(times) < 0.5 and len(times) < 50:
        start = time.perf_counter()
        logits = [np.asarray(forward(batch)) for batch in batches]  # reading a result waits for it
        times.append(time.perf_counter() - start)
    return ForwardResult(np.concatenate(logits), median(times))


def max_difference(one: ForwardResult, other: ForwardResult) -> float:
    """The largest absolute difference between two logits; NaN if any logit is NaN."""
    return float(np.abs(one.logits - other.logits).max())


def count_agreeing(one: ForwardResult, other: ForwardResult) -> int:
    """The number of images for which both predict the same class."""
    return int((one.predictions == other.predictions).sum())


def disagreements(
    name: str, reference: ForwardResult, result: ForwardResult, labels: NDArray[np.uint8]
) -> list[str]:
    """Every difference of ``result`` from ``reference``, in words; empty when they agree."""
    faults = []
    apart, agree = max_difference(reference, result), count_agreeing(reference, result)
    if not apart <= TOLERANCE:  # also true of NaN
        faults.append(f"{name}: max |difference of logits| is {apart:.2g}, more than {TOLERANCE:g}")
    if agree < len(labels):
        faults.append(f"{name}: {len(labels) - agree} of {len(labels)} predictions differ")
    want, got = reference.accuracy(labels), result.accuracy(labels)
    if want != got:
        faults.append(f"{name}: accuracy is {got:.2%}, not {want:.2%}")
    return faults
