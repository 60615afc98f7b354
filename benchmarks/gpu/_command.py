"""``python -m benchmarks gpu``: look what is there, run the stages while there is time, write the page.

Exit status: 0 if nothing is broken; 1 if a promise is broken; 2 if nothing could run, and the page says why.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from .._rehearsal import MARK, VARIABLE
from ._budget import Budget
from ._child import command
from ._preflight import look
from ._process import run as run_process
from ._run import Ran, Run, RunError, load_run
from ._stages import STAGES, TESTS, Stage
from ._tests import load_outcomes, run_tests

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
_RESULTS = ROOT / "benchmarks" / "results" / "gpu"
_FULL = 8.0
"""The minutes that the stages' limits are made for."""


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    arguments = _parser().parse_args(argv)
    budget = Budget(60 * arguments.minutes)
    folder = arguments.output or (_RESULTS.parent / "gpu-rehearsal" if arguments.rehearse else _RESULTS)
    fault = _take(folder)
    if fault:
        print(f"benchmarks: {fault}", file=sys.stderr)
        return 2
    environment = _environment(rehearse=arguments.rehearse)
    found = look({**os.environ, **environment}, rehearse=arguments.rehearse)
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    run = Run(arguments.minutes, arguments.rehearse, begun, _revision(), found.document())
    _keep(run, folder)
    for why in found.blockers:
        print(f"benchmarks: nothing can run: {why}", file=sys.stderr)
    if found.blockers:
        run.complete = True
        print(f"wrote {_keep(run, folder)}")
        return 2
    for name, lacks in found.missing.items():
        print(f"without {name}: {lacks}", file=sys.stderr)
    before = signal.signal(signal.SIGTERM, _interrupt)  # so that what runs is ended, and the page is written
    chosen = [stage for stage in STAGES if not arguments.only or stage.name in arguments.only]
    try:
        _run_stages(chosen, run, folder, environment, budget, arguments.each)
        run.complete = True
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"wrote {_keep(run, folder)}")
    return _status(run, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description="Proves the library on a GPU within a few minutes, with this Python and without a network: "
        "tests, figures, and one page with a verdict for every promise.",
    )
    parser.add_argument("--minutes", type=_minutes, default=_FULL, help="the time for all (default 8)")
    parser.add_argument(
        "--each", type=_seconds, default=60, metavar="SECONDS", help="the time for one test (default 60)"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=[stage.name for stage in STAGES],
        help="this stage; may be repeated",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="let the CPU stand in for the GPU; gives no results, and says so",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="a folder of its own (default benchmarks/results/gpu)"
    )
    return parser


def _minutes(text: str) -> float:
    value = float(text)  # argparse turns a ValueError into a usage error
    if not 0 < value < 24 * 60:
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def _take(folder: Path) -> str:
    """Make an empty folder for this run; why not, if it cannot be. An older run that has results is moved aside."""
    folder = folder.resolve()
    try:
        if any(one.is_file() for one in folder.rglob("*")):
            older = load_run(folder)
            if older.stages and not older.rehearsal:
                os.replace(folder, folder.with_name(f"{folder.name}-{older.begun[:19].replace(':', '')}"))
            else:
                shutil.rmtree(folder)
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    except RunError:
        return f"{folder} holds something else; name another folder with --output"
    except OSError as err:
        return f"cannot write to {folder}: {err.strerror or err}"
    return ""


def _environment(*, rehearse: bool) -> dict[str, str]:
    """For every process: our sources, memory that JAX takes only as it needs it, no colours."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "NO_COLOR": "1",
        "COLUMNS": "110",
    }
    return environment | ({VARIABLE: "1", "JAX_PLATFORMS": "cpu"} if rehearse else {})


def _revision() -> str | None:
    asked = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _keep(run: Run, folder: Path) -> Path:
    """Write what there is of the run, and give the page's path."""
    run.save(folder)
    try:
        from ._page import write_page
    except ImportError:  # torch or numpy is what is missing
        page = folder / "summary.md"
        lines = "".join(f"- {why}\n" for why in run.found["blockers"])
        page.write_text(f"# The proof on a GPU\n\nNothing could run:\n\n{lines}", encoding="utf-8")
        return page
    return write_page(run, folder)


