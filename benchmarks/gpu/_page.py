"""One page about a run: a verdict for every promise, what ran, what failed and where to read on.

Written anew after every step from what is on disk, so that a run that is cut off leaves a page of what it has.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .._record import RecordError, Suite, load
from .._rehearsal import MARK
from .._report import markdown
from .._tables import Table
from ._run import Run
from ._tests import Outcome, load_outcomes
from ._verdicts import BROKEN, HELD, verdicts

__all__ = ["body", "suites_of", "write_page"]

_BAD = ("failed", "hung", "crashed")
_NEEDS_GPU = ("AssertionError", "DID NOT RAISE", "CUDA error", "NVIDIA driver")


def write_page(run: Run, folder: Path) -> Path:
    """Write ``summary.md`` and give its path."""
    path = folder / "summary.md"
    path.write_text(f"# The proof on a GPU\n\n{body(run, folder)}", encoding="utf-8")
    return path


def body(run: Run, folder: Path) -> str:
    """The page without its title, as Markdown."""
    tests, suites = load_outcomes(folder), suites_of(folder)
    parts = [f"> **{MARK}.** Nothing here says anything about a GPU.\n"] if run.rehearsal else []
    if not run.complete:
        parts.append("> **This run was not finished.** What it had by then is below.\n")
    shown = verdicts(run, tests, suites)
    parts.append(_head(run, suites))
    if run.found["blockers"]:
        return "\n".join(parts)
    if run.rehearsal:
        shown = [replace(one, verdict="no verdict") for one in shown]
    else:
        held, broken = (sum(one.verdict == word for one in shown) for word in (HELD, BROKEN))
        parts.append(f"**{held} promises held, {broken} broken, {len(shown) - held - broken} not shown.**\n")
    parts.append(
        markdown(
            Table(
                "Promises",
                ("promise", "verdict", "evidence"),
                tuple((one.promise, _strong(one.verdict), one.evidence) for one in shown),
            )
        )
    )
    parts.append(
        markdown(
            Table(
                "What ran",
                ("stage", "outcome", "seconds", "", "log"),
                tuple(
                    (f"{one.stage}: {one.words}", one.outcome, f"{one.seconds:.0f}", one.why, one.log)
                    for one in run.stages
                ),
            )
        )
    )
    parts += _failures(tests, run.rehearsal)
    facts = [
        f"- {suite.name}: {fact}" for suite in suites for fact in suite.facts if not fact.startswith(MARK)
    ]
    if facts:
        parts.append("#### To be read with the figures\n\n" + "\n".join(facts) + "\n")
    parts.append("All figures are in `cuda.json`; `tests.jsonl` has every test with its full text.\n")
    return "\n".join(parts)


def _strong(verdict: str) -> str:
    return f"**{verdict}**" if verdict == BROKEN else verdict


def _head(run: Run, suites: Sequence[Suite]) -> str:
    found = run.found
    hardware = next((dict(suite.provenance["hardware"]) for suite in suites), {})
    seen = (
        "; ".join(f"{who} sees {', '.join(gpus)}" for who, gpus in found["gpus"].items())
        or "no GPU was asked for"
    )
    cuda = f", CUDA {hardware['cuda']}" if hardware.get("cuda") else ""
    cuda += f"; nvidia-smi: {found['card']}" if found["card"] else ""
    lines = [
        f"- Machine: {seen}{cuda}.",
        f"- Versions: python {found['python']}, "
        + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        + ".",
        f"- Run: {run.begun}, revision {run.revision or 'unknown'}, "
        f"{sum(one.seconds for one in run.stages):.0f} of {60 * run.minutes:.0f} seconds.",
    ]
    lines += [
        f"- Missing: {name} ({lacks or 'nothing runs without it'})."
        for name, lacks in found["missing"].items()
    ]
    if found["blockers"]:
        lines += ["", "**Nothing could run:**", "", *(f"- {why}." for why in found["blockers"])]
    return "\n".join(lines) + "\n"


def _failures(tests: Sequence[Outcome], rehearsal: bool) -> list[str]:
    bad = [one for one in tests if one.outcome in _BAD]
    if not bad:
        return []
    # What only a GPU can show fails in one of these ways where the CPU stands in; any other error is our fault.
    expected = [one for one in bad if rehearsal and any(word in _last_error(one.text) for word in _NEEDS_GPU)]
    rows = tuple(
        (one.test, one.outcome, f"{one.seconds:.1f}", _last_error(one.text))
        for one in bad
        if one not in expected
    )
    parts = []
    if rows:
        parts.append(
            markdown(Table("Tests that did not pass", ("test", "outcome", "seconds", "error"), rows))
        )
    if expected:
        parts.append(
            f"{len(expected)} tests ended where only a GPU goes on, as they must: "
            + ", ".join(f"`{one.test.rpartition('::')[2]}`" for one in expected)
            + ".\n"
        )
    return parts


def _last_error(text: str) -> str:
    """The first line of the error that a failure's text ends with."""
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    lines = marked or [line for line in text.splitlines() if line.strip()]
    if not lines:
        return "it left no text"
    first = next((line for line in lines if "Error" in line or "Exception" in line), lines[0])
    return ("AssertionError: " + first if first.startswith("assert ") else first)[:200]


def suites_of(folder: Path) -> list[Suite]:
    """The suites that a folder holds; none where their file cannot be read."""
    try:
        return load(folder / "cuda.json") if (folder / "cuda.json").exists() else []
    except RecordError:
        return []
