"""What the commands say and how: errors in one line, sizes for people, columns, progress.

Results go to stdout, everything else to stderr. Nothing depends on colour, and nothing is cut to the width of a
terminal, so that a pipe and a log hold the same words.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from torchjax_bridge.errors import BridgeError

from ._spelling import as_toml

__all__ = ["columns", "fail", "human", "in_options", "progress", "say", "spoken"]


def say(text: str = "") -> None:
    """A line of the result."""
    typer.echo(_printable(text, sys.stdout))


def fail(text: str, code: int = 1) -> typer.Exit:
    """Say why it failed, and give what to raise."""
    typer.echo(f"error: {_printable(text, sys.stderr)}", err=True)
    return typer.Exit(code)


def _printable(text: str, stream: TextIO | None) -> str:
    """Names come from files that nobody vouches for: nothing in them steers a terminal, or stops a stream."""
    text = "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text
    )
    kind = getattr(stream, "encoding", None) or "utf-8"  # None: the stream was closed before we began
    return text.encode(kind, "backslashreplace").decode(kind)


@contextmanager
def spoken(debug: bool, model: str | None = "") -> Iterator[None]:
    """Errors that this library raises on purpose become one line and exit code 1; with ``debug`` a traceback.

    Args:
        debug: Let them through.
        model: What ``--model`` says, None where it could help and says nothing.
    """
    try:
        yield
    except BridgeError as err:
        if debug:
            raise
        text = "\n".join([str(err), *getattr(err, "__notes__", ())])
        raise fail(in_options(text, model)) from err


def in_options(report: str, model: str | None = "") -> str:
    """A report that names arguments of Python, in the words of the command line.

    Args:
        report: What the library says.
        model: What ``--model`` says, None where it could help and says nothing.
    """
    said = re.sub(r" \(in Python, [^)]*\)", "", report)
    for argument, option in _OPTIONS.items():
        said = said.replace(argument, option)
    proposed = as_toml(report)
    if "rules=[" in report or proposed:
        said += "\non the command line, rules=[...] is a file: --rules FILE"
        if proposed:
            what = "such a line as" if len(proposed) == 1 else "such lines as"
            said += f", with {what}\n" + "\n".join(f"  {line}" for line in proposed)
    if re.search(r"\bRule\(", report):
        said += "\na Rule(...) is Python: give it to to_flax, and write what comes out with save_flax"
    if model is None and any(text in report for text in _A_MODEL_HELPS):
        said += "\n--model MODULE:FACTORY says what names do not: classes of layers, which tensors are tied"
    return said


_OPTIONS = {
    "overwrite=True": "--overwrite",
    "template=...": "--template MODULE:FACTORY",
    "model=...": "--model MODULE:FACTORY",
    "key=...": "--key NAME",
    "memory=...": "--memory SIZE",
    "torch_kwargs={...}": "--torch-arg NAME=VALUE",
    "flax_kwargs={...}": "--flax-arg NAME=VALUE",
    "channels_last=True": "--channels-last",
}
_A_MODEL_HELPS = ("nothing on the torch side fills", "pass the nn.Module")


def human(size: float) -> str:
    """Bytes for people.

    >>> human(1_500_000_000)
    '1.50 GB'
    """
    if size < 1000:
        return f"{size:.0f} B"
    power = 1
    while size >= 1000 ** (power + 1) and power < len(_UNITS):
        power += 1
    return f"{size / 1000**power:.2f} {_UNITS[power - 1]}"


_UNITS = ("kB", "MB", "GB", "TB")


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Rows as aligned lines; an empty row stays one."""
    widths = [max(len(row[place]) for row in rows if row) for place in range(max(map(len, rows), default=0))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, rate and time left on a terminal; elsewhere a line a tenth, at most one a second."""
    what = _printable(what, sys.stderr)
    if sys.stderr is not None and sys.stderr.isatty():
        shown = Progress(
            TextColumn("{task.description}", markup=False),  # a file's name may look like it
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        with shown:
            task = shown.add_task(what, total=total)
            yield lambda size: shown.update(task, advance=size)
        return
    start = last = time.monotonic()
    done, tenth = 0, 0

    def tell(size: int) -> None:
        nonlocal done, tenth, last
        done += size
        now = time.monotonic()
        if total and done * 10 // total > tenth and now - last >= 1:
            tenth, last = done * 10 // total, now
            rate = human(done / (now - start))
            typer.echo(f"{what}: {human(done)} of {human(total)}, {done * 100 // total}%, {rate}/s", err=True)

    yield tell
