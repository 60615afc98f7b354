"""Inputs of other sizes that a module takes, and what a recording says of the sizes of the example alone.

Larger images and longer sequences are tried first. Then every axis that no other input has changed, together with
the axes of the same size, or alone: a loop over an axis that always has the same length goes unnoticed.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from torchjax_bridge.recording import Recording, generalize, tensors_of

from ._input_axes import InputAxis, axes_text, differing_axes, larger_in_one
from ._inputs import Example, first_recorded

__all__ = ["try_sizes"]


@dataclass(frozen=True)
class Sizes:
    """What is known of other sizes.

    Attributes:
        taken: Inputs of other sizes that the module takes.
        unconditional: Those of them with which the module does what it does with the example.
        notes: What holds for the sizes of the example.
    """

    taken: tuple[Example, ...]
    unconditional: tuple[Example, ...]
    notes: tuple[str, ...]


def try_sizes(
    module: nn.Module,
    recording: Recording,
    example: Example,
    other: Example | None,
    *,
    whole: Collection[str],
) -> Sizes:
    """Run a module with inputs of other sizes. Numbers of the recording that are sizes of these get their origin.

    Args:
        module: The torch module.
        recording: What it did with the example.
        example: The example.
        other: The same with another batch size that the module takes, or None.
        whole: Paths of modules that are not looked into.
    """
    taken: list[Example] = []
    unconditional: list[Example] = []
    notes: dict[str, None] = {}
    lines: dict[str, set[InputAxis]] = {}  # those that hold for the example alone, with the axes that say so

    def tried(candidates: Iterator[Example]) -> Example | None:
        found = first_recorded(module, candidates, whole=whole)
        if found is None:
            return None
        axes = differing_axes(example, [found[0]])
        conditional = _conditional(recording, found[1])
        alone = dict.fromkeys(axes, conditional) if len(axes) == 1 else {}
        for axis in sorted(axes) if conditional and len(axes) > 1 else ():
            one = first_recorded(module, [larger_in_one(example, found[0], axis)], whole=whole)
            alone[axis] = _conditional(recording, one[1]) if one is not None else []
        for line in (*conditional, *(line for own in alone.values() for line in own)):
            lines.setdefault(line, set()).update({axis for axis in alone if line in alone[axis]} or axes)
        taken.append(found[0])
        unconditional.extend([] if conditional else [found[0]])
        return found[0]

    tried(example.enlargements())
    changed = differing_axes(example, [*taken, *([] if other is None else [other])])
    for axes in _by_size(example, changed):
        if tried(iter([example.stretched(axes)])) is None and len(axes) > 1:
            for axis in sorted(axes):
                tried(iter([example.stretched([axis])]))
    notes.update((f"{axes_text(recording, example, axes)}: {line}", None) for line, axes in lines.items())
    if _squeezes(recording) and (example.batch or 1) > 1:
        one = first_recorded(module, [example.with_batch(1)], whole=whole)
        if one is not None and _ranks(one[1]) != _ranks(recording):
            notes["batches of two or more: with one, torch's squeeze() drops the axis of the batch"] = None
    return Sizes(tuple(taken), tuple(unconditional), tuple(notes))


def _conditional(recording: Recording, other: Recording) -> list[str]:
    """The lines of code that hold for the sizes of a recording alone."""
    return list(dict.fromkeys(f"`{f.source.text}` ({f.source})" for f in generalize(recording, other)))


def _squeezes(recording: Recording) -> bool:
    """Whether code drops all axes of one element, of which the batch may be one."""
    return any(
        node.function.rpartition(".")[2].strip("_") == "squeeze" and len(node.args) + len(node.kwargs) == 1
        for frame in recording.top.walk()
        for node in frame.nodes
    )


def _ranks(recording: Recording) -> list[int]:
    return [len(value.shape) for value in tensors_of(recording.top.result)]


def _by_size(example: Example, changed: frozenset[InputAxis]) -> list[frozenset[InputAxis]]:
    """The axes that no other example has changed, those of one size together."""
    groups: dict[int, set[InputAxis]] = {}
    for place, tensor in enumerate(example.tensors()):
        for axis, size in enumerate(tensor.shape):
            if size and (place, axis) not in changed:
                groups.setdefault(size, set()).add((place, axis))
    return [frozenset(axes) for axes in groups.values()]
