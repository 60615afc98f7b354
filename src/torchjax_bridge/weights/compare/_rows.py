"""The steps of a comparison as rows and notes of its result."""

from collections.abc import Iterator, Sequence

from torch import nn

from torchjax_bridge.exchange import join_path

from ._compare import Bounds, compare, pair_arrays
from ._evidence import not_called, place
from ._inputs import Moves
from ._record import Call, Record
from ._result import ParityRow
from ._statistics import Statistic
from ._steps import Step
from ._twins import Twins

__all__ = ["model_step", "notes_of", "row_of", "statistic_row"]


def model_step(root: nn.Module, ours: Record, theirs: Record, bounds: Bounds) -> Step:
    """The models themselves as one step."""
    call = Call((), (), ours.output, module=root)
    output = compare(root, ours.output, theirs.output, bounds, whole=True)
    return Step(call, Call((), (), theirs.output), root, 0, output, (1, 1))


def row_of(step: Step, error: BaseException | None) -> ParityRow | None:
    """A step as a row; None where there is nothing to compare."""
    shape = step.torch.outputs[0].array.shape if step.torch.outputs else None
    where = (type(step.module).__name__, join_path(step.torch.path), *_flax_path(step), step.number, shape)
    nothing = (float("nan"), float("nan"))
    if step.flax is None:
        # A container may be called on one side and looped over on the other.
        return (
            None if list(step.module.children()) else ParityRow(*where, *nothing, None, "not called in Flax")
        )
    if error is not None and not step.flax.outputs:
        return ParityRow(*where, *nothing, False, f"raised {type(error).__name__}")
    if step.output is None:
        return None
    if step.output.ours is None:
        ours, theirs = step.output.shapes
        note = f"{theirs} in Flax"
        # Flax has only the table and reduces its output behind it; the layers that read the result are compared.
        ok = None if isinstance(step.module, nn.EmbeddingBag) else False
        return ParityRow(*where[:4], ours, *nothing, ok, note)
    numbers = (step.output.gap.difference, step.output.gap.relative)
    return ParityRow(*where[:4], step.output.shapes[0], *numbers, step.output.ok)


def _flax_path(step: Step) -> tuple[str]:
    return (join_path(step.flax.path) if step.flax is not None else "",)


def statistic_row(one: Statistic) -> ParityRow:
    name = f"{type(one.step.module).__name__} {one.name}"
    torch_path, (flax_path,) = join_path(one.step.torch.path), _flax_path(one.step)
    return ParityRow(name, torch_path, flax_path, 0, one.shape, one.gap.difference, one.gap.relative, one.ok)


def notes_of(twins: Twins, steps: Sequence[Step], last: Moves, ours: Record, theirs: Record) -> Iterator[str]:
    error = theirs.error
    yield from _only_in_one(ours, theirs)
    yield from (f"{name} went into Flax with its channels last" for name, moved in last.items() if moved)
    for step in steps:
        counts = step.counts
        if step.number == 0 and counts[0] != counts[1] and not list(step.module.children()):
            if counts[1] or error is not None:
                yield not_called(step).message
            else:  # such as the cells of a linen.RNN, which are not one module
                yield f"{place(step)} is not called as one module in Flax: its own output is not compared"
    if error is not None:
        yield f"the Flax model raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    yield from (f"the plan says {fault}" for fault in twins.plan.report)


def _only_in_one(ours: Record, theirs: Record) -> Iterator[str]:
    """What only one of the models returns."""
    pairs = pair_arrays(ours.output, theirs.output) if theirs.output else []
    if pairs is None:
        counts = f"torch gives {len(ours.output)} arrays and Flax {len(theirs.output)}"
        yield f"{counts}, and no names pair them: only torch's first was compared, with the nearest of Flax's"
    compared = {id(value) for pair in pairs or () for value in pair}
    for name, record in (("torch", ours), ("Flax", theirs)) if pairs else ():
        alone = [value for value in record.output if id(value) not in compared]
        if alone:
            names = ", ".join(f"'{join_path(value.path)}'" for value in alone[:3])
            yield f"only the {name} model gives {names}{', ...' if len(alone) > 3 else ''}: not compared"
