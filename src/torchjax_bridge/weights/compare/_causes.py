"""Why a layer is the first whose output differs: hypotheses, tried one after the other on the recorded arrays.

A layer whose input agrees is itself the reason: its weights are not what the plan says, a setting of its Flax twin
differs, or the two run in different modes. A setting is proved by running the Flax layer once more with torch's. A
layer whose input differs, behind layers that agree, shows what was done between them. Where nothing is proved, the
best of what is known is said, and that it is not proved.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from torchjax_bridge.exchange import Path, join_path

from .._audit import Audit, SettingFault
from .._bind import Move
from ._pooling import is_pooling, pooled_otherwise
from ._probes import Finding, Known, find
from ._record import MODEL_ERRORS, Call, Record
from ._steps import Bounds, Comparison, Step, channels_last, compare
from ._values import Gap, Value, gap, laid_out
from ._wrong_weights import wrong_weights

__all__ = ["Cause", "Evidence", "find_cause"]


@dataclass(frozen=True)
class Cause:
    """Why two models differ.

    Attributes:
        kind: One word for it: the name of a setting (``"padding"``, ``"epsilon"``, ...), or ``"train mode"``,
            ``"gelu"``, ``"activation"``, ``"flatten order"``, ``"swapped siblings"``, ``"dropout"``,
            ``"transposed kernel"``, ``"weights"``, ``"residual"``, ``"scale"``, ``"axes"``, ``"order"``,
            ``"pooling"``, ``"momentum"``, ``"running variance"``, ``"calls"``, ``"shape"`` or ``"unknown"``.
        message: What is the matter, and where.
        fix: What to do.
        proved: Whether the numbers show it: with the fix, the layer (or what lies between two layers) agrees.
    """

    kind: str
    message: str
    fix: str
    proved: bool

    def __str__(self) -> str:
        doubt = "" if self.proved else " (not proved)"
        return f"{self.kind}: {self.message}{doubt}" + (f"; {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Evidence:
    """What is known when a cause is looked for.

    Attributes:
        steps: Every call of every pair, in the order of torch's.
        torch: The run in torch, with the calls of layers without a twin.
        bounds: What is taken for rounding.
        settings: The settings that differ.
        moves: For a torch path: what the plan moves for it.
        values: For a move: the tensors as torch says and the arrays that Flax holds.
        rerun: Runs a Flax layer once more on what it was given, with other settings; None where it cannot.
    """

    steps: Sequence[Step]
    torch: Record
    bounds: Bounds
    settings: Audit
    moves: Mapping[Path, Sequence[Move]]
    values: Callable[[Move], tuple[list[np.ndarray], list[np.ndarray]]]
    rerun: Callable[[Call, Mapping[str, Any]], tuple[Value, ...] | None]


def find_cause(step: Step, evidence: Evidence) -> Cause:
    """The likely cause of the first step whose output differs."""
    if step.flax is None:
        return _not_called(step)
    inputs = step.inputs(evidence.bounds)
    causes = _inside if inputs is None or inputs.ok else _between
    found: list[Cause] = []
    for cause in causes(step, step.flax, inputs, evidence):
        if cause.proved:
            return cause
        found.append(cause)
    return found[0] if found else _unknown(step, inputs)


def _place(step: Step) -> str:
    ours = join_path(step.torch.path) or "(root)"
    return f"'{ours}' ({type(step.module).__name__})"


# --- the layer itself ----------------------------------------------------------------------------------


def _inside(step: Step, call: Call, inputs: Comparison | None, evidence: Evidence) -> Iterator[Cause]:
    wrong = list(wrong_weights(step.torch.path, call.path, evidence.moves, evidence.values))
    # What is there instead is exact knowledge; that it is something else may still not be why.
    yield from (_cause(finding, step, "") for finding in wrong if finding.kind != "weights")
    yield from _settings(step, call, evidence)
    yield from _mode(step, call, evidence)
    yield from (_cause(finding, step, "") for finding in wrong)
    if step.output is not None:
        yield from _relation(step, step.output, evidence, f"behind the last layer of {_place(step)} ")


def _settings(step: Step, call: Call, evidence: Evidence) -> Iterator[Cause]:
    """Settings that differ, alone and then all together, proved by running the Flax layer with torch's."""
    path = join_path(step.torch.path)
    mine = [
        fault for fault in evidence.settings.faults if fault.torch_path == path and fault.wanted is not None
    ]
    sure = [fault for fault in mine if _agrees(step, call, {fault.setting: fault.wanted}, evidence)]
    for fault in sure:
        yield _setting(step, fault, proved=True)
    together = {fault.setting: fault.wanted for fault in mine}
    if not sure and len(mine) > 1 and _agrees(step, call, together, evidence):
        texts = "; ".join(f"{fault.in_torch} in torch, {fault.in_flax} in Flax" for fault in mine)
        fixes = ", ".join(fault.fix for fault in mine)
        kind = next((fault.setting for fault in mine if fault.effect == "output"), mine[0].setting)
        yield Cause(
            kind, f"{_place(step)} has {texts}", f"type {mine[0].flax_layer}(..., {fixes})", proved=True
        )
    for fault in sorted(mine, key=lambda fault: fault.effect != "output"):
        if fault.effect != "rounding":
            yield _setting(step, fault, proved=False)


