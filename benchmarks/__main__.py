"""``python -m benchmarks``: run suites, print tables, write results and pictures, compare with another run.

Exit status: 0; 1 when ``--compare`` finds a regression or a result of ours is wrong; 2 when the arguments, a
file or the device will not do.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ._names import GROUPS, ON_GPU, SUITES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
CUDA_PAGE = ROOT / "docs" / "cuda.md"
PICTURES = PAGE.parent / "assets" / "benchmarks"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["port"]:  # its rows are models, its options others
        from .port import main as port

        return port(argv[1:])
    if argv[:1] == ["gpu"]:
        from .gpu._command import main as gpu

        return gpu(argv[1:])
    arguments = _parser().parse_args(argv)
    if arguments.device == "cuda":
        # JAX reads this when it starts; else it takes three quarters of the memory and torch gets the rest.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Only now: torch, JAX and their devices are not needed to read the arguments.
    from ._case import WrongResultError
    from ._record import RecordError
    from ._report import PageError
    from ._setting import why_no_device

    try:
        if arguments.suite == "report":
            if arguments.gpu:
                from .gpu.publish import publish

                publish(arguments.gpu, RESULTS, CUDA_PAGE)
            _report(arguments.output or RESULTS)
            return 0
        if why := why_no_device(arguments.device):
            return _fail(f"no --device {arguments.device} here: {why}", 2)
        return _run(arguments)
    except (RecordError, PageError, OSError) as err:
        return _fail(str(err), 2)
    except WrongResultError as err:
        return _fail(f"not timed, since a result is wrong: {err}", 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="What each crossing between PyTorch and JAX costs: tables, JSON and pictures.",
        epilog="'python -m benchmarks port --help' tells how ports of whole models are measured, and "
        "'python -m benchmarks gpu --help' how all is proved on a GPU in a few minutes.",
    )
    parser.add_argument(
        "suite",
        nargs="?",
        default="all",
        choices=[*SUITES, *GROUPS, "all", "report"],
        help="what to measure; 'wrap' is both of its suites; 'report' measures nothing, and draws and writes "
        "up the results there are",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the tensors live")
    parser.add_argument("--peers", action="store_true", help="time other libraries too, where installed")
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes, to see that it runs"
    )
    parser.add_argument("--brisk", action="store_true", help="a quarter of the rounds")
    parser.add_argument(
        "--gpu",
        type=Path,
        metavar="DIR",
        help="with 'report': also write up the folder that 'python -m benchmarks gpu' wrote",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="flag what became slower since that run, by ratio to each run's own baseline",
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=1.25,
        metavar="X",
        help="how much a ratio may grow before it counts as slower (default 1.25)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where results and pictures go (default benchmarks/results, and the page docs/benchmarks.md is "
        "written up; with --quick benchmarks/results/quick, and it is not)",
    )
    return parser


def _tolerance(text: str) -> float:
    value = float(text)  # argparse turns a ValueError into a usage error
    if not value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 1")
    return value


def _run(arguments: argparse.Namespace) -> int:
    from ._compare import compare
    from ._record import Suite, load, save
    from ._setting import OutOfTime, Setting
    from ._suites import run
    from ._tables import show, tables

    old = load(arguments.compare) if arguments.compare else None  # before it may be overwritten
    setting = Setting(arguments.device, arguments.quick, arguments.brisk, arguments.peers, progress=_progress)
    suites: list[Suite] = []
    with _stopped_by_sigterm() as asked, suppress(OutOfTime):
        for name in _chosen(arguments.suite, arguments.device):
            suites.append(run(name, setting))
            if asked:  # and `run` has kept what there was
                break
    _progress("")
    if not suites:
        return _fail("stopped before anything was measured", 2)
    folder = arguments.output or (RESULTS / "quick" if arguments.quick else RESULTS)
    path = save(folder, arguments.device, suites)
    for suite in suites:
        for table in reversed(tables(suite)):  # promises last, where the eye is
            show(table)
        for fact in suite.facts:
            print(fact)
    print(f"wrote {path}")
    if folder == RESULTS:
        _report(folder)
    else:
        _draw(folder)
    if old is None:
        return 0
    changes = compare(old, suites, arguments.tolerance)
    show(changes.table())
    return 0 if changes.clean else 1


@contextmanager
def _stopped_by_sigterm() -> Iterator[list[int]]:
    """Asked to end, the suite that runs is left, and what it has is written."""
    from ._setting import OutOfTime

    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        if not asked:  # asked again, the process goes on writing
            asked.append(number)
            raise OutOfTime

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _chosen(name: str, device: str) -> Sequence[str]:
    if name == "all":
        return [one for one in SUITES if device == "cuda" or one not in ON_GPU]
    return GROUPS.get(name, (name,))


def _report(folder: Path) -> None:
    """Draw what a folder holds; write up the page if it is the committed folder."""
    from ._report import write_page

    _draw(folder)
    if folder == RESULTS:
        write_page(folder, PAGE, PICTURES)
        print(f"wrote {PAGE}")


def _draw(folder: Path) -> None:
    from ._plots import draw
    from ._record import load, result_files

    for file in result_files(folder):
        for suite in load(file):
            try:
                pictures = draw(suite, folder)
            except ImportError as err:
                print(f"no pictures: {err}; install matplotlib and run 'python -m benchmarks report'")
                return
            if pictures:
                print(f"drew {', '.join(str(picture) for picture in pictures)}")


def _progress(question: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{question[:100]}", end="", file=sys.stderr, flush=True)
    elif question:
        print(question, file=sys.stderr, flush=True)


def _fail(message: str, status: int) -> int:
    print(f"benchmarks: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
