"""Runs a torch model and its Flax twin on the same inputs and says where they part, and why.

Owns the running of both sides and what becomes of it; which layers belong together is the plan's, what they gave
is recorded by ``_record``, put side by side by ``_steps`` and explained by ``_causes``. Changes neither model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import isnan
from typing import Any

import numpy as np
from torch import nn

from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.exchange import Path, join_path

from .._plan import UserRule
from ._causes import find_cause, has_own_fault
from ._compensation import compensation
from ._evidence import Cause, Evidence, not_called, place
from ._float64 import (
    FLOAT64_ERRORS,
    flax_in_float64,
    in_float64,
    inputs_in_float64,
    torch_in_float64,
    weight_gap,
)
from ._inputs import Moves, check_call, choose_layout, to_flax_inputs, try_other_layout, unmoved_images
from ._record import Call, Change, Record, record_torch
from ._result import Parity, ParityRow
from ._statistics import Statistic, statistics
from ._steps import Bounds, Step, align, compare, pair_arrays
from ._twins import Twins, read_twins
from ._values import tolerance, values_in

__all__ = ["parity"]


def parity(
    torch_module: nn.Module,
    flax_model: Any,
    *inputs: Any,
    rules: Iterable[UserRule] = (),
    atol: float | None = None,
    rtol: float | None = None,
    channels_last: bool | Sequence[bool] | None = None,
    ignore: str | Iterable[str] = (),
    torch_kwargs: Mapping[str, Any] | None = None,
    flax_kwargs: Mapping[str, Any] | None = None,
) -> Parity:
    """Run a torch model and its Flax twin on the same inputs, and compare them layer by layer.

    Both run in the mode they are in (call ``eval()`` on both for a comparison without dropout), without gradients,
    and with exact float32 matrix products. Every call of every layer that the two have in common is compared with
    torch's, in torch's order of execution. For the first that differs the likely cause is looked for and, where
    it can be, proved: its layer is run again with the setting of the other side, its weights are looked for in
    other layers, what lies in front of it is compared with what activations, flattenings, residual connections
    and dropouts would give.

    A layer may differ in a right twin: torch's may have an activation or a scale inside that Flax has behind it.
    Where what reads the layer is given the same in both, its difference is a note and no failure.

    Args:
        torch_module: The torch model.
        flax_model: An ``nnx.Module``, or ``(linen module, variables)``, with the converted weights.
        inputs: The arguments of the torch model: tensors, trees of tensors, and whatever else it takes.
        rules: As for `to_flax`.
        atol: The largest absolute difference that is taken for rounding.
        rtol: The same, as a part of the largest absolute value of torch's output. If neither is given, what
            rounding explains in the dtype: 1e-5 for float32.
        channels_last: Whether tensors ``(N, C, *space)`` are given to Flax as ``(N, *space, C)``; one answer, or
            one for each input. By default this is found out: where torch's convolutions take inputs of as many
            axes, both are tried, and the one in which the first convolution is given the same in both stays. What
            no convolution takes goes in as it is and, where the models then differ, with its channels last, too.
        ignore: The torch paths of layers that need not agree, or patterns of them (``"layer1.*.act"``); the outputs
            of the models are always compared.
        torch_kwargs: Keyword arguments for the torch model.
        flax_kwargs: Keyword arguments for the Flax model, such as ``{"train": False}``.

    Returns:
        A `Parity`; print it.

    Raises:
        PlanError: The two have no layer in common.
        SettingsError: One of them is no live model.
        ArgumentError: The models do not take these inputs; or ``ignore`` names no layer.

    Memory:
        Holds a copy of the inputs and outputs of every layer, of both models, and while torch's runs a copy of its
        parameters and buffers. Both models are given copies of the inputs, so that a forward may write to its own.
        Parameters, buffers, attributes, modes and random states are afterwards what they were, and so are inputs.

    >>> import torch
    >>> from flax import nnx
    >>> from torchjax_bridge import to_flax
    >>> module = torch.nn.Linear(2, 3)
    >>> twin = to_flax(module, nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> parity(module, twin, torch.ones(1, 2)).ok
    True
    """
    left_out = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    kwargs = dict(torch_kwargs or {}), dict(flax_kwargs or {})
    given = _Given(tuple(rules), inputs, channels_last, left_out, *kwargs)
    twins = read_twins(torch_module, flax_model, given.rules)
    bounds = Bounds(atol, rtol)
    found, bad, steps = _compare(twins, given, bounds, bounds)
    said = atol is not None or rtol is not None  # then what is taken for rounding is the caller's word
    return (
        found
        if said or not _may_be_rounding(found, bad)
        else _once_more(found, torch_module, twins, given, steps)
    )


@dataclass(frozen=True)
class _Given:
    """What `parity` was given, beside the models and the bounds."""

    rules: tuple[UserRule, ...]
    inputs: tuple[Any, ...]
    channels_last: bool | Sequence[bool] | None
    ignore: tuple[str, ...]
    torch_kwargs: dict[str, Any]
    flax_kwargs: dict[str, Any]


def _compare(
    twins: Twins, given: _Given, bounds: Bounds, proof: Bounds
) -> tuple[Parity, Step | None, list[Step]]:
    """Run both models and put them side by side.

    Gives the result, the step whose difference the cause explains, and all steps.

    ``bounds`` are for what is called wrong, ``proof`` for what is said to be why.
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

    def lay(theirs: Record) -> list[Step]:
        return align(twins.layer_pairs, twins.modules, twins.names, twins.orders, ours, theirs, bounds)

    theirs, last = choose_layout(named, given.channels_last, ours, run, lay)
    steps = lay(theirs)
    if not any(step.torch.path == () for step in steps):  # the models themselves are no pair of the plan
        steps.append(_whole(twins.root, ours, theirs, bounds))
    layers = twins.layers(theirs)
    audit = twins.settings(layers)
    known = (twins.moves, twins.values, twins.rerun(), twins.rerun_refilled, layers)
    evidence = Evidence(steps, ours, theirs, proof, audit, *known)
    rows: list[ParityRow] = []
    bad: Step | None = None
    notes: list[str] = []
    for step in steps:
        row = _row(step, theirs.error)
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
            cause = _or_layout(cause, try_other_layout(named, last, (theirs, steps), run, lay))
    elif twins.root.training:
        trained = list(statistics(steps, twins.moves, ours, theirs, audit.faults, twins.flavour, bounds))
        trained = [one for one in trained if one.step.torch.path not in ignored]
        rows += [_statistic_row(one) for one in trained]
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
            *_notes(twins, steps, last, ours, theirs),
            *(unmoved if given.channels_last is None else ()),
        ),
    )
    return found, bad, steps


