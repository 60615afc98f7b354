"""What a suite has found so far."""

from dataclasses import dataclass, field

from ._record import Case, Peak, Promise

__all__ = ["Findings"]


@dataclass
class Findings:
    """What a suite returns; parts of a suite are joined with ``+=``."""

    cases: list[Case] = field(default_factory=list)
    promises: list[Promise] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)

    def __iadd__(self, other: "Findings") -> "Findings":
        self.cases += other.cases
        self.promises += other.promises
        self.facts += other.facts
        self.peaks += other.peaks
        return self
