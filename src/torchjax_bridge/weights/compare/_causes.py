"""Why a layer is the first whose output differs: hypotheses, tried one after the other on the recorded arrays.

If the layer's input agrees, the layer itself is the reason: its weights are not what the plan says, a setting
of its Flax twin differs, the two run in different modes, its class overrides the ``__call__`` of Flax's, or its
carry or mask is another. Each hypothesis is proved by running the Flax layer once more as torch has it. If the
input differs, the reason lies between this layer and the earlier ones that agree (``_between``). If nothing is
proved, the likeliest cause is given, marked as not proved.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from torchjax_bridge.exchange import join_path

from .._audit_report import SettingFault
from ..settings import is_compared
from ._between import between, relation
from ._compare import ComparedArrays, compare
from ._evidence import Cause, Evidence, as_cause, not_called, place
from ._masks import flax_masks
from ._record import Call
from ._rerun import Rerun
from ._steps import Step, with_torch_input
from ._values import has_own_forward
from ._wrong_weights import wrong_weights

__all__ = ["find_cause", "has_own_fault"]


def find_cause(step: Step, evidence: Evidence) -> Cause:
    """The likely cause of the first step whose output differs."""
    if step.flax is None:
        return not_called(step)
    inputs = step.inputs(evidence.bounds)
    causes = _inside if inputs is None or inputs.ok else between
    found: list[Cause] = []
    for cause in causes(step, step.flax, inputs, evidence):
        if cause.proved:
            return cause
        found.append(cause)
    return found[0] if found else _unknown(step, step.flax, inputs, evidence)


def has_own_fault(step: Step, evidence: Evidence) -> bool:
    """Whether a layer whose input agrees has wrong weights, a wrong setting or a wrong mode."""
    inputs = step.inputs(evidence.bounds)
    if step.flax is None or (inputs is not None and not inputs.ok):
        return False
    wrong = wrong_weights(step.torch.path, step.flax.path, evidence.moves, evidence.values)
    settings = (cause.proved for cause in _settings(step, step.flax, evidence))
    return any(True for _ in wrong) or any(settings) or any(True for _ in _mode(step, step.flax, evidence))


def _inside(step: Step, call: Call, inputs: ComparedArrays | None, evidence: Evidence) -> Iterator[Cause]:
    call = with_torch_input(call, inputs)
    wrong = list(wrong_weights(step.torch.path, call.path, evidence.moves, evidence.values))
    # If it is known what stands there instead, that is the cause. Weights that merely differ may not be.
    yield from (as_cause(finding, step, "") for finding in wrong if finding.kind != "weights")
    yield from _settings(step, call, evidence)
    yield from _mode(step, call, evidence)
    yield from _overridden_call(step, call, evidence)
    yield from _carry(step, call, evidence)
    yield from _mask(step, call, evidence)
    for finding in wrong:
        proved = _agrees(step, call, {}, evidence, rerun=evidence.rerun_refilled())
        yield replace(as_cause(finding, step, ""), proved=proved)
    if step.output is not None:
        behind = f"behind the last layer of {place(step)} "
        alone = step.torch.path and evidence.moves.get(step.torch.path) and has_own_forward(step.module)
        for cause in relation(step, step.output, evidence, behind, _reader(step, evidence)):
            yield _unless_behind(cause, step) if alone else cause


def _unless_behind(cause: Cause, step: Step) -> Cause:
    """A cause in a layer of the caller's own, not proved: Flax may do the same behind the layer."""
    return replace(
        cause, fix=f"Flax may have it behind {place(step)}; if it has not, {cause.fix}", proved=False
    )


def _reader(step: Step, evidence: Evidence) -> Step | None:
    """The first layer that reads the output of a container."""
    given = step.torch.outputs[0].array
    for other in evidence.steps[evidence.steps.index(step) + 1 :]:
        taken = other.torch.inputs[:1]
        if not list(other.module.children()) and taken and np.array_equal(taken[0].array, given):
            return other
    return None


def _settings(step: Step, call: Call, evidence: Evidence) -> Iterator[Cause]:
    """Settings that differ, one by one and then together; proved by running the Flax layer with torch's."""
    path = join_path(step.torch.path)
    differing = [fault for fault in evidence.settings.faults if fault.torch_path == path]
    mine = [fault for fault in differing if fault.wanted is not None]
    sure = [fault for fault in mine if _agrees(step, call, {fault.setting: fault.wanted}, evidence)]
    for fault in sure:
        yield _setting(step, fault, proved=True)
    together = {fault.setting: fault.wanted for fault in mine}
    if not sure and len(mine) > 1 and _agrees(step, call, together, evidence):
        texts = "; ".join(f"{fault.in_torch} in torch, {fault.in_flax} in Flax" for fault in mine)
        fixes = ", ".join(fault.fix for fault in mine)
        kind = next((fault.setting for fault in mine if fault.effect == "output"), mine[0].setting)
        yield Cause(
            kind, f"{place(step)} has {texts}", f"type {mine[0].flax_layer}(..., {fixes})", proved=True
        )
    for fault in sorted(differing, key=lambda fault: fault.effect != "output"):
        if fault.effect != "rounding":
            yield _setting(step, fault, proved=False)


def _setting(step: Step, fault: SettingFault, *, proved: bool) -> Cause:
    message = f"{place(step)} has {fault.in_torch} in torch and {fault.in_flax} in Flax"
    kind = {"use_running_average": "train mode"}.get(fault.setting, fault.setting)
    return Cause(kind, message, f"type {fault.to_type}", proved)


