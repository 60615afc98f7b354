"""The terminal output of the example: one-line errors, exit codes and progress bars.

Results go to stdout; progress bars and errors go to stderr. Exit codes: 0 done, 1 the job failed, 2 the
command line was wrong, 130 interrupted.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` with one-line errors, which refer to --help."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(2, f"error: {message} (try --help)\n")


def at_least(low: int, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """The ``type=`` of an option: a finite number that is at least ``low``."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value < math.inf:  # also false of NaN
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        return value

    return number  # argparse puts its name into errors


def results_console() -> Console:
    """The console for results; it prints plain text if it is not a terminal."""
    return Console(highlight=False)


def progress(*columns: ProgressColumn, transient: bool = False) -> Progress:
    """A progress bar on stderr; if that is not a terminal, only its final state is printed.

    Args:
        *columns: What to show between the bar and the remaining time; by default a count.
        transient: Remove the bar at the end.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        *(columns or (MofNCompleteColumn(),)),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=transient,
        disable=transient and not console.is_terminal,
    )


def exit_code(job: Callable[[], None], *faults: type[Exception]) -> int:
    """Run ``job``; print an expected error, or one of the file system, without a traceback.

    Args:
        job: The work.
        *faults: The errors that the user's input causes; any other error keeps its traceback.

    Returns:
        The exit code for ``sys.exit``.
    """
    expected: tuple[type[Exception], ...] = (*faults, OSError)
    try:
        job()
    except expected as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
