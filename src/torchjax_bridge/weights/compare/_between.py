"""What the models do between layers that agree and a layer whose input differs.

Flax code calls activations, poolings and flattenings in a ``__call__``, where nothing shows them. They are
found by what they did to the recorded arrays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import nn

from torchjax_bridge.exchange import join_path

from ._attention import attention_difference
from ._compare import ComparedArrays, compare
from ._evidence import Cause, Evidence, as_cause, not_called, place
from ._formula_probes import differing_formulas
from ._pooling import is_pooling, other_poolings, unstrided_poolings
from ._probes import ACTIVATIONS, NamedArray, apply_torch, run_probes
from ._record import MODEL_ERRORS, Call
from ._steps import Step, channels_last
from ._values import flax_layouts, values_in

__all__ = ["between", "relation"]


def between(step: Step, call: Call, inputs: ComparedArrays | None, evidence: Evidence) -> Iterator[Cause]:
    """Causes of the differing input of a step, the likeliest first."""
    if inputs is None:
        return
    before = evidence.agreeing(step)
    where = f"between {place(before[0])} and {place(step)} " if before else f"in front of {place(step)} "
    yield from _swapped_calls(step, inputs, evidence)
    yield from _flattened_channels_first(step, call, evidence)
    if inputs.ours is None:
        yield from _without_strides(step, inputs, evidence, where)
        ours, theirs = inputs.shapes
        yield Cause("shape", f"{where}torch has {ours}, Flax {theirs}", "", proved=False)
        return
    yield from _unflattened(inputs, before, where, evidence)
    yield from _pooling(step, inputs, evidence, where)
    yield from relation(step, inputs, evidence, where)
    for other in evidence.steps[: evidence.steps.index(step)]:
        if other.flax is None and not _may_be_split(other.module):
            yield replace(not_called(other), proved=False)
    yield from _call_order(step, call, evidence)
    alone = [s.torch for s in evidence.steps[: evidence.steps.index(step)] if s.flax is None]
    between = [*(call for call in alone if isinstance(call.module, nn.RNNBase)), *_unpaired(step, evidence)]
    names = ", ".join(f"'{join_path(c.path)}' ({type(c.module).__name__})" for c in between)
    ran = f"; between them torch runs {names}" if names else ""
    yield Cause("unknown", f"{where}the two models compute different things{ran}", "", proved=False)


def _call_order(step: Step, call: Call, evidence: Evidence) -> Iterator[Cause]:
    """A sibling that runs before this layer on one side and after it on the other, often a norm."""
    theirs = {id(one): place for place, one in enumerate(evidence.flax.calls)}
    here, there = evidence.steps.index(step), theirs.get(id(call))
    for number, other in enumerate(evidence.steps):
        if other.torch.path[:-1] != step.torch.path[:-1] or other.torch.path == step.torch.path:
            continue
        place_there = theirs.get(id(other.flax))
        if place_there is None or there is None or other.number != step.number:
            continue
        if (number < here) != (place_there < there):
            how, turned = ("before", "after") if number < here else ("after", "before")
            message = f"torch runs {place(other)} {how} {place(step)}, and Flax {turned} it"
            yield Cause("call order", message, "call them in torch's order", proved=False)


def _may_be_split(module: nn.Module) -> bool:
    """Whether a torch module may be several modules in Flax, so that none is called in its place."""
    return isinstance(module, nn.RNNBase) or next(module.children(), None) is not None


def _flattened_channels_first(step: Step, call: Call, evidence: Evidence) -> Iterator[Cause]:
    """Features that Flax flattens channels first, though the kernel was converted for channels last."""
    plain = compare(step.module, step.torch.inputs, call.inputs, evidence.bounds)
    if step.features is not None and plain is not None and plain.ok:
        path = join_path(step.torch.path)
        message = (
            f"in front of {place(step)} Flax flattens {step.features} channels first, as torch does, and "
            f'Flatten("{path}", {step.features}) laid its kernel out for channels last'
        )
        fix = f'convert with rules=[Flatten("{path}", None)], or leave the channels last when flattening'
        yield Cause("flatten order", message, fix, proved=True)


def _unflattened(
    inputs: ComparedArrays, before: list[Step], where: str, evidence: Evidence
) -> Iterator[Cause]:
    """A vector that torch unflattens to ``(C, *space)`` and Flax to ``(*space, C)``, or the reverse."""
    ours, theirs = inputs.ours, inputs.theirs
    linear = next((other for other in before if isinstance(other.module, nn.Linear)), None)
    if ours is None or linear is None or ours.ndim < 3 or ours.shape != theirs.shape:
        return
    path, shape = join_path(linear.torch.path), (ours.shape[-1], *ours.shape[1:-1])
    if linear.gives is None and evidence.close(_channels_first(ours), theirs.reshape(len(theirs), -1)):
        yield Cause(
            "flatten order",
            f"{where}torch views features as {shape}, channels first, and Flax views the same ones channels last",
            f'convert with rules=[Flatten("{path}", {shape}, output=True)], or view them as {shape} in Flax and '
            "then move the channels to the end",
            proved=True,
        )
    if linear.gives is not None and evidence.close(ours.reshape(len(ours), -1), _channels_first(theirs)):
        yield Cause(
            "flatten order",
            f"{where}Flax views features as {shape}, as torch does, and "
            f'Flatten("{path}", {linear.gives}, output=True) laid them out for channels last',
            f'convert with rules=[Flatten("{path}", None, output=True)], or view them channels last in Flax',
            proved=True,
        )


def _channels_first(array: np.ndarray) -> np.ndarray:
    """The vector that torch would unflatten to this channels-last map."""
    return np.moveaxis(array, -1, 1).reshape(len(array), -1)


def _maps(step: Step, evidence: Evidence) -> list[tuple[int, ...]]:
    """The shapes ``(C, *space)`` of torch's maps before a step, the latest first."""
    shapes: list[tuple[int, ...]] = []
    for call in evidence.torch.calls:
        if call is step.torch:
            break
        shapes += [value.array.shape[1:] for value in call.outputs if value.array.ndim > 2]
    return shapes[::-1]


