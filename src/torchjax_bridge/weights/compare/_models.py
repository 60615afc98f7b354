"""Runs both models on the same inputs and compares them call by call.

The plan says which layers belong together. ``_record`` records the runs, ``_steps`` aligns their calls,
``_causes`` explains the first difference. Changes neither model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import nn

from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.exchange import Path, join_path

from .._plan import UserRule
from ._causes import find_cause, has_own_fault
from ._compare import Bounds
from ._compensation import compensation
from ._evidence import Cause, Evidence, place
from ._inputs import Moves, check_call, choose_layout, to_flax_inputs, try_other_layout, unmoved_images
from ._record import Change, Record, record_torch
from ._result import Parity, ParityRow
from ._rows import model_step, notes_of, row_of, statistic_row
from ._statistics import statistics
from ._steps import Step, align
from ._twins import Twins
from ._values import values_in

__all__ = ["Arguments", "compare_models"]


@dataclass(frozen=True)
class Arguments:
    """What `parity` was given, beside the models and the bounds."""

    rules: tuple[UserRule, ...]
    inputs: tuple[Any, ...]
    channels_last: bool | Sequence[bool] | None
    ignore: tuple[str, ...]
    torch_kwargs: dict[str, Any]
    flax_kwargs: dict[str, Any]


def compare_models(
    twins: Twins, given: Arguments, bounds: Bounds, proof: Bounds
) -> tuple[Parity, Step | None, list[Step]]:
    """Run both models and compare them.

    Args:
        twins: The models.
        given: What the caller passed.
        bounds: The differences that pass for rounding.
        proof: The differences that pass for rounding in the proof of a cause.

    Returns:
        The result, the step whose difference the cause explains, and all steps.
    """
    inputs, ours_kwargs, theirs_kwargs = given.inputs, given.torch_kwargs, given.flax_kwargs
    named = {f"input {place}": value for place, value in enumerate(inputs)}
    check_call("torch", twins.root.forward, inputs, ours_kwargs)
    check_call("Flax", twins.flax_call, inputs, theirs_kwargs)
    ignored = _ignored(given.ignore, twins.modules)

    def run_torch(change: Change | None = None) -> Record:
        return record_torch(twins.root, twins.modules.items(), inputs, ours_kwargs, change)

    ours = run_torch()

    def run(last: Moves) -> Record:
        arrays = to_flax_inputs(named, last, twins.arrays)
        extra = to_flax_inputs(theirs_kwargs, {}, twins.arrays)
        return twins.run_flax(tuple(arrays[name] for name in named), extra)

    def align_steps(theirs: Record) -> list[Step]:
        return align(twins.layer_pairs, twins.modules, twins.names, twins.orders, ours, theirs, bounds)

    theirs, last = choose_layout(named, given.channels_last, ours, run, align_steps)
    steps = align_steps(theirs)
    if not any(step.torch.path == () for step in steps):  # the plan does not pair the models themselves
        steps.append(model_step(twins.root, ours, theirs, bounds))
    layers = twins.layers(theirs)
    audit = twins.settings(layers)
    known = (twins.moves, twins.values, twins.rerun(), twins.rerun_refilled, layers)
    evidence = Evidence(steps, ours, theirs, proof, audit, *known)
    rows: list[ParityRow] = []
    bad: Step | None = None
    notes: list[str] = []
    for step in steps:
        row = row_of(step, theirs.error)
        if row is None:
            continue
        if step.torch.path in ignored:
            row = replace(row, ok=None, note="ignored")
        elif row.ok is False and bad is None:
            why = _excuse(step, evidence, run_torch, bounds)
            if why is None:
                bad = step
            else:
                row = replace(row, ok=None, note=why)
                notes.append(f"{place(step)} gives something else in Flax; {why}")
        rows.append(row)
    if theirs.error is not None and bad is None:
        theirs.error.add_note("raised by the Flax model; every layer that ran before agreed with torch's")
        raise theirs.error
    cause = None
    if bad is not None:
        cause = find_cause(bad, evidence)
        if given.channels_last is not None:
            cause = _or_wrong_layout(cause, try_other_layout(named, last, (theirs, steps), run, align_steps))
    elif twins.root.training:
        trained = list(statistics(steps, twins.moves, ours, theirs, audit.faults, twins.flavour, bounds))
        trained = [one for one in trained if one.step.torch.path not in ignored]
        rows += [statistic_row(one) for one in trained]
        cause, bad = next(((one.cause, one.step) for one in trained if one.cause is not None), (None, None))
    unmoved = list(unmoved_images(named, twins.modules.values(), last, agree=cause is None))
    if cause is not None and not cause.proved and unmoved and given.channels_last is None:
        cause = replace(cause, message=f"{cause.message}; {'; '.join(unmoved)}")
    whole = next(step for step in reversed(steps) if step.torch.path == ()).output
    found = Parity(
        tuple(rows),
        cause,
        whole.gap.difference if whole is not None else float("nan"),
        audit.faults,
        (
            *notes,
            *notes_of(twins, steps, last, ours, theirs),
            *(unmoved if given.channels_last is None else ()),
        ),
    )
    return found, bad, steps


def _ignored(patterns: Sequence[str], modules: Mapping[Path, nn.Module]) -> set[Path]:
    """The layers that a caller excludes."""
    names = {join_path(path): path for path in modules if path}
    found: set[Path] = set()
    for pattern in patterns:
        matching = [path for name, path in names.items() if fnmatchcase(name, pattern)]
        if not matching:
            near = get_close_matches(pattern, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ArgumentError(f"ignore={pattern!r} names no layer of the torch model{hint}")
        found.update(matching)
    return found


def _excuse(
    step: Step, evidence: Evidence, run_torch: Callable[[Change], Record], bounds: Bounds
) -> str | None:
    """Why a difference of a layer is no mistake; None if it may be one."""
    if not step.torch.path or step.output is None:
        return None
    made_up, shown = compensation(step, evidence.steps, evidence.torch, run_torch, bounds)
    if made_up:
        return "what reads it is given the same in both"
    if shown and not _changes_buffers(evidence.torch) and not has_own_fault(step, evidence):
        return "the models' outputs agree"
    return None


def _or_wrong_layout(cause: Cause, turned: tuple[str, bool, bool] | None) -> Cause:
    """The cause, or a wrong ``channels_last`` where the other layout agrees better."""
    if turned is None or (cause.proved and not turned[2]):
        return cause
    went, word, every = turned
    fix = f"pass channels_last={word}"
    if cause.proved:
        return replace(cause, fix=f"{cause.fix}; or {fix}, with which every layer agrees")
    message = (
        f"{went}, as channels_last={not word} says; the other way {'every layer' if every else 'more'} agrees"
    )
    return Cause("channels_last", message, fix, proved=every)


def _changes_buffers(ours: Record) -> bool:
    """Whether a run changes buffers. Then they are outputs, too, and show what a later norm hides."""
    return any(
        not np.array_equal(after.array, values_in(getattr(module, name))[0].array)
        for (module, name), after in ours.state.items()
        if after.array.dtype.kind == "f"
    )
