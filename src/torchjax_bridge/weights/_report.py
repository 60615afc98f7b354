"""A `Fault` says what does not fit, where, and how to fix it. A `Report` is all of them, raised as one error."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import PlanError

__all__ = ["Choice", "Fault", "FaultKind", "Report", "Series", "what_it_is"]

FaultKind = Literal["missing", "unexpected", "mismatch", "ambiguous", "no rule", "dtype", "rules"]

# strict=False ignores these, because the rest of the tree still converts without a guess.
_LENIENT: frozenset[str] = frozenset({"missing", "unexpected"})


@dataclass(frozen=True)
class Series:
    """What the same fault has in common in many equal blocks.

    Attributes:
        rule: The rule that fixes all of them, with the possible names.
        pattern: The torch pattern of that rule, with a ``*`` for the number of the block.
        torch: The torch candidates, by names relative to the block.
        flax: The Flax candidates.
        what: The plural noun for the blocks.
    """

    rule: str
    pattern: str
    torch: tuple[str, ...]
    flax: tuple[str, ...]
    what: str = "blocks"


@dataclass(frozen=True)
class Choice:
    """The possible rules for all layers of a class, one of which is right.

    Attributes:
        kind: The class.
        lines: The rules as source code.
        norm: The torch norm with the same tensors; or empty.
        uses: What the layer computes under each rule; empty if that does not distinguish them.
    """

    kind: type
    lines: tuple[str, ...]
    norm: str = ""
    uses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """One thing that does not fit.

    Attributes:
        kind: ``missing`` (a template leaf without a source), ``unexpected`` (a source tensor without a place),
            ``mismatch`` (both exist and do not fit), ``ambiguous`` (more than one candidate), ``no rule``
            (a layer without a counterpart), ``dtype`` or ``rules`` (a rule of the caller that does nothing
            or contradicts another).
        message: What does not fit, why, and the fix.
        path: The dotted path of the place.
        subject: The key or dotted path of the tensor, or empty.
        even: Whether both sides have the same number of candidates, so that an answer would pair all of them.
        series: What it shares with the same fault of equal blocks; such faults are printed as one.
        choice: The rules that would fix it, for a layer whose class has none.
    """

    kind: FaultKind
    message: str
    path: str
    subject: str = ""
    even: bool = True
    series: Series | None = None
    choice: Choice | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.message} @ {self.path or '(root)'}"


@dataclass(frozen=True)
class Report:
    """All faults of one plan, in the order of the source. Equal faults of equal blocks are printed as one."""

    faults: tuple[Fault, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.faults)

    def __len__(self) -> int:
        return len(self.faults)

    def __iter__(self) -> Iterator[Fault]:
        return iter(self.faults)

    def __str__(self) -> str:
        return "\n".join(self.lines()) or "no faults"

    def lines(self) -> Iterator[str]:
        """One line for each fault or series of faults."""
        return _lines(self.faults)

    @property
    def lenient(self) -> tuple[Fault, ...]:
        """The faults that ``strict=False`` ignores."""
        return tuple(fault for fault in self.faults if fault.kind in _LENIENT)

    def lenient_lines(self) -> Iterator[str]:
        """The lenient faults as lines."""
        return _lines(self.lenient)

    def raise_unless_ok(self, what: str, *, strict: bool) -> None:
        """Raise one `PlanError` that lists every fault.

        Args:
            what: What the caller asked for, as the start of the message.
            strict: With ``False``, ``missing`` and ``unexpected`` faults do not raise.
        """
        faults = self.faults if strict else tuple(f for f in self.faults if f.kind not in _LENIENT)
        if not faults:
            return
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise PlanError("\n  ".join([f"cannot {what}: {count}", *_lines(faults)]))


def _lines(faults: Iterable[Fault]) -> Iterator[str]:
    groups: dict[object, list[Fault]] = {}
    for fault in faults:
        groups.setdefault(fault.series or id(fault), []).append(fault)
    for first, *others in groups.values():
        if others and first.series:
            series = first.series
            many = f"{len(others)} more {series.what} up to '{others[-1].path}'"
            rest = f"'{others[-1].path}'" if len(others) == 1 else many
            advice = f", and rules=[{series.rule}, ...] matches all of them" if series.rule else ""
            first = replace(first, message=f"{first.message}; the same in {rest}{advice}")
        yield str(first)


def what_it_is(thing: object) -> str:
    """A phrase for a wrong argument: ``a Linear``, or ``the class Linear`` if it is a class."""
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"{what_kind(thing)}"
