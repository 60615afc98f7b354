"""What a result file holds: suites, their cases and promises, and where they were measured.

``results/<device>.json`` holds one record a suite, each with its own provenance, so that running one suite
again replaces that suite alone. Files are written whole or not at all. Refuses a file of another schema.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ._timing import Spread

__all__ = ["SCHEMA", "Case", "Peak", "Promise", "RecordError", "Row", "Suite", "load", "result_files", "save"]

SCHEMA = 1


class RecordError(ValueError):
    """A file that is not a result file of this schema."""


@dataclass(frozen=True)
class Row:
    """One candidate's answer to a case's question; without times when it was refused."""

    name: str
    ours: bool
    microseconds: Spread | None
    """Time per call."""
    ratio: Spread | None
    """Time divided by the baseline's in the same round; the baseline's own is 1."""
    calls: int
    """Calls in one sample."""
    rounds: int
    """Samples taken."""
    shares: bool | None
    """Whether the result shares the operand's memory; ``None`` where that is not the question."""
    limit: bool = False
    """A bound to read the others against (a memcpy, the bare capsules), no library anyone would call."""
    note: str = ""
    """Why it was not timed."""


@dataclass(frozen=True)
class Case:
    """One question, its candidates' answers, and the baseline they are compared with."""

    key: str
    """Names the case across files, for `compare`; ending in ``/headline``, it gets a picture of its own."""
    question: str
    baseline: str
    rows: tuple[Row, ...]
    panel: str = ""
    """Cases of one panel are one picture and one table, over ``nbytes``; empty for a table of its own."""
    nbytes: int | None = None
    """Bytes that one call carries; rates follow from it."""

    def row(self, name: str) -> Row:
        """The row of a candidate."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class Peak:
    """The most memory that a process held while it worked on something of one size."""

    name: str
    ours: bool
    nbytes: int
    """Bytes of what it worked on."""
    held: float
    """Bytes that it held."""
    limit: bool = False
    """A bound to read the others against."""


@dataclass(frozen=True)
class Promise:
    """What the project says about a ratio (or a time), and what was measured."""

    text: str
    sense: str
    """``"at most"`` or ``"at least"``; ``"reported"`` when nothing is promised."""
    limit: float | None
    unit: str
    measured: Spread

    @property
    def clearly_missed(self) -> bool:
        """Whether even the kinder quartile misses: noise alone does not explain it."""
        if self.limit is None:
            return False
        if self.sense == "at most":
            return self.measured.q1 > self.limit
        return self.measured.q3 < self.limit

    @property
    def held(self) -> bool | None:
        """Whether the median keeps the promise; ``None`` when nothing is promised."""
        if self.limit is None:
            return None
        return (
            self.measured.median <= self.limit
            if self.sense == "at most"
            else self.measured.median >= self.limit
        )


@dataclass(frozen=True)
class Suite:
    """Everything one suite measured in one run on one device."""

    name: str
    device: str
    quick: bool
    seconds: float
    """How long the run took."""
    provenance: Mapping[str, Any]
    """Versions, hardware, date and git revision, from ``_machine``."""
    cases: tuple[Case, ...]
    promises: tuple[Promise, ...] = ()
    facts: tuple[str, ...] = field(default=())
    """Sentences to be read with the numbers."""
    peaks: tuple[Peak, ...] = ()


def save(folder: Path, device: str, suites: list[Suite]) -> Path:
    """Write ``<device>.json``, keeping the suites of an older file that were not run again.

    Raises:
        RecordError: The older file cannot be read, or one is a rehearsal and the other is not.
    """
    path = folder / f"{device}.json"
    kept = {suite.name: suite for suite in load(path)} if path.exists() else {}
    if len({bool(suite.provenance.get("rehearsal")) for suite in (*kept.values(), *suites)}) > 1:
        raise RecordError(f"{path} would hold a rehearsal beside results; write to another folder.")
    merged = kept | {suite.name: suite for suite in suites}
    document = {
        "schema": SCHEMA,
        "device": device,
        "suites": {name: asdict(suite) for name, suite in sorted(merged.items())},
    }
    folder.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=folder, prefix=f".{device}-", suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(_rounded(document), file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
        os.chmod(draft, 0o644)  # mkstemp makes files that only their owner may read
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
    return path


def result_files(folder: Path) -> list[Path]:
    """The result files of a folder, which may hold other files too."""
    return [path for device in ("cpu", "cuda") if (path := folder / f"{device}.json").exists()]


def load(path: Path) -> list[Suite]:
    """The suites of a result file.

    Raises:
        RecordError: The file is not JSON, or not of this schema; the message names what is wrong.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise RecordError(f"cannot read {path} as a result file: {err}") from err
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise RecordError(f"{path} has schema {found!r}, and this benchmark reads schema {SCHEMA}.")
    try:
        return [_suite(fields) for fields in document["suites"].values()]
    except (KeyError, TypeError, AttributeError) as err:
        raise RecordError(f"{path} is damaged: {type(err).__name__}: {err}") from err


def _suite(fields: dict[str, Any]) -> Suite:
    return Suite(
        **fields
        | {
            "cases": tuple(_case(case) for case in fields["cases"]),
            "promises": tuple(
                Promise(**promise | {"measured": Spread(**promise["measured"])})
                for promise in fields["promises"]
            ),
            "facts": tuple(fields["facts"]),
            "peaks": tuple(Peak(**peak) for peak in fields.get("peaks", ())),
        }
    )


def _case(fields: dict[str, Any]) -> Case:
    rows = tuple(
        Row(**row | {"microseconds": _spread(row["microseconds"]), "ratio": _spread(row["ratio"])})
        for row in fields["rows"]
    )
    return Case(**fields | {"rows": rows})


def _spread(fields: dict[str, float] | None) -> Spread | None:
    return None if fields is None else Spread(**fields)


def _rounded(value: Any) -> Any:
    """The same document with five figures in every float: what is finer is noise, and noise in diffs."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