def _setting(step: Step, fault: SettingFault, *, proved: bool) -> Cause:
    message = f"{_place(step)} has {fault.in_torch} in torch and {fault.in_flax} in Flax"
    kind = {"use_running_average": "train mode"}.get(fault.setting, fault.setting)
    return Cause(kind, message, f"type {fault.to_type}", proved)


def _mode(step: Step, call: Call, evidence: Evidence) -> Iterator[Cause]:
    """Statistics of the batch on one side, running ones on the other."""
    module = step.module
    if not isinstance(module, _WITH_STATISTICS):
        return
    if _agrees(step, call, {"use_running_average": module.training}, evidence):
        return  # not what torch does, so not what is missing
    running = not module.training and module.track_running_stats
    if _agrees(step, call, {"use_running_average": running}, evidence):
        ours, theirs = ("running", "the batch's") if running else ("the batch's", "running")
        fix = "eval() on the Flax model, or pass use_running_average=True"
        if not running:
            fix = "eval() on the torch module, or train() on the Flax model"
        message = f"{_place(step)} uses {ours} statistics in torch, {theirs} in Flax"
        yield Cause("train mode", message, f"call {fix}", proved=True)


_WITH_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _agrees(step: Step, call: Call, settings: Mapping[str, Any], evidence: Evidence) -> bool:
    """Whether the Flax layer gives what torch's gives, once it has these settings."""
    again = evidence.rerun(call, settings)
    if again is None:
        return False
    output = compare(step.module, step.torch.outputs, again, evidence.bounds)
    if output is None:
        return False
    was = step.output.gap.relative if step.output is not None else float("inf")
    return (
        output.ok or output.gap.relative <= was / 100
    )  # what is left is the rounding of an ill-conditioned layer


# --- what lies in front of it --------------------------------------------------------------------------


def _between(step: Step, call: Call, inputs: Comparison | None, evidence: Evidence) -> Iterator[Cause]:
    if inputs is None:
        return
    before = _agreeing(step, evidence)
    where = f"between {_place(before[0])} and {_place(step)} " if before else f"in front of {_place(step)} "
    yield from _swapped_calls(step, inputs, evidence)
    yield from _front(step, call, evidence)
    if inputs.ours is None:
        ours, theirs = inputs.shapes
        yield Cause("shape", f"{where}torch has {ours}, Flax {theirs}", "", proved=False)
        return
    yield from _pooling(step, inputs, evidence, where)
    yield from _relation(step, inputs, evidence, where)
    for other in evidence.steps[: evidence.steps.index(step)]:
        if other.flax is None and not list(other.module.children()):
            yield replace(_not_called(other), proved=False)
    names = ", ".join(f"'{join_path(c.path)}' ({type(c.module).__name__})" for c in _unpaired(step, evidence))
    ran = f"; between them torch runs {names}" if names else ""
    yield Cause("unknown", f"{where}the two models compute different things{ran}", "", proved=False)


def _front(step: Step, call: Call, evidence: Evidence) -> Iterator[Cause]:
    """Features that are to be flattened channels last, and are flattened channels first."""
    plain = compare(step.module, step.torch.inputs, call.inputs, evidence.bounds)
    if step.features is not None and plain is not None and plain.ok:
        path = join_path(step.torch.path)
        message = (
            f"in front of {_place(step)} Flax flattens {step.features} channels first, as torch does, and "
            f'Flatten("{path}", {step.features}) laid its kernel out for channels last'
        )
        fix = f'convert with rules=[Flatten("{path}", None)], or leave the channels last when flattening'
        yield Cause("flatten order", message, fix, proved=True)


def _relation(step: Step, compared: Comparison, evidence: Evidence, where: str) -> Iterator[Cause]:
    if compared.ours is None:
        return
    known = [*_known(step, evidence), *_on_the_way(step, compared, evidence)]
    finding = find(compared.ours, compared.theirs, known, _maps(step, evidence), _close(evidence.bounds))
    if finding is not None:
        yield _cause(finding, step, where)


def _cause(finding: Finding, step: Step, where: str) -> Cause:
    fix = finding.fix.replace("{layer}", join_path(step.torch.path))
    return Cause(finding.kind, f"{where}{finding.message}", fix, proved=True)


def _close(bounds: Bounds) -> Callable[[np.ndarray, np.ndarray], bool]:
    def close(one: np.ndarray, other: np.ndarray) -> bool:
        apart: Gap = gap(one, other)
        return bounds.allow(apart, one.dtype.name, other.dtype.name)

    return close


def _agreeing(step: Step, evidence: Evidence) -> list[Step]:
    """The steps in front of one whose outputs agree, the latest first."""
    found = []
    for other in evidence.steps:
        if other is step:
            break
        if other.output is not None and other.output.ok:
            found.append(other)
    return found[::-1]


