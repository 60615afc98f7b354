"""The results on the documentation page: Markdown from the result files, written between two markers.

The page is text that people write, around one section that nobody does. Refuses a page without the markers.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ._record import Suite, load, result_files
from ._tables import Table, tables

__all__ = ["BEGIN", "END", "PageError", "markdown", "put_between", "section", "write_page"]

BEGIN = "<!-- results: begin (written by python -m benchmarks report) -->"
END = "<!-- results: end -->"

_PICTURES = (
    ("headline", "One small tensor, every way across"),
    ("latency", "Time of one call, by size"),
    ("throughput", "Bytes handed over per second, by size"),
    ("memory", "Peak memory of a process, by the size of the checkpoint"),
    ("calls", "Time of one call, for every other question"),
)


class PageError(ValueError):
    """A page that has no place for the results."""


def write_page(results: Path, page: Path, pictures: Path) -> None:
    """Put the results of a folder on a page, and copies of their pictures beside it.

    Args:
        results: Holds ``<device>.json`` and the pictures.
        page: A Markdown file with the two markers.
        pictures: Where the copies of the SVG files go; a folder below the page's own.

    Raises:
        PageError: The page lacks a marker, or a file is a rehearsal.
        RecordError: A result file cannot be read.
    """
    body = section(results, str(pictures.relative_to(page.parent)))
    put_between(page, BEGIN, END, body)
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.svg"):
        old.unlink()
    for drawing in sorted(results.glob("*.svg")):
        shutil.copyfile(drawing, pictures / drawing.name)


def put_between(page: Path, begin: str, end: str, body: str) -> None:
    """Replace what a page has between two lines.

    Raises:
        PageError: The page lacks one of them.
    """
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise PageError(f"{page} lacks the line {begin!r} or {end!r}, between which the results go")
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    page.write_text(f"{head}{begin}\n\n{body}\n{end}{tail}", encoding="utf-8")


def section(results: Path, pictures: str) -> str:
    """The Markdown of every result file of a folder; pictures are linked below ``pictures``."""
    parts = []
    for file in result_files(results):
        for suite in load(file):
            if mark := suite.provenance.get("rehearsal"):
                raise PageError(f"{file} is no result: {mark}")
            parts.append(f"### `{suite.name}` on `{suite.device}`\n")
            parts.append(_origin(suite))
            built = tables(suite)
            if suite.promises:
                parts.append(markdown(built.pop(0)))
            for name, words in _PICTURES:
                picture = f"{suite.name}-{name}-{suite.device}.svg"
                if (results / picture).exists():
                    parts.append(f"![{words}]({pictures}/{picture})\n")
            parts += [markdown(table) for table in built]
    return "\n".join(parts) if parts else "No results yet.\n"


def _origin(suite: Suite) -> str:
    origin = suite.provenance
    hardware, versions = origin["hardware"], origin["versions"]
    machine = f"{hardware['processor']}, {hardware['cores']} cores, {hardware['memory_gb']:g} GB"
    if "gpu" in hardware:
        machine = f"{hardware['gpu']} ({hardware['gpu_memory_gb']:g} GB, CUDA {hardware['cuda']}); {machine}"
    lines = [
        f"- Machine: {machine}; {hardware['system']}; load {hardware['load']:g} when the run began.",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        f"- Run: {origin['date'][:10]}, revision {origin['revision'] or 'unknown'}, "
        f"{suite.seconds:.0f} seconds{', with --quick' if suite.quick else ''}.",
        *(f"- {fact}" for fact in suite.facts),
    ]
    return "\n".join(lines) + "\n"


def markdown(table: Table) -> str:
    """One table under its heading."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---" + "|---:" * (len(table.header) - 1) + "|"
    parts = [f"#### {table.title}\n", line(table.header), rule, *map(line, table.rows)]
    return "\n".join(parts) + "\n" + (f"\n{table.caption}\n" if table.caption else "")
