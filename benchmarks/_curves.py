"""Curves over size, on log axes: what a call costs, and what it hands over per second, from a few bytes up.

Each line has its name at its end, so there is no legend to look up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import _units as units
from ._ink import COLOURS, FAINT, GRID, OURS, finish, tick_time
from ._record import Case, Row, Suite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Measure", "curves", "latency", "rate", "spread_out"]

_DASHES = ("--", ":", "-.")

Measure = Callable[[Case, float], float]
"""What is drawn upwards, from a case and its microseconds a call."""


def latency(case: Case, microseconds: float) -> float:
    """Microseconds a call."""
    return microseconds


def rate(case: Case, microseconds: float) -> float:
    """Bytes a second."""
    return (case.nbytes or 0) / microseconds * 1e6


def curves(suite: Suite, panels: dict[str, list[Case]], measure: Measure) -> Figure:
    """One panel for each group of cases, two side by side: a line a candidate, with its quartiles as a band.

    Args:
        suite: Names the figure.
        panels: Title -> cases in the order of their sizes.
        measure: `latency` or `rate`: what is drawn upwards.
    """
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(15, 1.1 + 4.9 * rows), facecolor="white")
    grid = figure.subplots(rows, 2, squeeze=False)
    everything = [case for cases in panels.values() for case in cases]
    colours, dashes = _colours(everything), _dashes(everything)
    # Panels come direction by direction; side by side goes what differs in direction only.
    order = [name for start in range(rows) for name in list(panels)[start::rows]]
    for axes, name in zip(grid.flat, order, strict=False):
        _panel(axes, name, panels[name], measure, colours, dashes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    for pair in (row[: len(panels) - 2 * index] for index, row in enumerate(grid)):
        low = min(axes.get_ylim()[0] for axes in pair)
        high = max(axes.get_ylim()[1] for axes in pair)
        for axes in pair:
            axes.set_ylim(low, high)
            _label_ends(axes)
    title = "time of one call" if measure is latency else "bytes handed over per second"
    finish(figure, suite, f"{suite.name}: {title}, by size")
    figure.subplots_adjust(
        left=0.05, right=0.88, top=1 - 1.2 / figure.get_figheight(), bottom=0.05, wspace=0.46, hspace=0.2
    )
    return figure


def _panel(
    axes: Axes,
    name: str,
    cases: Sequence[Case],
    measure: Measure,
    colours: dict[str, str],
    dashes: dict[str, str],
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for row_name in dict.fromkeys(row.name for case in cases for row in case.rows):
        points = [
            (case, row) for case in cases for row in case.rows if row.name == row_name and row.microseconds
        ]
        if not points:
            continue
        kind = points[0][1]
        sizes = [float(case.nbytes or 0) for case, _ in points]
        spreads = [(case, row.microseconds) for case, row in points if row.microseconds]
        middle = [measure(case, spread.median) for case, spread in spreads]
        low = [measure(case, spread.q1) for case, spread in spreads]
        high = [measure(case, spread.q3) for case, spread in spreads]
        colour = colours[row_name]
        axes.plot(
            sizes,
            middle,
            color=colour,
            label=row_name,
            linewidth=2.8 if kind.ours else 1.4,
            linestyle=dashes.get(row_name, "-"),
            marker="" if kind.limit else "o",
            markersize=4.5 if kind.ours else 3,
            zorder=4 if kind.ours else 3,
        )
        axes.fill_between(sizes, low, high, color=colour, alpha=0.13, linewidth=0, zorder=2)
    sizes = [float(case.nbytes or 0) for case in cases]
    axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    axes.set_xticks(sizes[::-2][::-1], [units.size(nbytes) for nbytes in sizes[::-2][::-1]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelbottom=True, length=3)
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(tick_time if measure is latency else _tick_rate))
    axes.grid(color=GRID, linewidth=0.8, zorder=0)
    axes.set_title(name, pad=10)


def _label_ends(axes: Axes) -> None:
    """Write each line's name at its right end, moved apart where they would overlap."""
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    gap = (high - low) * 0.058
    lines = sorted(axes.get_lines(), key=lambda line: float(_last(line)[1]))
    wanted = [math.log10(_last(line)[1]) for line in lines]
    placed = spread_out(wanted, gap, low + gap / 2, high)
    for line, level in zip(lines, placed, strict=True):
        x, y = _last(line)
        bold = line.get_linewidth() > 2
        axes.annotate(
            str(line.get_label()),
            xy=(x, y),
            xytext=(1.045, (level - low) / (high - low)),
            textcoords="axes fraction",
            color=line.get_color(),
            fontsize=10.5 if bold else 9.5,
            fontweight="bold" if bold else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line.get_color(),
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 2,
                "shrinkB": 3,
                "relpos": (0.0, 0.5),
            },
        )


def _last(line: Any) -> tuple[float, float]:
    return float(line.get_xdata()[-1]), float(line.get_ydata()[-1])


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Rising positions at least ``gap`` apart, near the wanted (rising) ones and within the limits."""
    placed = list(wanted)
    for _ in range(100):
        for index in range(1, len(placed)):
            short = gap - (placed[index] - placed[index - 1])
            if short > 0:
                placed[index - 1] -= short / 2
                placed[index] += short / 2
        if placed:
            placed[0] = max(placed[0], low)
            placed[-1] = min(placed[-1], high)
    return placed


def _tick_rate(bytes_per_second: float, _: object = None) -> str:
    number, unit = units.rate(bytes_per_second).split()
    return f"{float(number):g} {unit}"


def _colours(cases: Sequence[Case]) -> dict[str, str]:
    """One colour a name, the same in every panel of a figure."""
    rows: dict[str, Row] = {row.name: row for case in cases for row in case.rows}
    others = [name for name, row in rows.items() if not row.ours and not row.limit]
    chosen = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(others)}
    chosen |= {name: OURS for name, row in rows.items() if row.ours}
    return chosen | {name: FAINT for name, row in rows.items() if row.limit}


def _dashes(cases: Sequence[Case]) -> dict[str, str]:
    """One kind of dashes for each limit, the same in every panel of a figure."""
    names = dict.fromkeys(row.name for case in cases for row in case.rows if row.limit)
    return {name: _DASHES[index % len(_DASHES)] for index, name in enumerate(names)}
