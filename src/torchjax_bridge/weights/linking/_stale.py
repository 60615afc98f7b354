"""The error for models that have changed since their link was made."""

from collections.abc import Iterable, Mapping

from torchjax_bridge.errors import PlanError

__all__ = ["changed", "raise_if_stale", "stale"]


def raise_if_stale(faults: Iterable[str]) -> None:
    """Raise one `PlanError` that lists every fault, if there are any."""
    if lines := list(faults):
        raise stale(lines)


def stale(faults: Iterable[str]) -> PlanError:
    """The error that lists these faults."""
    listed = "\n".join(f"  {line}" for line in dict.fromkeys(faults))
    return PlanError(
        f"the link no longer fits its models, which have changed since it was made:\n{listed}\n"
        "Make a new one with link(module, model, ...)."
    )


def changed(before: Mapping[str, object], now: Mapping[str, object], what: str) -> Iterable[str]:
    """A line for each name that only one of two mappings has."""
    for name in before:
        if name not in now:
            yield f"{what} '{name}' was removed"
    for name in now:
        if name not in before:
            yield f"{what} '{name}' was added"
