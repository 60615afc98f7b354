"""What a recording shows of feature orders: which layers read flattened maps, and which give what becomes a map.

Follows the axes of all tensors through a `Recording`: ``_functions`` knows what functions do to them, this file
what layers do. All that a layer reads or gives is said of the axes of its parameters, the same at every call.

It takes the Flax model to keep its maps with the channels last, and to flatten, view and permute them where torch
does. Whether it moves the channels to the front first, no recording of torch's can show.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.recording import (
    Constant,
    Frame,
    Node,
    Parameter,
    Recording,
    Value,
    layer_class,
    map_tensors,
    record,
    restored_random_states,
    tensors_of,
)

from ._axes import Atom, Axes, Axis, Order, order_of, size_of, spoil, unify, unknown
from ._functions import apply, broadcast, contract, convolve, mark_map

__all__ = ["Recorded", "record_orders"]


class Recorded(NamedTuple):
    """What runs of a module show, each by the id of a module.

    Attributes:
        reads: The order of the features that a layer reads; for an attention or a Bilinear, of those that matter.
        gives: The order of the features that a Linear gives.
        calls: When a module was called first.
    """

    reads: dict[int, Order]
    gives: dict[int, Order]
    calls: dict[int, int]


def record_orders(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Recorded:
    """Run a copy of a module on inputs: without values if it needs none, in evaluation mode, then in training mode.

    The second run is for layers that the first does not call.

    Raises:
        ArgumentError: The module fails on these inputs.
    """
    found = Recorded({}, {}, {})
    for training in (False, True):
        with restored_random_states():
            run = _run(module, args, kwargs, training)
        if run is not None:
            _Flow(run).tell(module, found)
        if all(id(one) in found.calls for one in module.modules() if one._parameters):
            break
    return found


def _run(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], training: bool
) -> Recording | None:
    with suppress(ArgumentError, RuntimeError, TypeError):
        memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), False) for p in module.parameters()}
        memo |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
        abstract = map_tensors((tuple(args), dict(kwargs)), lambda tensor: tensor.to("meta"))
        return record(deepcopy(module, memo), *abstract, training=training)
    return None if training else record(module, args, kwargs)


class _Flow:
    """The axes of every value of a recording."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._axes: dict[Value, Axes] = {}
        self._owned: dict[tuple[int, str], Axes] = {}
        self._calls: dict[int, int] = {id(recording.module): 0}
        self._faulty = {fault.path for fault in recording.faults}
        for _, tree in recording.top.inputs:
            for value in tensors_of(tree):
                images = len(value.shape) > 3 and value.dtype is not None and value.dtype.is_floating_point
                self._axes[value] = tuple(
                    (Atom(size, guess=("channel" if at == 1 else "space") if images and at else None),)
                    for at, size in enumerate(value.shape)
                )
        self._run(recording.top)

    def _take(self, value: Value) -> Axes:
        if value not in self._axes:
            origin = value.origin
            if isinstance(origin, Parameter):
                return self._parameter(origin.owner, origin.name, value.shape)
            lost = isinstance(origin, Constant) and origin.tensor is None
            self._axes[value] = tuple((Atom(size, broken=lost),) for size in value.shape)
        return self._axes[value]

    def _parameter(self, owner: nn.Module, name: str, shape: Sequence[int]) -> Axes:
        """The axes of a parameter, the same wherever it is read; one that is computed is its layer's."""
        key = _key(owner, name)
        if key not in self._owned:
            gives = isinstance(owner, nn.Linear | nn.Bilinear) and name in ("weight", "bias")
            self._owned[key] = tuple(
                (Atom(size, guess="feature" if gives and not at else None),) for at, size in enumerate(shape)
            )
        return self._owned[key]

    # --- running ------------------------------------------------------------------------------------------

    def _run(self, frame: Frame) -> None:
        for node in frame.nodes:
            # A module may return sizes, which have no axes.
            results = [value for value in tensors_of(node.result) if value.dtype is not None]
            given = [self._take(value) for value in tensors_of((node.args, node.kwargs))]
            found: list[Axes] = []
            if frame.path in self._faulty:
                pass
            elif node.module is None:
                with suppress(IndexError, KeyError, TypeError, ValueError, RuntimeError):  # unusual arguments
                    found = apply(node, self._take)
            else:
                self._calls.setdefault(id(node.module), len(self._calls))
                found = self._layer(node, given, results)
            if [tuple(map(size_of, axes)) for axes in found] != [tuple(value.shape) for value in results]:
                spoil([axis for axes in given for axis in axes], leaked=True)
                found = [unknown(value.shape) for value in results]
            self._axes |= dict(zip(results, found, strict=True))

    def _inside(self, node: Node, given: Sequence[Axes]) -> list[Axes]:
        """The axes that a module gives by what its forward does."""
        frame = node.frame
        inside = (
            [value for _, tree in frame.inputs for value in tensors_of(tree)] if frame is not None else []
        )
        if frame is None or len(inside) != len(given):
            return []
        self._axes |= dict(zip(inside, given, strict=True))
        self._run(frame)
        return [self._take(value) for value in tensors_of(frame.result) if value.dtype is not None]

    def _layer(self, node: Node, given: Sequence[Axes], results: Sequence[Value]) -> list[Axes]:
        module: Any = node.module
        kind = layer_class(module)
        # What computes a weight is no matter.
        kept = kind is not None and type(module).forward is kind.forward and is_parametrized(module)
        if not (node.frame is None or kept) or not given or not results or 0 in results[0].shape:
            return self._inside(node, given)
        x, shape = given[0], results[0].shape
        match module:
            case nn.modules.conv._ConvNd():
                return [convolve(x, shape, len(module.kernel_size))]
            case nn.Linear():
                weight = self._parameter(module, "weight", (module.out_features, module.in_features))
                return [contract("...i,oi->...o", [x, weight], shape)]
            case nn.Embedding():
                return [(*x, _features(shape[-1]))]
            case nn.LayerNorm() | nn.RMSNorm():
                weight = self._parameter(module, "weight", module.normalized_shape)
                return [broadcast([x, weight], shape)]
            case nn.MultiheadAttention() | nn.RNNBase() | nn.RNNCellBase():
                reads = given[:3] if isinstance(module, nn.MultiheadAttention) else given[:1]
                for place, axes in enumerate(reads):
                    unify(axes[-1], self._parameter(module, f"read {place}", (size_of(axes[-1]),))[0])
                others = [tuple((Atom(n),) for n in value.shape[:-1]) for value in results[1:]]
                sizes = [value.shape[-1] for value in results]
                return [(*axes, _features(n)) for axes, n in zip((x[:-1], *others), sizes, strict=True)]
            case _ if isinstance(module, _NORMS):
                mark_map(x)
                if getattr(module, "num_parameters", 2) > 1 and len(x) > 1:
                    unify(x[1], self._parameter(module, "weight", shape[1:2])[0])
        return [x]  # also of a dropout

    # --- telling ------------------------------------------------------------------------------------------

    def tell(self, module: nn.Module, found: Recorded) -> None:
        """Add what is known of each layer, by the id of the module that was copied."""
        copies = self._recording.modules
        for path, one in module.named_modules(remove_duplicate=False):
            copy = copies.get(path)
            if copy is None or id(one) in found.calls:
                continue
            if id(copy) in self._calls:
                found.calls[id(one)] = self._calls[id(copy)]
            orders = [order_of(axis) for axis in self._read_axes(copy)]
            if orders:
                found.reads[id(one)] = next((order for order in orders if order.kind != "plain"), orders[0])
            weight = self._owned.get(_key(copy, "weight"))
            if isinstance(copy, nn.Linear) and weight is not None:
                found.gives[id(one)] = order_of(weight[0])

    def _read_axes(self, module: nn.Module) -> list[Axis]:
        """The axes of what a layer reads, where the order matters to it."""
        weight = self._owned.get(_key(module, "weight"), ())
        if isinstance(module, nn.Linear | nn.Bilinear):
            return [*weight[1:]]
        if isinstance(module, (*_NORMS, nn.LayerNorm, nn.RMSNorm)):
            return [*weight]
        return [axis for place in range(3) for axis in self._owned.get(_key(module, f"read {place}"), ())]


def _key(owner: nn.Module, name: str) -> tuple[int, str]:
    tensor = owner._parameters.get(name)
    return (id(owner), name) if tensor is None else (id(tensor), "")


_NORMS = (
    nn.GroupNorm, nn.PReLU, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d,
    nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


def _features(size: int) -> Axis:
    return (Atom(size, guess="feature"),)