def _mode(step: Step, call: Call, evidence: Evidence) -> Iterator[Cause]:
    """Statistics of the batch on one side, running ones on the other."""
    module = step.module
    if not isinstance(module, _WITH_STATISTICS):
        return
    running = not module.training and module.track_running_stats
    if _agrees(step, call, {"use_running_average": running}, evidence):
        ours, theirs = ("running", "the batch's") if running else ("the batch's", "running")
        fix = "eval() on the Flax model, or pass use_running_average=True"
        if not running:
            fix = "eval() on the torch module, or train() on the Flax model"
        message = f"{place(step)} uses {ours} statistics in torch, {theirs} in Flax"
        yield Cause("train mode", message, f"call {fix}", proved=True)


_WITH_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _overridden_call(step: Step, call: Call, evidence: Evidence) -> Iterator[Cause]:
    """A subclass of Flax's layer with a ``__call__`` that computes something else."""
    layer = evidence.layers.get(call.path)
    if layer is None or layer.overrides is None:
        return
    proved = _agrees(step, call, {}, evidence, layer.overrides)
    base = f"{layer.flavour}.{layer.overrides.__name__}"
    what = f"and {base}'s own agrees" if proved else f"where {base} has one"
    message = f"{place(step)} is a {layer.name} in Flax, which has a __call__ of its own, {what}"
    fix = (
        f"use {base} itself, or say what {layer.name} computes with a Rule({type(step.module).__name__}, ...)"
    )
    yield Cause("overridden call", message, fix, proved)


def _carry(step: Step, call: Call, evidence: Evidence) -> Iterator[Cause]:
    """The state of an LSTM in torch's order; Flax's carry has the cell state first."""
    if not isinstance(step.module, nn.LSTM | nn.LSTMCell):
        return
    args, kwargs = call.arguments
    for name, carry in (*enumerate(args), *kwargs.items()):
        if isinstance(carry, tuple) and len(carry) == 2:
            turned = tuple(carry[::-1] if number == name else one for number, one in enumerate(args))
            named = {word: carry[::-1] if word == name else one for word, one in kwargs.items()}
            if _agrees(step, replace(call, arguments=(turned, named)), {}, evidence):
                message = f"{place(step)} is given the state (h, c) in Flax, whose carry is (c, h)"
                yield Cause("carry", message, "give it (c, h)", proved=True)


def _mask(step: Step, call: Call, evidence: Evidence) -> Iterator[Cause]:
    """An attention that sees other positions: without a mask, or with an inverted one."""
    if (
        not isinstance(step.module, nn.MultiheadAttention)
        or not call.inputs
        or call.inputs[0].array.ndim != 3
    ):
        return
    batch, length, _ = call.inputs[0].array.shape
    key = step.torch.inputs[1].array if len(step.torch.inputs) > 1 else step.torch.inputs[0].array
    args, kwargs = call.arguments
    given = kwargs.get("mask")
    for mask in flax_masks(
        tuple(value.array for value in step.torch.inputs[3:]),
        batch,
        length,
        key.shape[1 if step.module.batch_first else 0],
    ):
        again = replace(call, arguments=(args, {**kwargs, "mask": mask}))
        if (mask is None and given is None) or not _agrees(step, again, {}, evidence):
            continue
        if mask is None:
            message, fix = "is given a mask in Flax and none in torch", "leave the mask out in Flax"
        elif given is None:
            message, fix = "is given a mask in torch and none in Flax", f"give it {_MASK}"
        else:
            message, fix = "is given another mask in Flax than in torch", f"give it {_MASK}"
        yield Cause("mask", f"{place(step)} {message}", fix, proved=True)
        return


_MASK = "mask=~attn_mask & ~key_padding_mask[:, None, None, :], in which True shows a position"


def _agrees(
    step: Step,
    call: Call,
    settings: Mapping[str, Any],
    evidence: Evidence,
    kind: type | None = None,
    rerun: Rerun | None = None,
) -> bool:
    """Whether the Flax layer gives torch's output when it runs with these settings (and as this class)."""
    again = (rerun or evidence.rerun)(call, settings, kind)
    if again is None:
        return False
    output = compare(step.module, step.flax_outputs, again, evidence.bounds)
    if output is None:
        return False
    was = step.output.gap.relative if step.output is not None else float("inf")
    # An ill-conditioned layer keeps a difference by rounding.
    return output.ok or output.gap.relative <= was / 100


def _unknown(step: Step, call: Call, inputs: ComparedArrays | None, evidence: Evidence) -> Cause:
    if step.output is not None and step.output.ours is None:
        ours, theirs = step.output.shapes
        return Cause("shape", f"{place(step)} gives {ours} in torch and {theirs} in Flax", "", proved=False)
    layer = evidence.layers.get(call.path)
    settings = is_compared(step.module, layer)
    agree = "its input, its weights and its settings agree" if settings else "its input and its weights agree"
    what = agree if inputs is not None else "its weights agree"
    alone = layer is not None and layer.kind == "Module" and next(step.module.children(), None) is None
    where = f", where it is a {layer.name}" if layer is not None and alone else ""
    message = f"{place(step)} computes something else in Flax{where}; {what}"
    return Cause("unknown", message, "", proved=False)
