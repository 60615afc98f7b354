"""Two runs side by side: which call of a torch layer is which call of its Flax twin, and how far they are apart.

The plan says which layers belong together. A layer that is called several times is compared call by call; layers
that are one on the other side (tied, or stacked in a scan) are taken together, in the order of their calls.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import numpy as np
from torch import nn

from torchjax_bridge.exchange import Path

from ._record import Call, Record
from ._values import (
    Gap,
    Value,
    flax_layouts,
    gap,
    has_one_layout,
    nearest_layout,
    same_values,
    tolerance,
    without_causal_tail,
)

__all__ = [
    "Bounds",
    "ComparedArrays",
    "FeatureOrders",
    "Step",
    "align",
    "channels_last",
    "compare",
    "pair_arrays",
    "with_torch_input",
]


@dataclass(frozen=True)
class Bounds:
    """What is taken for rounding: ``atol``, or ``rtol`` of the largest value, or what the dtype explains."""

    atol: float | None = None
    rtol: float | None = None

    def allow(self, found: Gap, *dtypes: str) -> bool:
        """Whether a difference is within the bounds."""
        rtol = self.rtol
        if rtol is None:
            rtol = tolerance(*dtypes) if self.atol is None else 0.0
        return found.difference <= (self.atol or 0.0) or found.relative <= rtol


@dataclass(frozen=True, eq=False)
class ComparedArrays:
    """The outputs (or the inputs) of two layers.

    Attributes:
        ours: torch's array, as it lies in Flax; None where no layout makes the two alike.
        theirs: Flax's array.
        gap: How far they are apart.
        ok: Whether that is within the bounds.
        shapes: Both shapes.
    """

    ours: np.ndarray | None
    theirs: np.ndarray
    gap: Gap
    ok: bool
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Step:
    """One call of a pair of layers.

    Attributes:
        torch: The call in torch.
        flax: The call in Flax, or None where there is none.
        module: The torch layer.
        number: Which call of the layer it is, from 0.
        output: The outputs, compared.
        counts: How often the pair was called on each side.
        features: The ``(C, *space)`` whose flattening feeds the layer, channels first in torch and last in Flax.
        gives: The ``(C, *space)`` in whose order its output is, likewise.
    """

    torch: Call
    flax: Call | None
    module: nn.Module
    number: int
    output: ComparedArrays | None
    counts: tuple[int, int]
    features: tuple[int, ...] | None = None
    gives: tuple[int, ...] | None = None

    @property
    def flax_inputs(self) -> tuple[Value, ...]:
        """Torch's inputs, as the Flax layer is to be given them."""
        return _in_flax_order(self.torch.inputs, self.features)

    @property
    def flax_outputs(self) -> tuple[Value, ...]:
        """Torch's outputs, as the Flax layer is to give them."""
        return _in_flax_order(self.torch.outputs, self.gives)

    def inputs(self, bounds: Bounds) -> ComparedArrays | None:
        """The inputs, compared; None where there is nothing to compare."""
        if self.flax is None:
            return None
        return compare(self.module, self.flax_inputs, self.flax.inputs, bounds)


def with_torch_input(call: Call, inputs: ComparedArrays | None) -> Call:
    """The call with torch's input in the place of Flax's, which equals it but for what a layer may make much of."""
    if inputs is None or inputs.ours is None or inputs.ours.shape != inputs.theirs.shape:
        return call
    ours, theirs = inputs.ours, inputs.theirs

    def turned(leaf: Any) -> Any:
        return ours if isinstance(leaf, np.ndarray) and np.array_equal(leaf, theirs) else leaf

    return replace(call, arguments=jax.tree.map(turned, call.arguments))


def _in_flax_order(values: tuple[Value, ...], features: tuple[int, ...] | None) -> tuple[Value, ...]:
    if features is None or len(values) != 1:
        return values
    return (replace(values[0], array=channels_last(values[0].array, features)),)


def channels_last(array: np.ndarray, features: tuple[int, ...]) -> np.ndarray:
    """A flattened ``(C, *space)`` on the last axis, as a flattened ``(*space, C)``."""
    apart = array.reshape(*array.shape[:-1], features[0], -1)
    return apart.swapaxes(-1, -2).reshape(array.shape)


