"""Finds where a feature map is flattened, or a vector viewed as a map: torch and Flax do it in different orders.

Arrays do not show the order. A run of the torch model does (`Recorded`); without one the plan asks the caller, who
passes ``inputs=`` or answers with `Flatten`. It asks about each layer of a model with feature maps if nothing else
explains its input width, and in a live model, which a run could answer for, also where a flattened map could be as
wide; and likewise about each Linear whose output may become a map.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from torch import nn

from .._report import Fault
from ..pairing import Move
from ..rules import Flatten
from ..trees import TorchNode, TorchTree
from ._axes import Order
from ._faults import (
    fixed_order_fault,
    flattened_input_fault,
    input_order_fault,
    mixed_order_fault,
    viewed_output_fault,
    wrong_order_faults,
)
from ._recorded import Recorded
from ._widths import COMPUTED, CONVOLUTIONS, PER_FEATURE, Reader, Widths, has_an_order, read_widths

__all__ = ["COMPUTED", "ask_about_maps", "can_be_flattened", "knows_one_order", "output_order"]

# Layers whose weights no `Flatten` can lay out.
_FIXED = (nn.GroupNorm, nn.MultiheadAttention, nn.Bilinear)


def can_be_flattened(node: TorchNode, rule: Flatten) -> bool:
    """Whether a `Flatten` can apply to this layer. Judges by its tensors where its class is not known."""
    output = rule.output
    if knows_one_order(node):
        return rule.features is None and not output
    if node.kind is not None and node.kind.__module__.startswith("torch.nn."):
        flat = not issubclass(node.kind, PER_FEATURE) or all(
            leaf.meta.ndim < 2 for leaf in node.leaves.values()
        )
        return flat and issubclass(node.kind, nn.Linear if output else _TAKES_FEATURES)
    shapes = {
        name.removeprefix(f"{COMPUTED}."): leaf.meta.ndim for name, leaf in (node.flat() | node.moved).items()
    }
    matrix = any(ndim == 2 and name.startswith("weight") for name, ndim in shapes.items())
    return matrix or (not output and set(shapes.values()) <= {0, 1})


_TAKES_FEATURES = (nn.Linear, nn.RNNBase, nn.RNNCellBase, *PER_FEATURE)


def knows_one_order(node: TorchNode) -> bool:
    """Whether a layer takes features in torch's order only, so that ``Flatten(..., None)`` alone applies."""
    return node.kind is not None and issubclass(node.kind, _FIXED)


def output_order(node: TorchNode) -> tuple[int, ...] | None:
    """The ``(C, H, W)`` whose order a layer's output has, if the caller declared one."""
    if node.kind is not None and issubclass(node.kind, PER_FEATURE):
        return node.features  # its output has the order of its input
    return node.output


def ask_about_maps(
    tree: TorchTree, moves: Sequence[Move], recorded: Recorded | None
) -> tuple[list[Fault], list[tuple[str, str]]]:
    """A fault for each missing `Flatten`, and the assumptions as pairs: the layer, and the text."""
    nodes = list(tree.root.walk())
    reads, gives, _ = recorded or Recorded({}, {}, {})
    maps = any(move.rule in CONVOLUTIONS for move in moves) or any(_is_of_maps(node.kind) for node in nodes)
    told = any("features" in node.told for node in nodes)
    lost = any(id(node.module) in reads and "features" not in node.told for node in nodes)
    loose = [] if maps or (told and not lost) else [node for node in nodes if _flattens(node.module)]
    assumed = [(node.where, _ASSUMED) for node in loose]
    if not (maps or lost or any(node.told for node in nodes)):
        return [], assumed  # a language model, for example: its many tensors need no look
    widths = read_widths(tree, moves)
    faults = [
        fault for reader in widths.readers for fault in wrong_order_faults(reader.node, widths.channels)
    ]
    can_run = tree.module is not None and recorded is None
    asked = dict(_asked_readers(widths, reads, can_run, widths.unexplained() if maps else None))
    faults += asked.values()
    flat = {r.width for r in widths.readers if r in asked or r.node.features}
    for reader in widths.grouped:
        node, width, order = reader.node, reader.width, reads.get(id(reader.node.module), _UNKNOWN)
        fits = width in flat and width not in {*widths.channels, *widths.flow}
        if "features" not in node.told and (order.kind == "map" or (order.kind == "unknown" and fits)):
            faults.append(fixed_order_fault(node, width, widths.likely_channels(reader), can_run=can_run))
    # An output that another Linear reads as it is belongs to a hidden layer, though its width may fit a map.
    read = {r.width for r in widths.readers if r.linear and r not in asked and not r.node.features}
    apart = {prod(sizes): sizes[0] for node in nodes if len(sizes := _unflattened(node.module)) > 1}
    upsamples = any(isinstance(node.module, nn.Upsample) for node in nodes)
    for reader in widths.readers:
        node, order = reader.node, gives.get(id(reader.node.module), _UNKNOWN)
        if not reader.linear or "output" in node.told or order.kind == "plain":
            continue
        for out in reader.gives:
            hidden = node.module is None and out in {*read, *widths.channels, *widths.upwards}
            channels = apart.get(out) or (0 if hidden else widths.of_a_map_made_of(out, upsamples))
            if order.kind != "unknown":
                faults.append(mixed_order_fault(node, out, output=True))
            elif 1 < channels < out:
                faults.append(viewed_output_fault(node, out, channels, can_run=can_run))
    return faults, assumed


