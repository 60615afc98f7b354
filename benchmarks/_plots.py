"""Pictures of a suite, SVG and PNG: latency, throughput and memory over size, and one bar chart a question.

Draws from a record alone, so a run made where matplotlib is missing can be drawn elsewhere. Touches no
global state of matplotlib; the same record gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ._bars import bars
from ._curves import curves, latency, rate
from ._ink import STYLE
from ._peaks import peaks
from ._record import Case, Suite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(suite: Suite, folder: Path) -> list[Path]:
    """Draw a suite.

    Returns:
        The files written, ``.svg`` and ``.png``: ``<suite>-latency-<device>``, ``-throughput-`` and
        ``-memory-`` over size, ``-headline-`` and ``-calls-`` as bars.

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
    with mpl.rc_context(STYLE):
        if panels:
            written += _save(curves(suite, panels, latency), suite, folder, "latency")
            written += _save(curves(suite, panels, rate), suite, folder, "throughput")
        for name, cases in (("headline", headline), ("calls", others)):
            if cases:
                written += _save(bars(suite, cases), suite, folder, name)
        if suite.peaks:
            written += _save(peaks(suite), suite, folder, "memory")
    return written


def _save(figure: Figure, suite: Suite, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{suite.name}-{name}-{suite.device}.{kind}" for kind in ("svg", "png")]
    mark = {"Description": suite.provenance["rehearsal"]} if "rehearsal" in suite.provenance else {}
    figure.savefig(paths[0], metadata={"Date": None, **mark})
    figure.savefig(paths[1], dpi=110, metadata={"Software": None, **mark})
    return paths