# --- what rounding may be ------------------------------------------------------------------------------


def _may_be_rounding(found: Parity, bad: Step | None) -> bool:
    """Whether the first difference is so small that a norm or the depth of a model may have made it of rounding."""
    if bad is None or found.first is None or found.first.note or found.cause is None or not bad.torch.outputs:
        return False
    dtype = bad.torch.outputs[0].dtype
    if dtype == "float64" or not found.first.relative <= 1e4 * tolerance(dtype):
        return False
    for fault in (
        found.settings
    ):  # a way of computing that rounds more is no mistake, but it is known and has a remedy
        if fault.effect == "rounding" and fault.setting == found.cause.kind and found.cause.proved:
            return fault.torch_path != found.first.torch_path
    return True


def _once_more(
    found: Parity, torch_module: nn.Module, twins: Twins, given: _Given, steps: Sequence[Step]
) -> Parity:
    """The result, where float64 has decided which of the differences are rounding."""
    weights = weight_gap(twins, steps, Bounds(rtol=_SURE))
    try:
        with in_float64():
            wide = flax_in_float64(twins, torchs=weights < float("inf"))
            inputs, *kwargs = map(inputs_in_float64, (given.inputs, given.torch_kwargs, given.flax_kwargs))
            again = _Given(given.rules, inputs, given.channels_last, given.ignore, *kwargs)
            both = read_twins(torch_in_float64(torch_module), wide, given.rules)
            sure, _, _ = _compare(both, again, Bounds(rtol=_SURE), Bounds(rtol=_EQUAL))
    except FLOAT64_ERRORS:
        return found
    known = {_key(row): row for row in sure.rows}
    compared = [row for row in found.rows if row.ok is not None]
    if any(_key(row) not in known or isnan(known[_key(row)].difference) for row in compared):
        return found  # it ran otherwise
    rows = [_decided(row, known[_key(row)]) if row.ok is not None else row for row in found.rows]
    rows += [row for row in sure.rows if _key(row) not in {_key(row) for row in rows}]
    excused = [
        row for row, now in zip(found.rows, rows, strict=False) if row.ok is False and now.ok is not False
    ]
    if not excused:
        return replace(found, cause=sure.cause) if sure.cause is not None and sure.cause.proved else found
    most, left = max(row.relative for row in excused), max(known[_key(row)].relative for row in excused)
    outputs = "1 output differs" if len(excused) == 1 else f"{len(excused)} outputs differ"
    note = f"{outputs} by up to {most:.1e}, which is rounding: in float64 by no more than {left:.1e}"
    if _EQUAL < weights < float("inf"):
        note += f" with the same weights, which differ by up to {weights:.1e} of their largest"
    return replace(found, rows=tuple(rows), cause=sure.cause, notes=(*found.notes, note))


