"""The error of a port that is refused: everything at once, each thing with its place, the reason and a way out."""

from collections.abc import Mapping, Sequence

from torch import nn

from torchjax_bridge.errors import PortError
from torchjax_bridge.recording import Fault, SourceLine

from ._attributes import common_path, is_inside

__all__ = ["refuse"]


def refuse(faults: Sequence[Fault], root: nn.Module, to: str) -> None:
    """Raise one error with every fault; the same line in several modules is named once.

    Args:
        faults: What has no counterpart.
        root: The model.
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
    modules = dict(root.named_modules(remove_duplicate=False))
    for (reason, source), paths in places.items():
        where = " and ".join(f"'{path}'" if path else "the model itself" for path in paths)
        line = f", {source}: {source.text}" if source.file else ""
        lines.append(f"- in {where}{line}\n  {reason}{_way_out(paths, source, modules, to)}")
    count = "1 thing has" if len(lines) == 1 else f"{len(lines)} things have"
    error = PortError(
        f"{type(root).__name__} is not ported: {count} no exact counterpart in Flax.\n" + "\n".join(lines)
    )
    error.faults = tuple(dict.fromkeys(faults))
    raise error


def _way_out(paths: Sequence[str], source: SourceLine, modules: Mapping[str, nn.Module], to: str) -> str:
    """How code that stays as it is can be part of a port all the same."""
    if "" in paths and not source.file:
        return ""
    if to == "linen":
        return "\n  (or port to nnx, where keep= can leave a module in torch)"
    if "" in paths:
        return '\n  (or put the line into a module of its own, and keep that in torch: keep=["its path"])'
    kept = dict.fromkeys(_kept(modules, path.partition(".parametrizations")[0]) for path in paths)
    if "" in kept:
        return (
            "\n  (keep= cannot leave it in torch: several modules hold it, and only the model holds them all)"
        )
    return f"\n  (or leave {'it' if len(kept) == 1 else 'them'} in torch: keep={[*kept]})"


def _kept(modules: Mapping[str, nn.Module], path: str) -> str:
    """What ``keep=`` names for a module to stay in torch: where several hold its weights, what holds them all."""
    if path not in modules:
        return path
    weights = set(map(id, modules[path].parameters()))
    outside = [
        place
        for place, module in modules.items()
        if not is_inside(path, place) and not weights.isdisjoint(map(id, module._parameters.values()))
    ]
    return common_path([path, *outside])
