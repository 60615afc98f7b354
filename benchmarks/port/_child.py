"""Runs one model in a process of its own, so that one that crashes or never ends leaves the others be."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ._outcome import Outcome

__all__ = ["command", "run_in_child"]


def command(set_name: str, name: str, *, quick: bool) -> list[str]:
    """The command that measures one model; the path of its result is appended to it."""
    return [sys.executable, "-m", "benchmarks.port", set_name, name, *(["--quick"] if quick else [])]


def run_in_child(set_name: str, name: str, argv: Sequence[str], seconds: float) -> Outcome:
    """Run a command that writes an `Outcome` to a file, and read it.

    Args:
        set_name: Of the model.
        name: Of the model.
        argv: The command, without the path of the file.
        seconds: After so long the process and all that it started are ended.

    Returns:
        What it wrote; or, where it ended otherwise, an outcome that says how.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcome.json"
        with subprocess.Popen(
            [*argv, str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as child:
            try:
                _, said = child.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                return Outcome(set_name, name, f"not done after {seconds:g} seconds")
            except BaseException:
                os.killpg(child.pid, signal.SIGKILL)
                raise
        if path.exists():
            return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    return Outcome(set_name, name, f"the process ended with status {child.returncode}: {_last_line(said)}")


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or ["it said nothing"])[-1]
