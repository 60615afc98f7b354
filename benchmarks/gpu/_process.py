"""Runs one command in a process group of its own, writes what it says to a log, and ends it when its time is up.

First it is asked to stop (SIGTERM), so that it can write what it has; a little later it is killed, with all that it
started.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ended", "end", "run", "start"]

_GRACE = 5.0
"""Seconds between asking and killing."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    """Its exit status; negative for a signal."""
    seconds: float
    timed_out: bool

    @property
    def words(self) -> str:
        """For a person."""
        if self.timed_out:
            return f"stopped after {self.seconds:.0f} s, its limit"
        if self.status < 0:
            return f"ended by {signal.Signals(-self.status).name} after {self.seconds:.0f} s"
        return f"exit status {self.status} after {self.seconds:.0f} s"


def start(
    argv: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    head: str = "",
    root: Path | None = None,
) -> subprocess.Popen:
    """Start a command in its own process group; what it says is appended to a log, after a line of ours."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{head}$ {' '.join(argv)}\n")
        file.flush()
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
            cwd=root,
        )


def end(child: subprocess.Popen, grace: float = _GRACE) -> None:
    """Ask a command and all that it started to stop, then kill what is left of them."""
    for number, wait in ((signal.SIGTERM, grace), (signal.SIGKILL, _GRACE)):
        if child.poll() is not None and number is signal.SIGTERM:
            continue  # its children may still run: they are killed
        try:
            os.killpg(child.pid, number)
        except (ProcessLookupError, PermissionError):
            return
        try:
            child.wait(wait)
        except subprocess.TimeoutExpired:
            continue


def run(
    argv: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    seconds: float,
    *,
    head: str = "",
    root: Path | None = None,
) -> Ended:
    """Run a command to its end, or to its limit.

    Args:
        argv: The command.
        log: What it says is appended here.
        environment: Added to this process's own.
        seconds: Its limit.
        head: A line before the command in the log.
        root: Where it runs; else here.
    """
    begun = time.monotonic()
    child = start(argv, log, environment, head, root)
    timed_out = False
    try:
        while child.poll() is None:
            timed_out = time.monotonic() - begun > seconds
            if timed_out:
                break
            time.sleep(0.1)
    finally:
        end(child)
    return Ended(child.wait(), time.monotonic() - begun, timed_out)
