"""Outcomes as tables, one a set, and as one sentence a set."""

from collections import Counter
from collections.abc import Iterable, Sequence

from .._tables import Table
from ._outcome import LIMIT, Outcome

__all__ = ["summary", "table"]

_HEADER = (
    "model",
    "ported",
    "lines",
    "torch's",
    "classes",
    "transp.",
    "diff.",
    "batch 3",
    "float64",
    "train",
    "seconds",
    "torch, ms",
    "port, ms",
    "twin, ms",
    "/ torch",
    "/ twin",
)


def table(outcomes: Iterable[Outcome]) -> list[Table]:
    """One table for each set, in the order of the outcomes."""
    sets: dict[str, list[Outcome]] = {}
    for one in outcomes:
        sets.setdefault(one.set, []).append(one)
    return [
        Table(f"port: {name}", _HEADER, tuple(_row(one) for one in found), _caption(found))
        for name, found in sets.items()
    ]


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many of each set are ported, and how many train; a line a set."""
    sets = dict.fromkeys(one.set for one in outcomes)
    said = []
    for name in sets:
        found = [one for one in outcomes if one.set == name]
        ported = sum(one.ported for one in found)
        trained = sum(one.train in ("agrees", "random") for one in found)
        wrong = [one.model for one in found if one.wrong]
        said.append(f"- {name}: {ported} of {len(found)} ported, {trained} in training mode too")
        if wrong:
            said[-1] += f"; WRONG: {', '.join(wrong)}"
    return "\n".join(said) + "\n"


def _caption(outcomes: Sequence[Outcome]) -> str:
    batches = sorted({one.batch for one in outcomes if one.batch})
    times = f" Times of a forward pass are at batch {', '.join(map(str, batches))}." if batches else ""
    reasons = "".join(f"\n- {one.model}: {one.why_not}" for one in outcomes if one.why_not)
    limit = f"{LIMIT:g} of torch's largest output, in float64 if torch's own rounding is larger"
    rows = Counter(one.revision or "an earlier one" for one in outcomes)
    revisions = ", ".join(f"{revision} ({count})" for revision, count in rows.items())
    return f"A port agrees if it differs by at most {limit}.{times} Rows by revision: {revisions}.\n{reasons}"


def _row(one: Outcome) -> tuple[str, ...]:
    return (
        one.model,
        "yes" if one.ported else "WRONG" if one.wrong else "no",
        *map(_count, (one.lines, one.torch_lines, one.classes, one.transpositions)),
        *(
            f"{value:.1e}" if value is not None else ""
            for value in (one.difference, one.other_batch, one.in_float64)
        ),
        one.train,
        *map(_figure, (one.port_seconds, one.torch_ms, one.port_ms, one.twin_ms)),
        _ratio(one.port_ms, one.torch_ms),
        _ratio(one.port_ms, one.twin_ms),
    )


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _ratio(own: float | None, other: float | None) -> str:
    return f"{own / other:.2f}" if own is not None and other is not None else ""
