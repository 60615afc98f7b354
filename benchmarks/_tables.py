"""A suite as tables: what was promised, every panel as sizes by candidates, every other case in full.

Builds neutral tables once; prints them with rich where it is installed, as aligned text where it is not.
``_report`` turns the same tables into Markdown.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from . import _units as units
from ._record import Case, Peak, Promise, Row, Suite

__all__ = ["Table", "show", "tables"]


@dataclass(frozen=True)
class Table:
    """A heading, columns and rows of text; the first column is words, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


def tables(suite: Suite) -> list[Table]:
    """Every table of a suite, promises first."""
    built = [_promises(suite.promises)] if suite.promises else []
    panels: dict[str, list[Case]] = {}
    for case in suite.cases:
        if case.panel:
            panels.setdefault(case.panel, []).append(case)
        else:
            built.append(_detail(case))
    if suite.peaks:
        built.append(_peaks(suite.peaks))
    return built + [_matrix(panel, cases) for panel, cases in panels.items()]


def _promises(promises: Sequence[Promise]) -> Table:
    def said(promise: Promise) -> str:
        if promise.limit is None:
            return "no promise"
        return f"{promise.sense} {promise.limit:g} {promise.unit}".rstrip()

    verdict = {True: "held", False: "missed", None: ""}
    rows = tuple(
        (
            promise.text,
            said(promise),
            f"{units.figures(promise.measured.median)} {promise.unit}".rstrip(),
            units.span(promise.measured.q1, promise.measured.q3),
            verdict[promise.held],
        )
        for promise in promises
    )
    return Table(
        "What we promise, and what was measured",
        ("", "promise", "median", "quartiles", "verdict"),
        rows,
        "Each value is formed within one round of interleaved samples; then the median over rounds is taken.",
    )


def _peaks(peaks: Sequence[Peak]) -> Table:
    names, sizes = (list(dict.fromkeys(getattr(one, key) for one in peaks)) for key in ("name", "nbytes"))
    held = {(one.name, one.nbytes): f"{units.figures(one.held / (1 << 20))} MB" for one in peaks}
    rows = tuple((units.size(size), *(held.get((name, size), "") for name in names)) for size in sizes)
    return Table("Peak memory of a process", ("size", *names), rows, "Memory that is no view of a file.")


def _detail(case: Case) -> Table:
    header = ("", "median", "quartiles", "best", f"against {case.baseline}", "memory")
    return Table(case.question, header, tuple(_detail_row(case, row) for row in case.rows), _refusals([case]))


def _detail_row(case: Case, row: Row) -> tuple[str, ...]:
    if row.microseconds is None or row.ratio is None:
        return (row.name, "refused", "", "", "", "")
    spread = row.microseconds
    return (
        row.name,
        units.time(spread.median),
        units.times(spread.q1, spread.q3),
        units.time(spread.best),
        "baseline" if row.name == case.baseline else units.speed(row.ratio.median),
        {True: "shared", False: "copied", None: ""}[row.shares],
    )


def _matrix(panel: str, cases: Sequence[Case]) -> Table:
    names = list(dict.fromkeys(row.name for case in cases for row in case.rows))
    ours = next((row.name for case in cases for row in case.rows if row.ours), None)
    header = ("size", *names)
    if ours:
        header += (f"ours against {cases[0].baseline}", "ours, rate")
    rows = []
    for case in cases:
        found = {row.name: row for row in case.rows}
        cells = [_cell(found.get(name)) for name in names]
        if ours:
            cells += _ours(case, found[ours])
        rows.append((units.size(case.nbytes or 0), *cells))
    return Table(f"{panel}, median time", header, tuple(rows), _refusals(cases))


def _ours(case: Case, row: Row) -> tuple[str, str]:
    if row.microseconds is None or row.ratio is None or case.nbytes is None:
        return "", ""
    return units.speed(row.ratio.median), units.rate(1e6 * case.nbytes / row.microseconds.median)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return units.time(row.microseconds.median) if row.microseconds else "refused"


def _refusals(cases: Sequence[Case]) -> str:
    reasons = {row.name: row.note for case in cases for row in case.rows if row.note}
    return "; ".join(f"{name} was refused, not timed: {note}" for name, note in reasons.items())


def show(table: Table) -> None:
    """Print one table."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        _show_plain(table)
        return
    drawn = RichTable(title=table.title, caption=table.caption or None, title_justify="left")
    for index, name in enumerate(table.header):
        drawn.add_column(name, justify="right" if index else "left")
    for row in table.rows:
        style = {"missed": "red", "held": "green"}.get(row[-1], "")
        drawn.add_row(*row, style=style)
    # In a file or a pipe there is no width to keep to.
    Console(width=None if sys.stdout.isatty() else 160).print(drawn)


def _show_plain(table: Table) -> None:
    lines = [table.header, *table.rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(table.header))]
    print(f"\n{table.title}")
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    if table.caption:
        print(table.caption)