def _asked_readers(
    widths: Widths, reads: Mapping[int, Order], can_run: bool, unexplained: set[int] | None
) -> Iterator[tuple[Reader, Fault]]:
    """The fault of each layer that may read a flattened map; ``unexplained`` is None in a model without maps."""
    viewed = {out: r.node for r in widths.readers if r.linear and r.node.output for out in r.gives}
    asked, settled = set[int](), set[int]()
    # Those that may read a flattened map, as was said or asked, and those that follow them.
    flattened = set[int]()
    last: Reader | None = None
    for reader in widths.readers:
        node, width, order = reader.node, reader.width, reads.get(id(reader.node.module), _UNKNOWN)
        follows = (
            last is not None
            and id(last.node) in settled
            and widths.follows(reader, last, explained=id(last.node) in flattened)
        )
        doubt = not follows and not widths.reads_channels(reader)
        declared = "features" in node.told or (reader.fixed and id(node) in asked)
        if declared or not doubt:
            settled.add(id(node))
        if declared or (last is not None and follows and id(last.node) in flattened):
            flattened.add(id(node))
        last = reader if reader.gives else last
        if declared or order.kind == "plain" or not has_an_order(width):
            continue
        view = viewed.get(width, node)
        fits = unexplained is not None and (
            width in unexplained or (doubt and node.module is not None and widths.may_be_a_map(width))
        )
        if order.kind == "input":
            fault = input_order_fault(node, order.sizes)
        elif order.kind == "mixed":
            fault = mixed_order_fault(node, width)
        elif order.kind == "map" or view is not node or fits:
            fault_of = fixed_order_fault if reader.fixed or order.sizes else flattened_input_fault
            channels = (order.sizes or view.output or (widths.likely_channels(reader),))[0]
            fault = fault_of(node, width, channels, can_run=can_run)
        else:
            continue
        asked.add(id(node))
        settled.add(id(node))
        flattened.add(id(node))
        yield reader, fault


_UNKNOWN = Order("unknown")
_ASSUMED = (
    "an nn.Flatten, which is assumed to flatten in one order on both sides, as it does with one channel or none "
    "(rules=[Flatten(<layer>, (C, H, W))] says which layer reads it, Flatten(<layer>, None) that no order is lost)"
)


def _is_of_maps(kind: type | None) -> bool:
    """Whether only a model with feature maps has such a layer."""
    torchs = [base for base in kind.__mro__ if base.__module__.startswith("torch.nn.")] if kind else []
    return any(base in _OF_MAPS or base.__name__.endswith(("2d", "3d")) for base in torchs)


_OF_MAPS = nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.Unfold, nn.Fold, nn.ChannelShuffle


def _flattens(module: nn.Module | None) -> bool:
    """Whether it flattens all axes but the batch."""
    return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)


def _unflattened(module: nn.Module | None) -> list[int]:
    """The sizes of the map that an ``nn.Unflatten`` makes."""
    sizes = module.unflattened_size if isinstance(module, nn.Unflatten) else ()
    return [size[1] if isinstance(size, tuple) else size for size in sizes]
