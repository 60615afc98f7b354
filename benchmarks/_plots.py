"""Pictures of a suite, SVG and PNG: latency and throughput over size, and one bar chart a question.

Draws from a record alone, so a run made where matplotlib is missing can be drawn elsewhere. Touches no
global state of matplotlib; the same record gives the same bytes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _units as units
from ._record import Case, Row, Suite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_INK, _FAINT, _GRID = "#1f2430", "#6b7280", "#e5e7eb"
_OURS = "#d1430f"
_OTHERS, _PALE = "#8ea4c4", "#cdd3dc"  # bars: one colour is enough where every bar has its name
# Okabe and Ito's palette, readable with any colour vision; ours alone is bold, limits alone are grey.
_COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#7b5ea7")
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "svg.hashsalt": "torchjax-bridge",  # else every run gives other ids
}
_DASHES = ("--", ":", "-.")


def draw(suite: Suite, folder: Path) -> list[Path]:
    """Draw a suite.

    Returns:
        The files written, ``.svg`` and ``.png``: ``<suite>-latency-<device>`` and ``-throughput-`` over size,
        ``-headline-`` and ``-calls-`` as bars.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    panels: dict[str, list[Case]] = {}
    for case in suite.cases:
        if case.panel:
            panels.setdefault(case.panel, []).append(case)
    headline = [case for case in suite.cases if case.key.endswith("/headline")]
    others = [case for case in suite.cases if not case.panel and case not in headline]
    written: list[Path] = []
    with mpl.rc_context(_STYLE):
        if panels:
            written += _save(_curves(suite, panels, _latency), folder, f"{suite.name}-latency-{suite.device}")
            written += _save(_curves(suite, panels, _rate), folder, f"{suite.name}-throughput-{suite.device}")
        for name, cases in (("headline", headline), ("calls", others)):
            if cases:
                written += _save(_bars(suite, cases), folder, f"{suite.name}-{name}-{suite.device}")
    return written


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=110, metadata={"Software": None})
    return paths


# --- curves over size ----------------------------------------------------------------------------------


def _latency(case: Case, microseconds: float) -> float:
    return microseconds


def _rate(case: Case, microseconds: float) -> float:
    return (case.nbytes or 0) / microseconds * 1e6  # bytes a second


_Measure = Callable[[Case, float], float]


def _curves(suite: Suite, panels: dict[str, list[Case]], measure: _Measure) -> Figure:
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
    title = "time of one call" if measure is _latency else "bytes handed over per second"
    _finish(figure, suite, f"{suite.name}: {title}, by size")
    figure.subplots_adjust(
        left=0.05, right=0.88, top=1 - 1.2 / figure.get_figheight(), bottom=0.05, wspace=0.46, hspace=0.2
    )
    return figure


def _panel(
    axes: Axes,
    name: str,
    cases: Sequence[Case],
    measure: _Measure,
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
    axes.yaxis.set_major_formatter(FuncFormatter(_tick_time if measure is _latency else _tick_rate))
    axes.grid(color=_GRID, linewidth=0.8, zorder=0)
    axes.set_title(name, pad=10)


def _label_ends(axes: Axes) -> None:
    """Write each line's name at its right end, moved apart where they would overlap."""
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    gap = (high - low) * 0.058
    lines = sorted(axes.get_lines(), key=lambda line: float(_last(line)[1]))
    wanted = [math.log10(_last(line)[1]) for line in lines]
    placed = _spread_out(wanted, gap, low + gap / 2, high)
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


def _spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
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


def _tick_time(value: float, _: object = None) -> str:
    number, unit = units.time(value).split()
    return f"{float(number):g} {unit}"


def _tick_rate(value: float, _: object = None) -> str:
    number, unit = units.rate(value).split()
    return f"{float(number):g} {unit}"


# --- bars ------------------------------------------------------------------------------------------------


def _bars(suite: Suite, cases: Sequence[Case]) -> Figure:
    from matplotlib.figure import Figure

    rows = math.ceil(len(cases) / 2)
    pairs = [cases[2 * index : 2 * index + 2] for index in range(rows)]
    tallest = [max(len(case.rows) for case in pair) for pair in pairs]
    height = sum(0.36 * count + 1.1 for count in tallest) + 1.1
    figure = Figure(figsize=(15, height), facecolor="white", layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False, height_ratios=[0.36 * count + 0.3 for count in tallest])
    for axes, case in zip(grid.flat, cases, strict=False):
        _chart(axes, case)
    for axes in list(grid.flat)[len(cases) :]:
        axes.remove()
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0.005, 0.01, 0.99, 1 - 0.9 / height), hspace=0.06, wspace=0.04)  # type: ignore[call-arg]
    _finish(figure, suite, f"{suite.name}: time of one call")
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
            color=_OURS if row.ours else _INK,
            fontweight="bold" if row.ours else "normal",
        )
        if row.microseconds is None or row.ratio is None:
            axes.text(
                0, index, "  refused: " + row.note, va="center", color=_FAINT, fontstyle="italic", fontsize=9
            )
            continue
        spread = row.microseconds
        colour = _OURS if row.ours else _PALE if row.limit else _OTHERS
        axes.barh(index, spread.median, height=0.62, color=colour)
        axes.plot(
            (spread.q1, min(spread.q3, longest)),
            (index, index),
            color=_INK,
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
            color=_OURS if row.ours else _INK,
            fontweight="bold" if row.ours else "normal",
        )
    axes.set_xlim(0, longest * 1.36)
    axes.set_ylim(len(case.rows) - 0.45, -0.55)
    axes.set_yticks([])
    axes.spines["left"].set_color(_GRID)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick_time(value) if value else "0"))
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(textwrap.fill(case.question.replace(" → ", "\xa0→\xa0"), 54), fontsize=10.5)


# --- both --------------------------------------------------------------------------------------------------


def _colours(cases: Sequence[Case]) -> dict[str, str]:
    """One colour a name, the same in every panel of a figure."""
    rows: dict[str, Row] = {row.name: row for case in cases for row in case.rows}
    others = [name for name, row in rows.items() if not row.ours and not row.limit]
    chosen = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(others)}
    chosen |= {name: _OURS for name, row in rows.items() if row.ours}
    return chosen | {name: _FAINT for name, row in rows.items() if row.limit}


def _dashes(cases: Sequence[Case]) -> dict[str, str]:
    """One kind of dashes for each limit, the same in every panel of a figure."""
    names = dict.fromkeys(row.name for case in cases for row in case.rows if row.limit)
    return {name: _DASHES[index % len(_DASHES)] for index, name in enumerate(names)}


def _finish(figure: Figure, suite: Suite, title: str) -> None:
    inch = 1 / figure.get_figheight()
    figure.text(0.012, 1 - 0.32 * inch, title, fontsize=15, fontweight="bold", va="center")
    figure.text(0.012, 1 - 0.6 * inch, _origin(suite), fontsize=9.5, color=_FAINT, va="center")


def _origin(suite: Suite) -> str:
    hardware, versions = suite.provenance["hardware"], suite.provenance["versions"]
    machine = hardware.get("gpu") or f"{hardware['processor']}, {hardware['cores']} cores"
    words = [machine, *(f"{name} {versions[name]}" for name in ("torch", "jax") if name in versions)]
    spread = "medians of interleaved rounds; bands and ticks are quartiles"
    return "   ·   ".join([*words, spread, *(["quick run"] if suite.quick else [])])