def _status(run: Run, folder: Path) -> int:
    from ._page import suites_of
    from ._verdicts import BROKEN, verdicts

    if run.rehearsal:  # no verdict counts
        return 0 if run.complete else 1
    broken = [one for one in verdicts(run, load_outcomes(folder), suites_of(folder)) if one.verdict == BROKEN]
    return 1 if broken or not run.complete else 0


def _run_stages(
    stages: Sequence[Stage],
    run: Run,
    folder: Path,
    environment: dict[str, str],
    budget: Budget,
    each: float,
) -> None:
    for stage in stages:
        most = budget.limit(stage.seconds * run.minutes / _FULL)
        print(f"{stage.name}: {stage.words} (at most {most:.0f} s)", file=sys.stderr, flush=True)
        lacking = [name for name in stage.needs if name in run.found["missing"]]
        if stage.tool and shutil.which(stage.tool) is None:
            lacking.append(stage.tool)
        skipped = bool(lacking)
        if skipped or most < 1:
            why = f"{', '.join(lacking)} was not found" if skipped else "the minutes were up"
            ran = Ran(stage.name, stage.words, "skipped" if skipped else "not reached", 0.0, why)
        else:
            begun = budget.used
            # What the page says of this stage if it is interrupted.
            run.stages.append(Ran(stage.name, stage.words, "cut off", 0.0, "interrupted"))
            try:
                if stage.module:
                    ran = _process(stage, run, folder, environment, most)
                else:
                    ran = _tests(stage, run, folder, environment, most, each)
            except KeyboardInterrupt:
                run.stages[-1] = replace(run.stages[-1], seconds=round(budget.used - begun, 1))
                raise
            run.stages.pop()
        print(f"  {ran.outcome}: {ran.why}", file=sys.stderr, flush=True)
        run.stages.append(ran)
        _keep(run, folder)


def _head(run: Run) -> str:
    return f"{MARK}\n" if run.rehearsal else ""


def _process(stage: Stage, run: Run, folder: Path, environment: dict[str, str], most: float) -> Ran:
    argv = command(stage.module, stage.arguments(folder, run.rehearsal), rehearse=run.rehearsal)
    # JAX asks the driver for what it may not have; such answers are no errors of memory.
    tool = [stage.tool, "--error-exitcode", "86", "--report-api-errors", "no"] if stage.tool else []
    log = folder / "logs" / f"{stage.name}.log"
    ended = run_process([*tool, *argv], log, environment, most, head=_head(run), root=ROOT)
    outcome = "cut off" if ended.timed_out else "failed" if ended.status else "done"
    why = ended.words
    if outcome == "failed":
        why += f": {_last_line(log)}"
    return Ran(stage.name, stage.words, outcome, round(ended.seconds, 1), why, f"logs/{log.name}")


def _tests(
    stage: Stage, run: Run, folder: Path, environment: dict[str, str], most: float, each: float
) -> Ran:
    mine = Budget(most)
    written = [0.0]

    def told() -> None:
        if mine.used - written[0] > 5:  # so that the page is never older, if all of this is killed
            written[0] = mine.used
            _keep(run, folder)

    outcomes = run_tests(
        TESTS,
        folder,
        environment,
        mine,
        each=each,
        rehearse=run.rehearsal,
        root=ROOT,
        head=_head(run),
        told=told,
    )
    counts: dict[str, int] = {}
    for one in outcomes:
        counts[one.outcome] = counts.get(one.outcome, 0) + 1
    why = ", ".join(f"{count} {word}" for word, count in counts.items()) or "no test was collected"
    bad = counts.keys() & {"failed", "hung", "crashed"} or not counts.get("passed")
    cut = not bad and "not run" in counts
    outcome = "failed" if bad else "cut off" if cut else "done"
    return Ran(stage.name, stage.words, outcome, round(mine.used, 1), why, "logs/tests.log")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"
