"""What Python code decided while it was recorded: conditions of the port, or reasons to refuse it."""

import contextlib
from collections.abc import Collection, Sequence

from torch import nn

from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.recording import Decision, Fault, Recording, SourceLine, record

from ._argument_trees import takes
from ._inputs import Example
from ._questions import question_of

__all__ = ["conditions", "decided_otherwise", "fixed_arguments"]

_ASSERTIONS = (
    "assert ",
    "assert(",
    "_assert(",
    "torch._assert(",
)  # torch itself refuses what they decide otherwise


def decided_otherwise(
    module: nn.Module, recording: Recording, example: Example, *, whole: Collection[str]
) -> dict[str, list[Example]]:
    """Inputs with which lines that decide by values decide in the other way than with the example.

    A mask that hides nothing is left out by such a line, and a warning is given by another: a port that does one
    thing for both is right if it gives what torch gives for inputs of either kind.

    Args:
        module: The torch module.
        recording: What it did with the example.
        example: The example.
        whole: Paths of modules that are not looked into.

    Returns:
        The inputs, by the line as ``"file.py:12"``. A line with none is missing.
    """
    first = _answers(recording)
    wanted = {line for line, answers in first.items() if len(answers) == 1 and None not in answers}
    found: dict[str, list[Example]] = {}
    for candidate in example.other_values() if wanted else ():
        with contextlib.suppress(ArgumentError):
            answers = _answers(record(module, candidate.args, candidate.kwargs, whole=whole))
            for line in wanted:
                if answers.get(line) == {not answer for answer in first[line]}:
                    found.setdefault(line, []).append(candidate)
    return found


def _answers(recording: Recording) -> dict[str, set[bool | None]]:
    """What was answered to the questions about values, by line."""
    found: dict[str, set[bool | None]] = {}
    for decision in recording.decisions:
        if not decision.by_size:
            found.setdefault(str(decision.source), set()).add(decision.outcome)
    return found


def conditions(
    recording: Recording, assumed: frozenset[str] = frozenset(), otherwise: Collection[str] = ()
) -> tuple[list[str], list[Fault]]:
    """What holds only under conditions, and what is refused.

    A decision by sizes holds for inputs of the same kind, so it is a note, but for an assertion. A decision by the
    values of a tensor that depends on the inputs holds for the example alone, unless the caller accepts it, or the
    port is proved with inputs that are decided in the other way. The same question, asked again, has the same
    answer.

    Args:
        recording: What was recorded.
        assumed: Lines whose decisions by values the caller accepts, as ``"file.py:12"``.
        otherwise: Lines for which inputs are known that are decided in the other way: with these the port will be
            proved.

    Raises:
        ArgumentError: A line that is accepted decides nothing.
    """
    notes: dict[str, None] = {}
    refused: dict[tuple[str, SourceLine], list[Decision]] = {}  # by module and line
    used: set[str] = set()
    known: set[object] = set()  # the questions for whose other answer the port will be proved, too
    for decision in recording.decisions:
        if decision.by_size:
            if decision.source.file and not decision.source.text.startswith(_ASSERTIONS):
                asks = f"`{decision.source.text}` ({decision.source})"
                if decision.inside is not None:
                    asks = f"`{decision.inside.text}` of torch's own ({decision.inside}), called by {asks},"
                notes[f"sizes that {asks} decides as for the example"] = None
        elif str(decision.source) in assumed:
            used.add(str(decision.source))
            notes[
                f"inputs for which `{decision.source.text}` ({decision.source}) decides as for the example"
            ] = None
        elif str(decision.source) in otherwise:
            known.add(question_of(decision))
        elif question_of(decision) not in known:
            line = SourceLine(decision.source.file, decision.source.line)
            refused.setdefault((decision.path, line), []).append(decision)
    if unused := sorted(assumed - used):
        lines = sorted({str(decision.source) for decision in recording.decisions if not decision.by_size})
        raise ArgumentError(
            f"assume={unused}: these lines decide nothing by values. Lines that do: {lines or 'none'}."
        )
    return list(notes), [_refused(asking) for asking in refused.values()]


def _refused(asking: Sequence[Decision]) -> Fault:
    """The fault of a line that asks for values, once or several times."""
    words = list(dict.fromkeys(decision.reason for decision in asking))
    first, verb = asking[0], "asks" if len(words) == 1 else "ask"
    decides = all(decision.outcome is not None for decision in asking)
    way = "decide by torch.where" if decides else "leave the values in tensors"
    reason = (
        f"{' and '.join(words)} {verb} for values, so the port would hold for inputs like the example alone; "
        f'accept that with assume=["{first.source}"], or {way}'
    )
    return Fault(reason, first.path, first.source)


def fixed_arguments(recording: Recording) -> list[str]:
    """What holds for the settings among the arguments, which a port does not take."""
    given = [
        f"{name}={tree!r}"
        for name, tree in recording.top.inputs
        if isinstance(tree, bool | int | float | str) and not takes(tree)
    ]
    return [f"{', '.join(given)} in every call"] if given else []
