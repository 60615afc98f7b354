"""The tests marked ``gpu``: one process for many, and a new one after each that crashes or hangs.

A process for every test would spend most of the minutes on starting CUDA. So one process runs them in turn and
writes down where it is (``_watch``). If a test does not end within its limit, or the process dies in it, that test
alone is lost.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .._rehearsal import MARK
from ._budget import Budget
from ._child import command
from ._process import end, start

__all__ = ["WATCH_VARIABLE", "Outcome", "load_outcomes", "run_tests"]

WATCH_VARIABLE = "TORCHJAX_BRIDGE_GPU_WATCH"
"""Names the file that `_watch` writes to."""

_START = 120.0
"""Seconds for imports, CUDA and the collection of tests."""


@dataclass(frozen=True)
class Outcome:
    """What became of one test."""

    test: str
    outcome: str
    """``"passed"``, ``"failed"``, ``"skipped"``, ``"hung"``, ``"crashed"`` or ``"not run"``."""
    seconds: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class _Setting:
    folder: Path
    environment: dict[str, str]
    budget: Budget
    each: float
    rehearse: bool
    head: str
    root: Path


def run_tests(
    names: Sequence[str],
    folder: Path,
    environment: dict[str, str],
    budget: Budget,
    *,
    each: float,
    rehearse: bool,
    root: Path,
    head: str = "",
    told: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """Run tests until all have an outcome or the time is up; each outcome is on disk as soon as it is known.

    Args:
        names: Files or tests, as pytest takes them, most valuable first.
        folder: Gets ``tests.jsonl`` (an outcome a line) and ``logs/tests.log``.
        environment: Added to this process's own.
        budget: How much time there is in all.
        each: Seconds for one test.
        rehearse: The CPU plays the GPU.
        root: Where the tests are; their names are relative to it.
        head: A line at the head of each log.
        told: Called after each outcome that was written.

    Returns:
        The outcomes, in the order of the tests; those that were not reached are ``"not run"``.
    """
    setting = _Setting(folder, environment, budget, each, rehearse, head, root)
    done: dict[str, Outcome] = {}
    collected: list[str] = []
    left = list(names)
    while left and budget.left > 0:
        before = len(done)
        for outcome in _one_process(left, setting, collected):
            done[outcome.test] = outcome
            _append(folder, outcome, rehearse)
            told()
        left = [test for test in collected if test not in done]
        if len(done) == before:  # it came to nothing: no tests, or it cannot even start
            break
    missed = [Outcome(test, "not run") for test in left if test in collected or not collected]
    for outcome in missed:
        _append(folder, outcome, rehearse)
    return [*(done[test] for test in collected if test in done), *missed]


def load_outcomes(folder: Path) -> list[Outcome]:
    """The outcomes that a folder holds, the last of each test."""
    path = folder / "tests.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    read = (json.loads(line) for line in lines)
    found = (
        Outcome(**{key: one[key] for key in ("test", "outcome", "seconds", "text")})
        for one in read
        if "test" in one
    )
    return list({one.test: one for one in found}.values())


def _append(folder: Path, outcome: Outcome, rehearse: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tests.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome) | ({"rehearsal": MARK} if rehearse else {})) + "\n")


def _one_process(tests: Sequence[str], setting: _Setting, collected: list[str]) -> Iterator[Outcome]:
    """Run tests in one process; give their outcomes as they come, and what became of the one it died in."""
    watch = setting.folder / "logs" / "watch.jsonl"
    watch.parent.mkdir(parents=True, exist_ok=True)
    watch.unlink(missing_ok=True)
    pytest = ["-m", "gpu", "-p", "benchmarks.gpu._watch", "-p", "no:cacheprovider"]
    # Where nobody has tried these versions, a warning is no failure.
    pytest += ["-o", "filterwarnings=default", "--tb=long", "-q", *tests]
    child = start(
        command("pytest", pytest, rehearse=setting.rehearse),
        setting.folder / "logs" / "tests.log",
        setting.environment | {WATCH_VARIABLE: str(watch)},
        setting.head,
        setting.root,
    )
    read = 0
    running: str | None = None
    since = time.monotonic()
    why = ""
    try:
        while True:
            ended = child.poll() is not None  # asked first, so that what it wrote last is read below
            lines = watch.read_text(encoding="utf-8").splitlines(keepends=True) if watch.exists() else []
            for line in lines[read:]:
                if not line.endswith("\n"):
                    break  # half written
                read += 1
                said = json.loads(line)
                since = time.monotonic()
                if "collected" in said and not collected:
                    collected += said["collected"]
                running = said.get("begins")
                if "ends" in said:
                    yield Outcome(said["ends"], said["outcome"], said["seconds"], said["text"])
            if ended:
                break
            late = time.monotonic() - since > (setting.each if running else _START)
            if late or not setting.budget.left:
                why = f"no end within {setting.each:g} s" if late else "the minutes were up"
                break
            time.sleep(0.05)
    finally:
        end(child, grace=1.0)
        watch.unlink(missing_ok=True)
    if running:
        gone = time.monotonic() - since
        words = why or f"the process ended with status {child.returncode}"
        yield Outcome(
            running,
            "not run" if why == "the minutes were up" else "hung" if why else "crashed",
            round(gone, 1),
            f"{words}; the end of the log:\n{_tail(setting.folder / 'logs' / 'tests.log')}",
        )


def _tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
