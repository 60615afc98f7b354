"""What the commands print: results, errors in one line, readable sizes, columns, progress.

Results go to stdout, everything else to stderr. Nothing depends on colour, and nothing is cut to the width of a
terminal, so a pipe and a log get the same text.
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

from ._proposed_rules import proposed_rules

__all__ = [
    "align_columns",
    "error_exit",
    "format_bytes",
    "print_line",
    "progress",
    "report_library_errors",
    "to_cli_wording",
]


def print_line(text: str = "") -> None:
    """Print a line of the result."""
    typer.echo(_printable(text, sys.stdout))


def error_exit(text: str, code: int = 1) -> typer.Exit:
    """Print an error, and return the exception that ends the program."""
    typer.echo(f"error: {_printable(text, sys.stderr)}", err=True)
    return typer.Exit(code)


def _printable(text: str, stream: TextIO | None) -> str:
    """The text with everything escaped that could control the terminal or that the stream cannot encode.

    Names come from files that nobody vouches for.
    """
    text = text.expandtabs(4)  # torch's own messages have tabs
    text = "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text
    )
    encoding = getattr(stream, "encoding", None) or "utf-8"  # None: the stream was closed before we began
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def report_library_errors(debug: bool, model: str | None = "") -> Iterator[None]:
    """Print errors that this library raises on purpose without a traceback, and exit with code 1.

    Args:
        debug: Raise them instead.
        model: The value of ``--model``. None: it was left out, and the message may recommend it.
    """
    try:
        yield
    except BridgeError as err:
        if debug:
            raise
        text = "\n".join([str(err), *getattr(err, "__notes__", ())])
        raise error_exit(to_cli_wording(text, model)) from err


def to_cli_wording(report: str, model: str | None = "") -> str:
    """A message of the library, with options of the command line for arguments of Python.

    Args:
        report: The message.
        model: The value of ``--model``. None: it was left out, and the message may recommend it.
    """
    text = re.sub(r" \(in Python, [^)]*\)", "", report)
    for argument, option in _OPTION_OF_ARGUMENT.items():
        text = text.replace(argument, option)
    text = _OPS.sub(r"--op '\1=\2'", _LISTS.sub(_as_options, text))
    proposed = proposed_rules(report)
    if "rules=[" in report or proposed:
        text += "\non the command line, rules=[...] is a file: --rules FILE"
        if proposed:
            lines = "a line like" if len(proposed) == 1 else "lines like"
            text += f", with {lines}\n" + "\n".join(f"  {line}" for line in proposed)
    if re.search(r"\bRule\(", report):
        text += "\na Rule(...) needs Python: pass it to to_flax, and save the result with save_flax"
    if model is None and any(part in report for part in _FIXED_BY_MODEL):
        text += "\n--model MODULE:FACTORY adds what names do not show: classes of layers, and tied tensors"
    return text


_OPS = re.compile(r'ops=\{([\w.]+): "([^"]*)"\}')
_LISTS = re.compile(r"(keep|assume)=\[([^\]]*)\]")


def _as_options(found: re.Match[str]) -> str:
    """``keep=['a', 'b']`` as ``--keep a --keep b``."""
    items = [item.strip(" '\"") for item in found[2].split(",")]
    return " ".join(f"--{found[1]} {item}" for item in items)


_OPTION_OF_ARGUMENT = {
    "verify=False": "--no-verify",
    "overwrite=True": "--overwrite",
    "template=...": "--template MODULE:FACTORY",
    "model=...": "--model MODULE:FACTORY",
    "key=...": "--key NAME",
    "torch_kwargs={...}": "--torch-arg NAME=VALUE",
    "flax_kwargs={...}": "--flax-arg NAME=VALUE",
    "channels_last=True": "--channels-last",
    "inputs=<what the torch model takes>": "--input (what the torch model takes, such as random:1x3x32x32)",
    "kwargs={...}": "--torch-arg NAME=VALUE",
}
_FIXED_BY_MODEL = ("nothing on the torch side fills", "pass the nn.Module")


def format_bytes(size: float) -> str:
    """A readable size.

    >>> format_bytes(1_500_000_000)
    '1.50 GB'
    """
    if size < 1000:
        return f"{size:.0f} B"
    power = 1
    while size >= 1000 ** (power + 1) and power < len(_UNITS):
        power += 1
    return f"{size / 1000**power:.2f} {_UNITS[power - 1]}"


_UNITS = ("kB", "MB", "GB", "TB")


def align_columns(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Rows as lines with aligned columns; an empty row becomes an empty line."""
    widths = [max(len(row[place]) for row in rows if row) for place in range(max(map(len, rows), default=0))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, rate and time left; outside a terminal a line for each tenth, at most one per second."""
    what = _printable(what, sys.stderr)
    if sys.stderr is not None and sys.stderr.isatty():
        bar = Progress(
            TextColumn("{task.description}", markup=False),  # a file's name may look like markup
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        with bar:
            task = bar.add_task(what, total=total)
            yield lambda size: bar.update(task, advance=size)
        return
    start = last = time.monotonic()
    done, tenth = 0, 0

    def print_tenths(size: int) -> None:
        nonlocal done, tenth, last
        done += size
        now = time.monotonic()
        if total and done * 10 // total > tenth and now - last >= 1:
            tenth, last = done * 10 // total, now
            rate = format_bytes(done / (now - start))
            typer.echo(
                f"{what}: {format_bytes(done)} of {format_bytes(total)}, {done * 100 // total}%, {rate}/s",
                err=True,
            )

    yield print_tenths