def _decided(row: ParityRow, sure: ParityRow) -> ParityRow:
    return replace(row, ok=sure.ok, note=sure.note)


def _key(row: ParityRow) -> tuple[str, str, int]:
    return row.layer, row.torch_path, row.call


_SURE = tolerance("float32")
_EQUAL = 1e-7  # the last digit of float32


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
    """Why a layer may differ in a right twin; None where it may not."""
    if not step.torch.path or step.output is None:
        return None
    made_up, shown = compensation(step, evidence.steps, evidence.torch, run_torch, bounds)
    if made_up:
        return "what reads it is given the same in both"
    if shown and not _keeps(evidence.torch) and not has_own_fault(step, evidence):
        return "the models' outputs agree"
    return None


def _or_layout(cause: Cause, turned: tuple[str, bool, bool] | None) -> Cause:
    """The cause, or that the caller said where the channels are and they are elsewhere."""
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


def _keeps(ours: Record) -> bool:
    """Whether a run changes buffers: then they are outputs, too, and show what a norm takes away again."""
    return any(
        not np.array_equal(after.array, values_in(getattr(module, name))[0].array)
        for (module, name), after in ours.state.items()
        if after.array.dtype.kind == "f"
    )


# --- rows --------------------------------------------------------------------------------------------


def _whole(root: nn.Module, ours: Record, theirs: Record, bounds: Bounds) -> Step:
    """The two models as one step."""
    call = Call((), (), ours.output, module=root)
    output = compare(root, ours.output, theirs.output, bounds, whole=True)
    return Step(call, Call((), (), theirs.output), root, 0, output, (1, 1))


def _row(step: Step, error: BaseException | None) -> ParityRow | None:
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
        # Flax has the table alone: what it gives is reduced behind it, and the layers that read it are compared.
        ok = None if isinstance(step.module, nn.EmbeddingBag) else False
        return ParityRow(*where[:4], ours, *nothing, ok, note)
    numbers = (step.output.gap.difference, step.output.gap.relative)
    return ParityRow(*where[:4], step.output.shapes[0], *numbers, step.output.ok)


def _flax_path(step: Step) -> tuple[str]:
    return (join_path(step.flax.path) if step.flax is not None else "",)


def _statistic_row(one: Statistic) -> ParityRow:
    name = f"{type(one.step.module).__name__} {one.name}"
    torch_path, (flax_path,) = join_path(one.step.torch.path), _flax_path(one.step)
    return ParityRow(name, torch_path, flax_path, 0, one.shape, one.gap.difference, one.gap.relative, one.ok)


def _notes(twins: Twins, steps: Sequence[Step], last: Moves, ours: Record, theirs: Record) -> Iterator[str]:
    error = theirs.error
    yield from _left_out(ours, theirs)
    yield from (f"{name} went into Flax with its channels last" for name, moved in last.items() if moved)
    for step in steps:
        counts = step.counts
        if step.number == 0 and counts[0] != counts[1] and not list(step.module.children()):
            if counts[1] or error is not None:
                yield not_called(step).message
            else:  # such as the cells of a linen.RNN, which are no module together
                yield f"{place(step)} is not called as one module in Flax: its own output is not compared"
    if error is not None:
        yield f"the Flax model raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    yield from (f"the plan says {fault}" for fault in twins.plan.report)


def _left_out(ours: Record, theirs: Record) -> Iterator[str]:
    """What only one of the models returns."""
    pairs = pair_arrays(ours.output, theirs.output) if theirs.output else []
    compared = {id(value) for pair in pairs or () for value in pair}
    for name, record in (("torch", ours), ("Flax", theirs)) if pairs else ():
        alone = [value for value in record.output if id(value) not in compared]
        if alone:
            names = ", ".join(f"'{join_path(value.path)}'" for value in alone[:3])
            yield f"only the {name} model gives {names}{', ...' if len(alone) > 3 else ''}: not compared"
