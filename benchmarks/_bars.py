"""Bars: the candidates of one question beside each other, ours in colour, limits pale, refusals in words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import _units as units
from ._ink import FAINT, GRID, INK, OURS, finish, tick_time
from ._record import Case, Suite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bars"]

_OTHERS, _PALE = "#8ea4c4", "#cdd3dc"  # one colour is enough where every bar has its name


def bars(suite: Suite, cases: Sequence[Case]) -> Figure:
    """One chart for each case, two side by side: a bar a candidate, with its time and its ratio."""
    from matplotlib.figure import Figure

    columns = min(2, len(cases))
    rows = math.ceil(len(cases) / columns)
    beside = [cases[columns * index : columns * (index + 1)] for index in range(rows)]
    tallest = [max(len(case.rows) for case in row) for row in beside]
    height = sum(0.36 * count + 1.1 for count in tallest) + 1.1
    figure = Figure(figsize=(15 if columns == 2 else 9, height), facecolor="white", layout="constrained")
    grid = figure.subplots(
        rows, columns, squeeze=False, height_ratios=[0.36 * count + 0.3 for count in tallest]
    )
    for axes, case in zip(grid.flat, cases, strict=False):
        _chart(axes, case)
    for axes in list(grid.flat)[len(cases) :]:
        axes.remove()
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0.005, 0.01, 0.99, 1 - 0.9 / height), hspace=0.06, wspace=0.04)  # type: ignore[call-arg]
    finish(figure, suite, f"{suite.name}: time of one call")
    return figure


def _chart(axes: Axes, case: Case) -> None:
    from matplotlib.ticker import FuncFormatter

    # Quartile ticks that noise made long are cut, lest they make every bar short.
    longest = 1.3 * max(row.microseconds.median for row in case.rows if row.microseconds)
    for index, row in enumerate(case.rows):
        axes.text(
            -0.015,
            index,
            row.name,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            color=OURS if row.ours else INK,
            fontweight="bold" if row.ours else "normal",
        )
        if row.microseconds is None or row.ratio is None:
            axes.text(
                0, index, "  refused: " + row.note, va="center", color=FAINT, fontstyle="italic", fontsize=9
            )
            continue
        spread = row.microseconds
        colour = OURS if row.ours else _PALE if row.limit else _OTHERS
        axes.barh(index, spread.median, height=0.62, color=colour)
        axes.plot(
            (spread.q1, min(spread.q3, longest)),
            (index, index),
            color=INK,
            linewidth=1.2,
            alpha=0.7,
            solid_capstyle="butt",
        )
        said = "baseline" if row.name == case.baseline else units.speed(row.ratio.median)
        axes.text(
            min(spread.q3, longest),
            index,
            f"  {units.time(spread.median)}   {said}",
            va="center",
            fontsize=9,
            color=OURS if row.ours else INK,
            fontweight="bold" if row.ours else "normal",
        )
    axes.set_xlim(0, longest * 1.36)
    axes.set_ylim(len(case.rows) - 0.45, -0.55)
    axes.set_yticks([])
    axes.spines["left"].set_color(GRID)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_time(value) if value else "0"))
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(textwrap.fill(case.question.replace(" → ", "\xa0→\xa0"), 48), fontsize=10.5)
