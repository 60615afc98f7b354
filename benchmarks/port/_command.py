"""``python -m benchmarks port``: port every model of the zoo and put what came of it in one table."""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .._machine import provenance
from .._report import markdown
from .._tables import show
from ._child import command, run_in_child
from ._outcome import Outcome, save
from ._table import summary, table
from .zoo import NEEDS, SETS, Entry

__all__ = ["main"]

RESULTS = Path(__file__).resolve().parent.parent / "results" / "port"
_PACKAGES = ("torchvision", "timm", "transformers")


def main(argv: Sequence[str], run: Callable[..., Outcome] = run_in_child) -> int:
    """Run the command line.

    Args:
        argv: The arguments after ``port``.
        run: Measures one model; `run_in_child`.

    Returns:
        0; 1 where a port gives other outputs than torch; 2 where the arguments will not do.
    """
    arguments = _parser().parse_args(argv)
    chosen = list(_chosen(arguments.set or list(SETS), arguments.only))
    if not chosen:
        print(
            "benchmarks: no model by that name in these sets, or its library is not installed",
            file=sys.stderr,
        )
        return 2
    origin = provenance("cpu", _PACKAGES)
    outcomes = []
    for count, entry in enumerate(chosen, start=1):
        print(f"[{count}/{len(chosen)}] {entry.set}/{entry.name}: ", end="", file=sys.stderr, flush=True)
        asked = command(entry.set, entry.name, quick=arguments.quick)
        outcome = run(entry.set, entry.name, asked, arguments.timeout)
        outcomes.append(replace(outcome, revision=origin["revision"] or ""))
        print(outcomes[-1].verdict, file=sys.stderr, flush=True)
        save(arguments.output / "outcomes.json", outcomes[-1:], origin)
    for one in table(outcomes):
        show(one)
    everything = save(arguments.output / "outcomes.json", [], origin)
    page = arguments.output / "table.md"
    page.write_text("\n".join([summary(everything), *map(markdown, table(everything))]), encoding="utf-8")
    print(summary(outcomes))
    print(f"wrote {page}")
    return 1 if any(one.wrong for one in outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks port",
        description="What `port` makes of many models: whether it agrees with torch, how long it is, how fast.",
    )
    parser.add_argument("--set", action="append", choices=SETS, help="these models alone; may be repeated")
    parser.add_argument("--only", action="append", metavar="NAME", help="this model alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a few samples of each time")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="SECONDS", help="for each model (default 300)"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="DIR", help="default benchmarks/results/port"
    )
    return parser


def _chosen(sets: Sequence[str], only: Sequence[str] | None) -> list[Entry]:
    chosen = []
    for name in sets:
        library = NEEDS.get(name)
        if library is not None and importlib.util.find_spec(library) is None:
            print(f"the set {name} is left out: {library} is not installed", file=sys.stderr)
            continue
        chosen += [entry for entry in SETS[name]() if only is None or entry.name in only]
    return chosen
