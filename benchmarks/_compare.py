"""Compare two runs by each one's ratios to its own in-run baseline, never by their times.

A measurement of ours is a regression when its ratio grew by more than the tolerance *and* the quartiles of
the two runs do not overlap, so that neither a slower machine nor one noisy round raises an alarm. A promise
that was held and is now missed, by its quartiles too, is a regression as well. Refuses to compare different
devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from . import _units as units
from ._record import RecordError, Suite
from ._tables import Table
from ._timing import Spread

__all__ = ["RatioChange", "RunComparison", "compare"]


@dataclass(frozen=True)
class RatioChange:
    """One measurement of ours in both runs, as a ratio to its run's baseline."""

    what: str
    old: Spread
    new: Spread

    @property
    def factor(self) -> float:
        """By how much the ratio grew; above 1 is slower."""
        return self.new.median / self.old.median


@dataclass(frozen=True)
class RunComparison:
    """How the measurements and promises of two runs differ."""

    regressions: tuple[RatioChange, ...]
    improvements: tuple[RatioChange, ...]
    unchanged: int
    broken: tuple[str, ...]
    """Promises held in the old run and missed in the new one."""
    unmatched: tuple[str, ...]
    """Measurements of ours that only one of the runs holds."""

    @property
    def clean(self) -> bool:
        """Whether nothing became worse."""
        return not self.regressions and not self.broken

    def table(self) -> Table:
        """What changed, worst first."""
        rows = [
            (
                change.what,
                units.figures(change.old.median),
                units.figures(change.new.median),
                units.speed(change.factor),
            )
            for change in (*self.regressions, *self.improvements)
        ]
        rows += [(f"promise: {text}", "held", "missed", "") for text in self.broken]
        count = len(self.regressions) + len(self.broken)
        caption = f"{count} regressions, {len(self.improvements)} improvements, {self.unchanged} unchanged"
        if self.unmatched:
            caption += f"; {len(self.unmatched)} measurements in one run only"
        return Table(
            "Ratios to the in-run baseline, then and now", ("", "old", "new", "change"), tuple(rows), caption
        )


def compare(old: Sequence[Suite], new: Sequence[Suite], tolerance: float) -> RunComparison:
    """Compare the suites that both runs hold.

    Args:
        old: The earlier run's suites.
        new: The later run's.
        tolerance: The growth of a ratio that is still no regression, such as 1.25.

    Raises:
        RecordError: The runs are of different devices, or hold no measurement in common.
    """
    devices = {suite.device for suite in (*old, *new)}
    if len(devices) > 1:
        raise RecordError(f"cannot compare runs on different devices: {' and '.join(sorted(devices))}")
    before, after = _ours(old), _ours(new)
    common = [what for what in after if what in before]
    if not common:
        raise RecordError("cannot compare: the two runs hold no measurement in common")
    changes = [RatioChange(what, before[what], after[what]) for what in common]
    worse = [one for one in changes if one.factor > tolerance and one.new.q1 > one.old.q3]
    better = [one for one in changes if one.factor < 1 / tolerance and one.new.q3 < one.old.q1]
    verdicts = {promise.text: promise.held for suite in old for promise in suite.promises}
    broken = [
        promise.text
        for suite in new
        for promise in suite.promises
        if promise.clearly_missed and verdicts.get(promise.text)
    ]
    return RunComparison(
        tuple(sorted(worse, key=lambda one: -one.factor)),
        tuple(sorted(better, key=lambda one: one.factor)),
        len(changes) - len(worse) - len(better),
        tuple(broken),
        tuple(sorted(before.keys() ^ after.keys())),
    )


def _ours(suites: Sequence[Suite]) -> dict[str, Spread]:
    return {
        f"{suite.name}: {case.key}, {row.name} against {case.baseline}": row.ratio
        for suite in suites
        for case in suite.cases
        for row in case.rows
        if row.ours and row.ratio is not None and row.name != case.baseline
    }
