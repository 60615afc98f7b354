"""What is known about two runs when a cause is looked for, and what a cause is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from torchjax_bridge.exchange import Path, join_path

from .._audit_report import Audit
from ..pairing import Move
from ..settings import FlaxLayer
from ._compare import Bounds
from ._probes import Diagnosis
from ._record import Record
from ._rerun import Rerun
from ._steps import Step
from ._values import gap

__all__ = ["Cause", "Evidence", "as_cause", "not_called", "place"]


@dataclass(frozen=True)
class Cause:
    """Why two models differ.

    Attributes:
        kind: One word for it: the name of a setting (``"padding"``, ``"epsilon"``, ...), or ``"train mode"``,
            ``"gelu"``, ``"activation"``, ``"flatten order"``, ``"swapped siblings"``, ``"dropout"``,
            ``"transposed kernel"``, ``"weights"``, ``"residual"``, ``"shortcut"``, ``"parameter"``, ``"gate"``,
            ``"channels"``, ``"attention"``, ``"scale"``, ``"axes"``, ``"order"``,
            ``"pooling"``, ``"momentum"``, ``"running variance"``, ``"overridden call"``, ``"carry"``, ``"mask"``,
            ``"calls"``, ``"call order"``, ``"channels_last"``, ``"shape"`` or ``"unknown"``.
        message: What differs, and where.
        fix: What to do.
        proved: Whether the numbers show it: with the fix, the layer (or what lies between two layers) agrees.
    """

    kind: str
    message: str
    fix: str
    proved: bool

    def __str__(self) -> str:
        doubt = "" if self.proved else " (not proved)"
        return f"{self.kind}: {self.message}{doubt}" + (f"; {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Evidence:
    """What is known when a cause is looked for.

    Attributes:
        steps: Every call of every pair, in the order of torch's.
        torch: The run in torch; it includes layers without a twin.
        flax: The run in Flax.
        bounds: What passes for rounding.
        settings: The settings that differ.
        moves: By torch path: the moves of the plan.
        values: For a move: torch's values in Flax's layout, and the arrays that Flax holds.
        rerun: Runs a Flax layer again on the same input with other settings; None if it cannot.
        rerun_refilled: Makes a ``rerun`` of the Flax layers filled with torch's weights.
        layers: The settings of the Flax layers, by path.
    """

    steps: Sequence[Step]
    torch: Record
    flax: Record
    bounds: Bounds
    settings: Audit
    moves: Mapping[Path, Sequence[Move]]
    values: Callable[[Move], tuple[list[np.ndarray], list[np.ndarray]]]
    rerun: Rerun
    rerun_refilled: Callable[[], Rerun]
    layers: Mapping[Path, FlaxLayer]

    def close(self, one: np.ndarray, other: np.ndarray, most: float = float("inf")) -> bool:
        """Whether two arrays of one shape are equal but for rounding, and nowhere by more than ``most``."""
        apart = gap(one, other)
        return apart.difference <= most and self.bounds.allow(apart, *self._dtypes)

    @cached_property
    def _dtypes(self) -> frozenset[str]:
        return frozenset(value.dtype for step in self.steps for value in step.torch.outputs)

    def agreeing(self, step: Step) -> list[Step]:
        """The earlier steps whose outputs agree, the latest first."""
        before = self.steps[: self.steps.index(step)]
        return [other for other in reversed(before) if other.output is not None and other.output.ok]


def place(step: Step) -> str:
    """The name of a torch layer in a message."""
    ours = join_path(step.torch.path) or "(root)"
    return f"'{ours}' ({type(step.module).__name__})"


def as_cause(finding: Diagnosis, step: Step, where: str) -> Cause:
    """A diagnosis as a cause, with the place."""
    fix = finding.fix.replace("{layer}", join_path(step.torch.path))
    return Cause(finding.kind, f"{where}{finding.message}", fix, proved=True)


def not_called(step: Step) -> Cause:
    """The cause that Flax calls a layer less often."""
    ours, theirs = step.counts
    message = f"{place(step)} is called {_times(ours)} in torch and {_times(theirs)} in Flax"
    return Cause("calls", message, "", proved=True)


def _times(count: int) -> str:
    return f"{count} time" + "s" * (count != 1)