def _last_agreeing(step: Step, compared: ComparedArrays, evidence: Evidence) -> Iterator[NamedArray]:
    """The output of the last layer that agrees; torch may pool and flatten it to the input of this step."""
    for other in evidence.agreeing(step)[:1]:
        for value in other.torch.outputs[:1]:
            modules = [one.module for one in _unpaired(step, evidence) if is_pooling(one.module)]

            def reach(array: np.ndarray, modules: Sequence[nn.Module] = tuple(modules)) -> np.ndarray | None:
                return _as_flax_input(array, step, compared.theirs.shape, modules)

            yield NamedArray(f"the output of '{join_path(other.torch.path)}'", value.array, reach)


def _as_flax_input(
    array: np.ndarray, step: Step, shape: tuple[int, ...], modules: Sequence[nn.Module] = ()
) -> np.ndarray | None:
    """A torch array, pooled and flattened as torch does it, in the layout of a Flax layer's input."""
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
    return next(iter(flax_layouts(array, step.module, shape)), None)


def _earlier_arrays(step: Step, evidence: Evidence) -> Iterator[NamedArray]:
    """The outputs and inputs of earlier layers on which both sides agree, the latest first."""
    for other in evidence.agreeing(step)[:_LOOK_BACK]:
        name = join_path(other.torch.path)
        for what, compared in (("output", other.output), ("input", other.inputs(evidence.bounds))):
            if compared is not None and compared.ok and compared.ours is not None:
                yield NamedArray(f"the {what} of '{name}'", compared.ours)