def _maps(step: Step, evidence: Evidence) -> list[tuple[int, ...]]:
    """The shapes ``(C, *space)`` that torch had in front of a step, the latest first."""
    shapes: list[tuple[int, ...]] = []
    for call in evidence.torch.calls:
        if call is step.torch:
            break
        shapes += [value.array.shape[1:] for value in call.outputs if value.array.ndim > 2]
    return shapes[::-1]


def _on_the_way(step: Step, compared: Comparison, evidence: Evidence) -> Iterator[Known]:
    """The output of the last layer that agrees, which torch pools and flattens before it is this input."""
    for other in _agreeing(step, evidence)[:1]:
        for value in other.torch.outputs[:1]:
            modules = [one.module for one in _unpaired(step, evidence) if is_pooling(one.module)]

            def reach(array: np.ndarray, modules: Sequence[nn.Module] = tuple(modules)) -> np.ndarray | None:
                return _arrived(array, step, compared.theirs.shape, modules)

            yield Known(f"the output of '{join_path(other.torch.path)}'", value.array, reach)


def _arrived(
    array: np.ndarray, step: Step, shape: tuple[int, ...], modules: Sequence[nn.Module] = ()
) -> np.ndarray | None:
    """An array of torch's, pooled and flattened, as the input of a step in Flax."""
    with torch.no_grad():
        tensor = torch.from_numpy(np.array(array))
        try:
            for module in modules:
                tensor = module(tensor)
        except MODEL_ERRORS:
            return None
    array = tensor.numpy()
    if array.ndim > 2 and len(shape) == 2:
        array = array.reshape(len(array), -1)
    if step.features is not None and array.shape == shape:
        array = channels_last(array, step.features)
    return next(iter(laid_out(array, step.module, shape)), None)


def _known(step: Step, evidence: Evidence) -> Iterator[Known]:
    """What the layers in front of a step gave and took, where both sides agree, the latest first."""
    for other in _agreeing(step, evidence)[:_FAR]:
        name = join_path(other.torch.path)
        for what, compared in (("output", other.output), ("input", other.inputs(evidence.bounds))):
            if compared is not None and compared.ok and compared.ours is not None:
                yield Known(f"the {what} of '{name}'", compared.ours)


_FAR = 12  # layers that are looked back: farther connections are rare, and each costs a pass over every activation


def _swapped_calls(step: Step, inputs: Comparison, evidence: Evidence) -> Iterator[Cause]:
    """Another Flax layer of the same kind was given what torch gives to this one."""
    for other in evidence.steps:
        if other is step or other.flax is None or type(other.module) is not type(step.module):
            continue
        theirs = compare(step.module, step.given, other.flax.inputs, evidence.bounds)
        own = other.inputs(evidence.bounds)
        if theirs is not None and theirs.ok and own is not None and not own.ok:
            name = join_path(other.flax.path)
            message = f"Flax gives to '{name}' what torch gives to {_place(step)}"
            yield Cause("swapped siblings", message, "call the two in torch's order", proved=True)


def _unpaired(step: Step, evidence: Evidence) -> list[Call]:
    """The torch layers without weights that ran since the last layer in front of this one."""
    paired = {id(other.torch) for other in evidence.steps}
    found: list[Call] = []
    for call in evidence.torch.calls:
        if call is step.torch:
            break
        if id(call) in paired:
            found = []
        elif not list(call.module.children()):
            found.append(call)
    return found


def _pooling(step: Step, inputs: Comparison, evidence: Evidence, where: str) -> Iterator[Cause]:
    """A pooling layer of torch's, with another padding in Flax."""
    close = _close(evidence.bounds)
    for call in _unpaired(step, evidence):
        for text, fix, result in pooled_otherwise(call.module, call.inputs):
            arrived = _arrived(result, step, inputs.theirs.shape)
            if arrived is not None and close(arrived, inputs.theirs):
                name = f"'{join_path(call.path)}' ({type(call.module).__name__})"
                yield Cause("pooling", f"{where}{text} where torch runs {name}", fix, proved=True)


# --- words -------------------------------------------------------------------------------------------


def _not_called(step: Step) -> Cause:
    ours, theirs = step.counts
    message = f"{_place(step)} is called {_times(ours)} in torch and {_times(theirs)} in Flax"
    return Cause("calls", message, "", proved=True)


def _times(count: int) -> str:
    return f"{count} time" + "s" * (count != 1)


def _unknown(step: Step, inputs: Comparison | None) -> Cause:
    if step.output is not None and step.output.ours is None:
        ours, theirs = step.output.shapes
        return Cause("shape", f"{_place(step)} gives {ours} in torch and {theirs} in Flax", "", proved=False)
    what = "its input, its weights and its settings agree" if inputs is not None else "its weights agree"
    return Cause("unknown", f"{_place(step)} computes something else in Flax; {what}", "", proved=False)
