"""What the proof runs, most valuable first, and how long each stage may take at most.

The tests come before the figures: what is wrong has no speed. Each stage is processes of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["STAGES", "TESTS", "Stage"]

TESTS = (
    "tests/exchange/test_cuda.py",
    "tests/wrap/torch_in_jax/test_gpu.py",
    "tests/wrap/jax_in_torch/test_gpu.py",
    "tests/weights/linking/test_cuda.py",
    "tests/exchange/test_devices.py",
    "tests/weights/rules/test_norm.py",
    "tests/weights/compare/test_parity.py",
    "tests/benchmarks/test_exchange.py",
)
"""Every file with tests marked ``gpu``, most valuable first; a test that two of them name runs once."""


@dataclass(frozen=True)
class Stage:
    """One thing to run."""

    name: str
    words: str
    seconds: float
    """What it may take at most, of eight minutes; scaled with the minutes there are."""
    module: str
    """Run by ``python -m``; empty for the tests."""
    arguments: Callable[[Path, bool], Sequence[str]] = lambda folder, rehearse: ()
    """From the folder of the results, and whether this is a rehearsal."""
    tool: str = ""
    """A program that runs it; without it the stage is skipped."""
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped, for then it would break a promise for nothing."""


def _suite(name: str, words: str, seconds: float) -> Stage:
    def arguments(folder: Path, rehearse: bool) -> Sequence[str]:
        return [name, "--device", "cuda", "--quick" if rehearse else "--brisk", "--output", str(folder)]

    return Stage(name, words, seconds, "benchmarks", arguments)


def _sanitized(folder: Path, rehearse: bool) -> Sequence[str]:
    order = "running or dropped or in_order or closed_over"
    return [
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-o",
        "filterwarnings=default",
        "-q",
        "-k",
        order,
        *TESTS[:2],
    ]


STAGES = (
    Stage("doctor", "what is installed, the trial of the fast path", 60, "torchjax_bridge", lambda *_: ["doctor"],
        needs=("typer", "rich")),
    Stage("tests", "the tests marked gpu", 200, "", needs=("pytest", "hypothesis", "flax")),
    _suite("exchange", "crossings: latency from 4 B to 4 GB, and whether the host waits", 110),
    Stage(
        "flagship",
        "a trained network goes to Flax on the GPU, is fine-tuned, and comes back",
        70,
        "benchmarks.gpu.flagship",
        lambda folder, _: [str(folder)],
        needs=("flax", "optax", "rich", "pillow"),
    ),
    _suite("relayout", "weights: layouts changed and pushed, against copy_ and the card's peak", 40),
    _suite("gpu-memory", "what a crossing, a conversion and a push need beside the model", 40),
    _suite("wrap-torch", "JAX code called from torch", 60),
    _suite("wrap-jax", "torch code called from JAX", 60),
    _suite("weights", "planning, converting, pushing", 60),
    Stage("sanitizer", "tests of order under compute-sanitizer", 120, "pytest", _sanitized, "compute-sanitizer",
        needs=("pytest", "flax")),
)  # fmt: skip
