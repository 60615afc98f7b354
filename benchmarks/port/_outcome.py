"""What came of porting one model, and the file that keeps it for all of them.

A run replaces the models that it measured and keeps the others. Files are written whole or not at all.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "load", "save"]


@dataclass(frozen=True)
class Outcome:
    """One row of the table; what was not reached is ``None``."""

    set: str
    model: str
    why_not: str = ""
    """Why there is no port, or why measuring it ended: the first line of the error. Empty for a port that ran."""
    lines: int | None = None
    """Lines of the emitted file."""
    torch_lines: int | None = None
    """Lines of the torch classes that it replaces."""
    classes: int | None = None
    transpositions: int | None = None
    difference: float | None = None
    """The largest difference from torch's outputs, relative to the largest output; so are the next two."""
    other_batch: float | None = None
    in_float64: float | None = None
    """The same in float64, where one of these is above the limit: a net that magnifies rounding agrees there."""
    train: str = ""
    """``agrees``, ``random`` (it runs, and torch's own outputs differ from call to call), or what is wrong."""
    port_seconds: float | None = None
    """With the proof that `port` makes itself."""
    batch: int | None = None
    """Batch size of the times below."""
    torch_ms: float | None = None
    """torch's forward pass, eager."""
    port_ms: float | None = None
    """The port's under ``nnx.jit``."""
    twin_ms: float | None = None
    """The twin's that a person wrote, under ``nnx.jit``."""
    revision: str = ""
    """The revision of this project that was measured; empty for rows that are older than this field."""

    @property
    def wrong(self) -> bool:
        """Whether there is a port, and it gives other outputs than torch."""
        found = (self.difference, self.other_batch) if self.in_float64 is None else (self.in_float64,)
        return any(one is not None and not one <= LIMIT for one in found)

    @property
    def ported(self) -> bool:
        """Whether there is a port, with torch's outputs at both batch sizes."""
        return not self.why_not and not self.wrong and None not in (self.difference, self.other_batch)

    @property
    def verdict(self) -> str:
        """``yes``, or why not."""
        return self.why_not or ("yes" if self.ported else "no: it gives other outputs")


LIMIT = 1e-5
"""The largest relative difference with which a port counts as one."""


def load(path: Path) -> dict[str, Any]:
    """What a file holds: ``provenance`` of the last run, and ``outcomes``; empty without a file."""
    if not path.exists():
        return {"provenance": {}, "outcomes": []}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document | {"outcomes": [Outcome(**fields) for fields in document["outcomes"]]}


def save(path: Path, outcomes: Iterable[Outcome], provenance: dict[str, Any]) -> list[Outcome]:
    """Write the outcomes beside those of other models that the file holds, and return all of them."""
    merged = {(one.set, one.model): one for one in [*load(path)["outcomes"], *outcomes]}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    rows = [asdict(one) for one in merged.values()]
    draft.write_text(
        json.dumps({"provenance": provenance, "outcomes": rows}, indent=1) + "\n", encoding="utf-8"
    )
    draft.replace(path)
    return list(merged.values())
