"""Two runs, aligned: which call of a torch layer is which call of its Flax twin.

The plan says which layers belong together. A layer that is called several times is compared call by call.
Layers that are one layer on the other side (tied, or stacked in a scan) are taken together, in the order of
their calls.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import numpy as np
from torch import nn

from torchjax_bridge.exchange import Path

from ._compare import Bounds, ComparedArrays, compare
from ._record import Call, Record
from ._values import Value

__all__ = ["FeatureOrders", "Step", "align", "channels_last", "with_torch_input"]


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
        features: The ``(C, *space)`` map whose flattened features feed the layer: channels last in Flax.
        gives: The ``(C, *space)`` map that is made of its output, likewise.
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
        """Torch's inputs, with flattened features in Flax's order."""
        return _in_flax_order(self.torch.inputs, self.features)

    @property
    def flax_outputs(self) -> tuple[Value, ...]:
        """Torch's outputs, with flattened features in Flax's order."""
        return _in_flax_order(self.torch.outputs, self.gives)

    def inputs(self, bounds: Bounds) -> ComparedArrays | None:
        """The inputs, compared; None where there is nothing to compare."""
        if self.flax is None:
            return None
        return compare(self.module, self.flax_inputs, self.flax.inputs, bounds)


def with_torch_input(call: Call, inputs: ComparedArrays | None) -> Call:
    """The call with torch's input instead of Flax's: they differ by rounding, which the layer may magnify."""
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


@dataclass(frozen=True)
class FeatureOrders:
    """Where features are flattened from ``(C, *space)`` in torch, and from ``(*space, C)`` in Flax.

    Attributes:
        takes: By torch path: the shape of the map that is flattened to feed the layer.
        gives: By torch path: the shape of the map that is made of its output.
    """

    takes: Mapping[Path, tuple[int, ...]]
    gives: Mapping[Path, tuple[int, ...]]

    def output_orders(self, call: Call) -> list[tuple[int, ...] | None]:
        """The orders that the output of a call may have; a container may have those of its layers and readers."""
        if call.path in self.gives:
            return [self.gives[call.path]]
        inside = {shape for path, shape in self.gives.items() if path[: len(call.path)] == call.path}
        if next(call.module.children(), None) is not None:
            inside |= {*self.takes.values()}  # it may end in a flatten that a later layer reads
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
        names: For each path of a Flax module with several paths: the one under which its calls were recorded.
        orders: The feature orders in Flax.
        ours: The run in torch.
        theirs: The run in Flax.
        bounds: What passes for rounding.
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
    """The pairs, grouped where they share a module on either side."""
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
    """The calls of a cell, joined to calls of its layer: a linen cell is recorded at every time step."""
    length, rest = divmod(len(steps), len(first))
    for number, call in enumerate(first):
        part = steps[number * length : (number + 1) * length]
        if rest or not call.outputs or any(not step.outputs for step in part):
            return
        axis = 1 if call.module.batch_first else 0
        outputs = np.stack([step.outputs[-1].array for step in part], axis)
        yield Call(part[0].path, (), (Value(outputs, part[0].outputs[-1].dtype),))