def compare(
    module: nn.Module, ours: Sequence[Value], theirs: Sequence[Value], bounds: Bounds, *, whole: bool = False
) -> ComparedArrays | None:
    """Compare what two layers took or gave: array by array, or torch's first with the one that it fits.

    Args:
        module: The torch layer.
        ours: What torch's took or gave.
        theirs: What Flax's did.
        bounds: What is taken for rounding.
        whole: Whether they are the outputs of the models, which must have the same axes.
    """
    if not ours or not theirs:
        return None
    both = None if isinstance(module, _SEQUENCES) else pair_arrays(ours, theirs)
    if both is not None:
        pairs = [_compare_pair(module, one, other, bounds, whole=whole) for one, other in both]
        bad = [pair for pair in pairs if not pair.ok]
        return bad[0] if bad else max(pairs, key=lambda pair: pair.gap.relative)
    tried = [_compare_pair(module, ours[0], other, bounds, whole=whole) for other in theirs]
    return min(tried, key=lambda pair: pair.gap.difference)


def pair_arrays(
    ours: Sequence[Value], theirs: Sequence[Value], depth: int = 0
) -> list[tuple[Value, Value]] | None:
    """Which array of Flax's is which of torch's: by name where both have names, else in order.

    None where there are no names in common, and not as many arrays on both sides.
    """
    one, other = _by_key(ours, depth), _by_key(theirs, depth)
    common = [key for key in one if key in other]
    named = all(isinstance(key, str) for key in (*one, *other))
    if common and (named or one.keys() == other.keys()) and None not in common:
        pairs: list[tuple[Value, Value]] = []
        for key in common:
            inner = pair_arrays(one[key], other[key], depth + 1)
            if inner is None and not named:
                break
            pairs += inner or zip(one[key], other[key], strict=False)
        else:
            rest, others = ([v for v in all_ if _key(v, depth) not in common] for all_ in (ours, theirs))
            return pairs + (list(zip(rest, others, strict=True)) if len(rest) == len(others) else [])
    return list(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else None


def _by_key(values: Sequence[Value], depth: int) -> dict[str | int | None, list[Value]]:
    found: dict[str | int | None, list[Value]] = {}
    for value in values:
        found.setdefault(_key(value, depth), []).append(value)
    return found


def _key(value: Value, depth: int) -> str | int | None:
    return value.path[depth] if len(value.path) > depth else None


# What these return beside their first output (states, attention weights), Flax's return elsewhere or not at all.
_SEQUENCES = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def _compare_pair(
    module: nn.Module, one: Value, other: Value, bounds: Bounds, *, whole: bool
) -> ComparedArrays:
    ways = flax_layouts(without_causal_tail(one.array, module, other.array.shape), module, other.array.shape)
    if has_one_layout(module):
        ways = ways[:1]
    found = nearest_layout(ways, other.array)
    shapes = (one.array.shape, other.array.shape)
    if found is None:
        for way, theirs in same_values(one.array, other.array, whole=whole):
            apart = gap(way, theirs)
            if bounds.allow(apart, one.dtype, other.dtype):
                return ComparedArrays(way, theirs, apart, True, shapes)
        return ComparedArrays(None, other.array, Gap(float("inf"), float("inf")), False, shapes)
    way, apart = found
    return ComparedArrays(way, other.array, apart, bounds.allow(apart, one.dtype, other.dtype), shapes)


@dataclass(frozen=True)
class FeatureOrders:
    """Where features are in the order of a flattened ``(C, *space)`` in torch, and of ``(*space, C)`` in Flax.

    Attributes:
        takes: For a torch path: the shape whose flattening feeds the layer.
        gives: For a torch path: the shape in whose order its output is.
    """

    takes: Mapping[Path, tuple[int, ...]]
    gives: Mapping[Path, tuple[int, ...]]

    def output_orders(self, call: Call) -> list[tuple[int, ...] | None]:
        """The orders in which the output of a call may be: for a container, those of its layers and readers."""
        if call.path in self.gives:
            return [self.gives[call.path]]
        inside = {shape for path, shape in self.gives.items() if path[: len(call.path)] == call.path}
        if next(call.module.children(), None) is not None:
            inside |= {*self.takes.values()}  # what ends in a flatten, which a layer behind it reads
        fits = {shape for shape in inside if call.path and call.outputs}
        return [None, *sorted(s for s in fits if call.outputs[0].array.shape[-1:] == (prod(s),))]


# --- which call is which -------------------------------------------------------------------------------


def align(
    layers: Sequence[tuple[Path, Path]],
    modules: Mapping[Path, nn.Module],
    names: Mapping[Path, Path],
    orders: FeatureOrders,
    ours: Record,
    theirs: Record,
    bounds: Bounds,
) -> list[Step]:
    """The steps of two runs, in the order in which torch's calls ended.

    Args:
        layers: The pairs of the plan.
        modules: The torch modules by path.
        names: For a path of a Flax module that has several: the one under which its calls were recorded.
        orders: In which order features are in Flax.
        ours: The run in torch.
        theirs: The run in Flax.
        bounds: What is taken for rounding.
    """
    order = {id(call): place for place, call in enumerate(ours.calls)}
    by_module: dict[nn.Module, list[Call]] = {}
    by_path: dict[Path, list[Call]] = {}
    for call in ours.calls:
        by_module.setdefault(call.module, []).append(call)
    for place, call in enumerate(theirs.calls):
        order[id(call)] = place
        by_path.setdefault(call.path, []).append(call)
    steps: list[Step] = []
    for torch_side, flax_side in _groups(layers, modules, names):
        first = [call for module in torch_side for call in by_module.get(module, ())]
        other = [call for path in flax_side for call in by_path.get(path, ())]
        first.sort(key=lambda call: order[id(call)])
        other.sort(key=lambda call: order[id(call)])
        if first and isinstance(first[0].module, nn.RNNBase) and len(other) > len(first):
            other = list(_join_time_steps(first, other))
        counts = (len(first), len(other))
        for number, call in enumerate(first):
            twin = other[number] if number < len(other) else None
            features, ways = orders.takes.get(call.path), orders.output_orders(call)
            tried = [
                Step(call, twin, call.module, number, _output(call, twin, way, bounds), counts, features, way)
                for way in ways
            ]
            steps.append(next((step for step in tried if step.output and step.output.ok), tried[0]))
    return sorted(steps, key=lambda step: order[id(step.torch)])


def _output(
    call: Call, twin: Call | None, order: tuple[int, ...] | None, bounds: Bounds
) -> ComparedArrays | None:
    if twin is None:
        return None
    return compare(
        call.module, _in_flax_order(call.outputs, order), twin.outputs, bounds, whole=not call.path
    )


_Group = tuple[dict[nn.Module, None], dict[Path, None]]


def _groups(
    layers: Sequence[tuple[Path, Path]], modules: Mapping[Path, nn.Module], names: Mapping[Path, Path]
) -> list[_Group]:
    """Pairs that share a module on either side, taken together."""
    groups: dict[int, _Group] = {}
    owner: dict[nn.Module | Path, _Group] = {}
    for torch_path, flax_path in layers:
        if torch_path not in modules:
            continue
        module, path = modules[torch_path], names.get(flax_path, flax_path)
        group: _Group = ({}, {})
        for known in (owner.get(module), owner.get(path)):
            if known is not None and known is not group:
                group[0].update(known[0])
                group[1].update(known[1])
                groups.pop(id(known), None)
        group[0][module] = None
        group[1][path] = None
        groups[id(group)] = group
        owner.update(dict.fromkeys((*group[0], *group[1]), group))
    return list(groups.values())


def _join_time_steps(first: Sequence[Call], steps: Sequence[Call]) -> Iterator[Call]:
    """The calls of a cell as calls of its layer: a linen cell is recorded step by step."""
    length, rest = divmod(len(steps), len(first))
    for number, call in enumerate(first):
        part = steps[number * length : (number + 1) * length]
        if rest or not call.outputs or any(not step.outputs for step in part):
            return
        axis = 1 if call.module.batch_first else 0
        outputs = np.stack([step.outputs[-1].array for step in part], axis)
        yield Call(part[0].path, (), (Value(outputs, part[0].outputs[-1].dtype),))
