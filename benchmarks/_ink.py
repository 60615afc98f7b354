"""The look that every picture shares: colours, the heading with its provenance, and times on an axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _units as units
from ._record import Suite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "FAINT", "GRID", "INK", "OURS", "STYLE", "finish", "tick_time"]

INK, FAINT, GRID = "#1f2430", "#6b7280", "#e5e7eb"
OURS = "#d1430f"
# Okabe and Ito's palette, readable with any colour vision; ours alone is bold, limits alone are grey.
COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#7b5ea7")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "svg.hashsalt": "torchjax-bridge",  # else every run gives other ids
}
"""matplotlib's settings while a picture is drawn."""


_SPREAD = "medians of interleaved rounds; bands and ticks are quartiles"


def finish(figure: Figure, suite: Suite, title: str, *, spread: str = _SPREAD) -> None:
    """Head a figure with its title and with where and how it was measured."""
    inch = 1 / figure.get_figheight()
    figure.text(0.012, 1 - 0.32 * inch, title, fontsize=15, fontweight="bold", va="center")
    figure.text(0.012, 1 - 0.6 * inch, _origin(suite, spread), fontsize=9.5, color=FAINT, va="center")
    if mark := suite.provenance.get("rehearsal"):
        figure.text(
            0.5, 0.5, mark, fontsize=26, color=OURS, alpha=0.35, ha="center", va="center", rotation=14
        )


def _origin(suite: Suite, spread: str) -> str:
    hardware, versions = suite.provenance["hardware"], suite.provenance["versions"]
    machine = hardware.get("gpu") or f"{hardware['processor']}, {hardware['cores']} cores"
    words = [machine, *(f"{name} {versions[name]}" for name in ("torch", "jax") if name in versions)]
    return "   ·   ".join([*words, spread, *(["quick run"] if suite.quick else [])])


def tick_time(microseconds: float, _: object = None) -> str:
    """A time on an axis: no more figures than it needs."""
    number, unit = units.time(microseconds).split()
    return f"{float(number):g} {unit}"
