"""What one run of the proof did: written after every step, so that a run that is cut off leaves what it has."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._rehearsal import MARK

__all__ = ["Ran", "Run", "RunError", "load_run"]

_SCHEMA = 1


class RunError(ValueError):
    """A folder without a run that can be read."""


@dataclass(frozen=True)
class Ran:
    """What became of one stage."""

    stage: str
    words: str
    outcome: str
    """``"done"``, ``"failed"``, ``"cut off"``, ``"skipped"`` or ``"not reached"``."""
    seconds: float
    why: str
    log: str = ""


@dataclass
class Run:
    """One run, from its preflight to its last stage."""

    minutes: float
    rehearsal: bool
    begun: str
    revision: str | None
    found: dict[str, Any]
    stages: list[Ran] = field(default_factory=list)
    complete: bool = False

    def save(self, folder: Path) -> None:
        """Write ``run.json``, whole or not at all."""
        document = {"schema": _SCHEMA, **asdict(self)}
        if self.rehearsal:
            document["mark"] = MARK
        draft = folder / ".run.json"
        draft.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(draft, folder / "run.json")


def load_run(folder: Path) -> Run:
    """The run that a folder holds.

    Raises:
        RunError: There is none, or not of this schema.
    """
    path = folder / "run.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as err:
        raise RunError(f"{folder} holds no run of `python -m benchmarks gpu`: {err}") from err
    if document.pop("schema", None) != _SCHEMA:
        raise RunError(f"{path} is of another version of the benchmarks.")
    document.pop("mark", None)
    stages = [Ran(**one) for one in document.pop("stages")]
    return Run(**document, stages=stages)
