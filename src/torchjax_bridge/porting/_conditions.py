"""What Python code decided while it was recorded: conditions of the port, or reasons to refuse it."""

from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.recording import Fault, Recording

__all__ = ["conditions"]


def conditions(recording: Recording, assumed: frozenset[str] = frozenset()) -> tuple[list[str], list[Fault]]:
    """What holds only under conditions, and what is refused.

    A decision by sizes holds for inputs of the same kind, so it is a note. A decision by the values of a tensor
    that depends on the inputs holds for the example alone, unless the caller accepts it.

    Args:
        recording: What was recorded.
        assumed: Lines whose decisions by values the caller accepts, as ``"file.py:12"``.

    Raises:
        ArgumentError: A line that is accepted decides nothing.
    """
    notes: dict[str, None] = {}
    faults = []
    used: set[str] = set()
    for decision in recording.decisions:
        if decision.by_size:
            if decision.source.file:
                notes[
                    f"sizes that `{decision.source.text}` ({decision.source}) decides as for the example"
                ] = None
        elif str(decision.source) in assumed:
            used.add(str(decision.source))
            notes[
                f"inputs for which `{decision.source.text}` ({decision.source}) decides as for the example"
            ] = None
        else:
            reason = f"{decision.reason}, so the port would hold for inputs like the example alone; accept "
            reason += f'that with assume=["{decision.source}"], or decide by torch.where'
            faults.append(Fault(reason, decision.path, decision.source))
    if unused := sorted(assumed - used):
        lines = sorted({str(decision.source) for decision in recording.decisions if not decision.by_size})
        raise ArgumentError(
            f"assume={unused}: these lines decide nothing by values. Lines that do: {lines or 'none'}."
        )
    return list(notes), faults
