"""The error of a port that is refused: everything at once, each thing with its place, the reason and a way out."""

from collections.abc import Sequence

from torchjax_bridge.errors import PortError
from torchjax_bridge.recording import Fault, SourceLine

__all__ = ["refuse"]


def refuse(faults: Sequence[Fault], name: str, to: str) -> None:
    """Raise one error with every fault; the same line in several modules is named once.

    Args:
        faults: What has no counterpart.
        name: The class of the model.
        to: The library that the port is written for.

    Raises:
        PortError: There are faults.
    """
    if not faults:
        return
    places: dict[tuple[str, SourceLine], list[str]] = {}
    for fault in faults:
        source = SourceLine(fault.source.file, fault.source.line)
        found = places.setdefault((fault.reason, source), [])
        found += [fault.path] if fault.path not in found else []
    lines = []
    for (reason, source), paths in places.items():
        where = " and ".join(f"'{path}'" if path else "the model itself" for path in paths)
        line = f", {source}: {source.text}" if source.file else ""
        lines.append(f"- in {where}{line}\n  {reason}{_way_out(paths, source, to)}")
    count = "1 thing has" if len(lines) == 1 else f"{len(lines)} things have"
    error = PortError(f"{name} is not ported: {count} no exact counterpart in Flax.\n" + "\n".join(lines))
    error.faults = tuple(dict.fromkeys(faults))
    raise error


def _way_out(paths: Sequence[str], source: SourceLine, to: str) -> str:
    """How code that stays as it is can be part of a port all the same."""
    if "" in paths and not source.file:
        return ""
    if to == "linen":
        return "\n  (or port to nnx, where keep= can leave a module in torch)"
    if "" in paths:
        return '\n  (or put the line into a module of its own, and keep that in torch: keep=["its path"])'
    kept = dict.fromkeys(path.partition(".parametrizations")[0] for path in paths)
    return f"\n  (or leave {'it' if len(kept) == 1 else 'them'} in torch: keep={[*kept]})"
