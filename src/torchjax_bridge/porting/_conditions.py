"""What Python code decided while it was recorded: conditions of the port, or reasons to refuse it."""

from torchjax_bridge.recording import Fault, Recording

__all__ = ["conditions"]


def conditions(recording: Recording) -> tuple[list[str], list[Fault]]:
    """What holds only under conditions, and what is refused.

    A decision by sizes holds for inputs of the same kind, so it is a note. A decision by the values of a tensor
    that depends on the inputs holds for the example alone.
    """
    notes: dict[str, None] = {}
    faults = []
    for decision in recording.decisions:
        if decision.by_size:
            if decision.source.file:
                notes[
                    f"sizes that `{decision.source.text}` ({decision.source}) decides as for the example"
                ] = None
        else:
            reason = f"{decision.reason}, so the port would hold for inputs like the example alone"
            faults.append(Fault(reason, decision.path, decision.source))
    return list(notes), faults
