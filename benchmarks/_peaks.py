"""The most memory that a process holds, over the size of what it works on: a flat line is the best there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import _units as units
from ._curves import spread_out
from ._ink import COLOURS, FAINT, GRID, OURS, finish
from ._record import Peak, Suite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["peaks"]


def peaks(suite: Suite) -> Figure:
    """One line a candidate, with its name at its end; a limit is drawn as grey dashes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lines: dict[str, list[Peak]] = {}
    for one in suite.peaks:
        lines.setdefault(one.name, []).append(one)
    figure = Figure(figsize=(9.5, 6), facecolor="white")
    axes = figure.add_axes((0.09, 0.09, 0.62, 0.72))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    others = iter(COLOURS)
    ticks = _ticks([one.held for one in suite.peaks])
    axes.set_ylim(ticks[0], ticks[-1])
    order = sorted(lines, key=lambda name: lines[name][-1].held)
    ends = [math.log2(lines[name][-1].held) for name in order]
    levels = dict(zip(order, spread_out(ends, 0.2, math.log2(ticks[0]), math.log2(ticks[-1])), strict=True))
    for name, points in lines.items():
        kind = points[0]
        colour = OURS if kind.ours else FAINT if kind.limit else next(others)
        sizes, held = [one.nbytes for one in points], [one.held for one in points]
        axes.plot(
            sizes,
            held,
            color=colour,
            linewidth=2.8 if kind.ours else 1.4,
            linestyle="--" if kind.limit else "-",
            marker="" if kind.limit else "o",
            zorder=4 if kind.ours else 3,
        )
        axes.annotate(
            name,
            xy=(sizes[-1], held[-1]),
            xytext=(sizes[-1] * 1.08, 2 ** levels[name]),
            color=colour,
            fontweight="bold" if kind.ours else "normal",
            va="center",
            annotation_clip=False,
        )
    sizes = sorted({one.nbytes for one in suite.peaks})
    axes.set_xticks(sizes, [units.size(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda held, _: units.size(held)))
    axes.set_xlabel("size of the checkpoint")
    axes.set_title("memory that is no view of a file, with that of the imports", pad=10)
    axes.grid(color=GRID, linewidth=0.8, zorder=0)
    finish(figure, suite, f"{suite.name}: peak memory of a process", spread="the most that was seen in a run")
    return figure


def _ticks(held: Sequence[float]) -> list[float]:
    """The powers of two around the values, and one below."""
    low, high = math.floor(math.log2(min(held))) - 1, math.ceil(math.log2(max(held)))
    return [float(1 << power) for power in range(low, high + 1)]