def _own_parameters(evidence: Evidence) -> list[NamedArray]:
    """The parameters and buffers that modules of the caller's own classes hold themselves."""
    found = []
    for step in evidence.steps:
        for name, tensor in (
            *step.module.named_parameters(recurse=False),
            *step.module.named_buffers(recurse=False),
        ):
            if not type(step.module).__module__.startswith("torch."):
                path = join_path((*step.torch.path, name))
                found += [NamedArray(f"its '{path}'", value.array) for value in values_in(tensor)]
    return found


# How many layers are looked back: farther connections are rare, and each costs a pass over every activation.
_LOOK_BACK = 12


def _swapped_calls(step: Step, inputs: ComparedArrays, evidence: Evidence) -> Iterator[Cause]:
    """Flax gives this layer's input to another layer of the same kind."""
    for other in evidence.steps:
        if other is step or other.flax is None or type(other.module) is not type(step.module):
            continue
        theirs = compare(step.module, step.flax_inputs, other.flax.inputs, evidence.bounds)
        own = other.inputs(evidence.bounds)
        if theirs is not None and theirs.ok and own is not None and not own.ok:
            name = join_path(other.flax.path)
            message = f"Flax gives to '{name}' what torch gives to {place(step)}"
            yield Cause("swapped siblings", message, "call the two in torch's order", proved=True)


def _unpaired(step: Step, evidence: Evidence) -> list[Call]:
    """The unpaired torch layers (without weights) that ran between the previous paired layer and this step."""
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


def _pooling(step: Step, inputs: ComparedArrays, evidence: Evidence, where: str) -> Iterator[Cause]:
    """A torch pooling with another padding in Flax."""
    for call in _unpaired(step, evidence):
        for text, fix, result in other_poolings(call.module, call.inputs):
            arrived = _as_flax_input(result, step, inputs.theirs.shape)
            if arrived is not None and evidence.close(arrived, inputs.theirs):
                name = f"'{join_path(call.path)}' ({type(call.module).__name__})"
                yield Cause("pooling", f"{where}{text} where torch runs {name}", fix, proved=True)


_IMPROVEMENT = (
    4  # what explains a difference leaves less of it, also where rounding would have explained as much
)


def _without_strides(step: Step, inputs: ComparedArrays, evidence: Evidence, where: str) -> Iterator[Cause]:
    """A pooling without strides: Flax then pools at every position."""
    for known, name in product(
        _earlier_arrays(step, evidence), ("", "relu", "silu", "gelu(approximate=False)")
    ):
        if known.array.ndim != 4 or known.array.dtype.kind != "f":
            continue
        array = apply_torch(ACTIVATIONS[name], known.array) if name else known.array
        for size, pooled in unstrided_poolings(array, inputs.theirs.shape):
            if evidence.close(pooled, inputs.theirs):
                message = f"{where}Flax pools by windows of {size} with strides of 1, which is Flax's default"
                yield Cause("pooling", message, f"pool with strides=({size}, {size})", proved=True)
                return


def relation(
    step: Step, compared: ComparedArrays, evidence: Evidence, where: str, reader: Step | None = None
) -> Iterator[Cause]:
    """A relation between torch's array and Flax's, found by computing; the fix is for ``reader``, or the step."""
    if compared.ours is None:
        return
    known = [*_earlier_arrays(step, evidence), *_last_agreeing(step, compared, evidence)]
    was = compared.gap.difference

    def close(one: np.ndarray, other: np.ndarray) -> bool:
        return evidence.close(one, other, was / _IMPROVEMENT)

    finding = run_probes(compared.ours, compared.theirs, known, _maps(step, evidence), close)
    if finding is None or finding.kind == "order":  # "order" says little
        with np.errstate(all="ignore"):  # formulas that neither model computes may overflow
            finding = (
                differing_formulas(compared.ours, compared.theirs, known, _own_parameters(evidence), close)
                or attention_difference(compared.ours, compared.theirs, known, close)
                or finding
            )
    if finding is not None:
        yield as_cause(finding, reader or step, where)
