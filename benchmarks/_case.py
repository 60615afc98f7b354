"""Ask a question: check every candidate's result first, then time those that were right.

Refuses to time a wrong result. When the wrong one is ours or the baseline, the whole run ends with
`WrongResultError`; another library's is recorded with the reason, in place of a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchjax_bridge.errors import BridgeError

from ._findings import Findings
from ._peers import PEER_ERRORS
from ._record import Case, Row
from ._setting import Setting
from ._timing import Rounds, Spread, Timed, measure

__all__ = ["Candidate", "Findings", "WrongResultError", "ask"]


class WrongResultError(Exception):
    """A candidate's result is not what it should be."""


@dataclass(frozen=True)
class Candidate(Timed):
    """A call to be timed once its result has been checked."""

    check: Callable[[Any], bool | None]
    """Given the result: raises `WrongResultError`, or says whether it shares memory (``None``: no matter)."""
    ours: bool = False
    limit: bool = False
    """A bound to read the others against, no library anyone would call."""


def ask(
    key: str,
    question: str,
    candidates: Sequence[Candidate],
    setting: Setting,
    *,
    nbytes: int | None = None,
    panel: str = "",
    effort: int = 1,
    cold: bool = False,
) -> tuple[Case, Rounds]:
    """Check, then time, then summarise.

    Args:
        key: Names the case across result files.
        question: One sentence.
        candidates: The baseline first.
        setting: Device and pace.
        nbytes: Bytes that one call carries.
        panel: The picture the case belongs to.
        effort: Multiplies the rounds, where a promise hangs on the answer.
        cold: Time single calls that find no memory to use again, as the first call of a process does.

    Returns:
        The case, and the rounds it was made from, for ratios between any two candidates.

    Raises:
        WrongResultError: Ours or the baseline gave a wrong result, or raised.
    """
    setting.progress(question)
    shares: dict[str, bool | None] = {}
    refused: dict[str, str] = {}
    baseline = candidates[0]
    for one in candidates:
        try:
            shares[one.name] = one.check(one.call(one.operand))
        except (WrongResultError, BridgeError, *PEER_ERRORS) as err:
            reason = " ".join(str(err).split()) or type(err).__name__
            if one.ours or one is baseline:
                raise WrongResultError(f"{key}: {one.name}: {reason}") from err
            refused[one.name] = reason
    sound = [one for one in candidates if one.name in shares]
    pace = replace(setting.pace.times(1 if setting.quick else effort), cold=cold)
    rounds = measure(sound, pace, setting.settle)

    def row(one: Candidate) -> Row:
        if one.name in refused:
            return Row(one.name, one.ours, None, None, 0, 0, None, one.limit, refused[one.name])
        ratio = Spread(1.0, 1.0, 1.0, 1.0) if one is baseline else rounds.ratio(one.name, baseline.name)
        count = len(rounds.seconds[one.name])
        return Row(
            one.name,
            one.ours,
            rounds.microseconds(one.name),
            ratio,
            rounds.calls[one.name],
            count,
            shares[one.name],
            one.limit,
        )

    rows = tuple(row(one) for one in candidates)
    return Case(key, question, baseline.name, rows, panel, nbytes), rounds
