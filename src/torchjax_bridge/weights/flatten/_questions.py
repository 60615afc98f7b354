"""Finds where a feature map is flattened, or a vector viewed as a map: torch and Flax do it in different orders.

Arrays do not show the order, so the plan asks the caller, who answers with `Flatten`. It asks about each
layer of a model with feature maps if nothing else explains its input width, and about each Linear whose
output can only be a map. Before asking, it looks at ``nn.Flatten`` and ``nn.Unflatten`` in a ``Sequential``,
and at the source of ``forward``. The order of keys and of definitions proves nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isqrt

from torch import nn

from torchjax_bridge.exchange import join_path

from .._report import Fault
from ..pairing import Move
from ..rules import RULES, Flatten
from ..trees import TorchNode, TorchTree
from ._faults import (
    fixed_order_fault,
    flattened_input_fault,
    group_norm_fault,
    unclear_reader_fault,
    viewed_output_fault,
    wrong_order_faults,
)
from ._interpreter import interpret_forwards
from ._modules import NO_READER, PER_FEATURE, TAKES_FEATURES, in_sequentials, loose_flattens

__all__ = ["COMPUTED", "ask_about_maps", "can_be_flattened", "knows_one_order", "output_order"]

COMPUTED = (
    "parametrizations"  # the submodule in which torch keeps the tensors that a parametrization computes from
)


def _names_of(*kinds: type) -> frozenset[str]:
    return frozenset(rule.name for rule in RULES if any(issubclass(kind, kinds) for kind in rule.types))


_CONVOLUTIONS = frozenset(rule.name for rule in RULES if any("Conv" in kind.__name__ for kind in rule.types))
_RECURRENT = _names_of(nn.RNNBase, nn.RNNCellBase)
_NORMS = _names_of(*PER_FEATURE)
_GROUPED = _names_of(nn.GroupNorm)
# Layers whose weights no `Flatten` can lay out.
_FIXED = (nn.MultiheadAttention, nn.Bilinear)
_ATTENTION, _BILINEAR = _names_of(nn.MultiheadAttention), _names_of(nn.Bilinear)
# Layers that only a model with feature maps has.
_OF_MAPS = (
    nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Dropout2d, nn.Dropout3d, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.Unfold, nn.Fold,
    nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.LPPool2d, nn.ChannelShuffle,
)  # fmt: skip


def can_be_flattened(node: TorchNode, rule: Flatten) -> bool:
    """Whether a `Flatten` can apply to this layer. Judges by its tensors where its class is not known."""
    output = rule.output
    if knows_one_order(node):
        return rule.features is None and not output
    if node.kind is not None and node.kind.__module__.startswith("torch.nn."):
        flat = not issubclass(node.kind, PER_FEATURE) or all(
            leaf.meta.ndim < 2 for leaf in node.leaves.values()
        )
        return flat and issubclass(node.kind, nn.Linear if output else TAKES_FEATURES)
    shapes = {
        name.removeprefix(f"{COMPUTED}."): leaf.meta.ndim for name, leaf in (node.flat() | node.moved).items()
    }
    matrix = any(ndim == 2 and name.startswith("weight") for name, ndim in shapes.items())
    return matrix or (not output and set(shapes.values()) <= {0, 1})


def knows_one_order(node: TorchNode) -> bool:
    """Whether a layer takes features in torch's order only, so that ``Flatten(..., None)`` alone applies."""
    return node.kind is not None and issubclass(node.kind, (nn.GroupNorm, *_FIXED))


def output_order(node: TorchNode) -> tuple[int, ...] | None:
    """The ``(C, H, W)`` whose order a layer's output has, if the caller declared one."""
    if node.kind is not None and issubclass(node.kind, PER_FEATURE):
        return node.features  # its output has the order of its input
    return node.output


@dataclass(eq=False)
class _Reader:
    """A layer that reads features: its input width and output widths; ``fixed`` if only torch's order will do."""

    node: TorchNode
    width: int
    gives: set[int] = field(default_factory=set)
    linear: bool = False
    fixed: bool = False
    behind: int = 0  # the number of convolutions and norms of maps defined before it


@dataclass(eq=False)
class _Widths:
    """The widths that the shapes of the model show."""

    channels: list[int] = field(default_factory=list)  # of output maps of convolutions and norms
    upwards: list[int] = field(default_factory=list)  # of input maps of transposed convolutions
    known: set[int] = field(default_factory=set)  # of embedding tables, attention and the like
    inward: set[int] = field(default_factory=set)  # of input maps of convolutions
    readers: list[_Reader] = field(default_factory=list)
    grouped: list[tuple[TorchNode, int]] = field(default_factory=list)  # GroupNorms and their widths


def ask_about_maps(
    tree: TorchTree, moves: Sequence[Move], rules: Iterable[object]
) -> tuple[list[Fault], list[tuple[str, str]]]:
    """A fault for each missing `Flatten`, and the assumptions as pairs: the layer, and the text."""
    hints = [rule for rule in rules if isinstance(rule, Flatten)]
    behind, before = in_sequentials(tree.root)
    of_maps = any(_is_of_maps(node.kind) for node in tree.root.walk())
    if not (of_maps or hints or behind or before or any(move.rule in _CONVOLUTIONS for move in moves)):
        return [], []  # a language model, for example: its many tensors need no look
    widths = _read(tree, moves)
    input_declared, output_declared = (
        {
            id(r.node)
            for r in widths.readers
            for rule in hints
            if bool(rule.output) == out and rule.matches(r.node.origin)
        }
        for out in (False, True)
    )
    faults = [
        fault for reader in widths.readers for fault in wrong_order_faults(reader.node, widths.channels)
    ]
    maps = bool(widths.channels) or of_maps
    roots = _unexplained(widths, input_declared) if maps else set()
    flat_readers, map_sources, plain = (
        interpret_forwards(tree.root) if maps and tree.module is not None else ({}, {}, set())
    )
    asked: set[int] = set()
    assumed = []
    viewed = {out: r.node for r in widths.readers if r.linear and r.node.output for out in r.gives}
    for reader in widths.readers:
        node_id = id(reader.node)
        known = behind.get(node_id) or flat_readers.get(node_id, behind.get(node_id))
        declared = node_id in input_declared or (reader.fixed and node_id in asked)
        pooled_to_a_point = node_id in flat_readers and flat_readers[node_id] is None
        if declared or pooled_to_a_point or known == reader.width or not _has_an_order(reader.width):
            continue
        flattened = known or (node_id in flat_readers and reader.width not in widths.channels)
        if reader.width in viewed and viewed[reader.width] is not reader.node:
            faults.append(unclear_reader_fault(reader.node, reader.width, viewed[reader.width]))
        elif maps and (flattened or (reader.width in roots and node_id not in plain)):
            asked.add(node_id)
            channels = known or _likely_channels(reader, widths.channels)
            fault_of = fixed_order_fault if reader.fixed else flattened_input_fault
            faults.append(fault_of(reader.node, reader.width, channels))
        elif not maps and known is not None:
            how = f'Flatten("{join_path(reader.node.origin)}", None)'
            assumed.append(
                (reader.node.where, f"behind nn.Flatten, which {_ASSUMED} (rules=[{how}] says so)")
            )
    # A layer that reads as many features as a map has channels reads what was pooled to one position.
    pooled = any(one.linear and one.width in widths.channels for one in widths.readers)
    if maps and not asked and not pooled and all(rule.output for rule in hints):
        assumed += [(node.where, NO_READER) for node in loose_flattens(tree.root)]
    flat = {r.width for r in widths.readers if id(r.node) in asked or r.node.features}
    for node, width in widths.grouped:
        declared_none = any(rule.features is None and rule.matches(node.origin) for rule in hints)
        if width in flat and width not in {*widths.channels, *widths.inward} and not declared_none:
            faults.append(group_norm_fault(node, width))
    # An output that another Linear reads as it is belongs to a hidden layer, though its width may fit a map.
    read = {
        r.width for r in widths.readers if r.linear and id(r.node) not in asked and r.node.features is None
    }
    for reader in widths.readers:
        if not reader.linear or id(reader.node) in output_declared:
            continue
        for out in reader.gives:
            fitting = [c for c in widths.upwards if 1 < c < out and out % c == 0]
            hidden = out in read or out in widths.channels or out in widths.upwards
            channels = before.get(id(reader.node)) or map_sources.get(id(reader.node), 0)
            shows = 1 < channels < out and out % channels == 0
            if shows or (fitting and not hidden):
                faults.append(viewed_output_fault(reader.node, out, channels or fitting[0]))
    return faults, assumed


def _has_an_order(width: int) -> bool:
    """Whether a map of this many numbers can have several channels and positions: false for a prime."""
    return any(width % size == 0 for size in range(2, isqrt(width) + 1))


def _likely_channels(reader: _Reader, channels: Sequence[int]) -> int:
    """The channels to propose: those of the nearest map before a layer that divide its width; 0 for none.

    Never 1: such a map has no order to lose, and a reader who typed it would have answered without looking.
    """
    nearest = [*reversed(channels[: reader.behind]), *reversed(channels[reader.behind :])]
    found = next((count for count in nearest if reader.width % count == 0), 0)
    return found if found > 1 else 0


_ASSUMED = "is assumed to flatten in one order on both sides, as it does with one channel or none"


# --- what the shapes show -------------------------------------------------------------------------------


def _read(tree: TorchTree, moves: Sequence[Move]) -> _Widths:
    nodes = dict(_owners(tree.root, tree.root))
    found = _Widths()
    readers: dict[int, _Reader] = {}

    def reader(node: TorchNode, width: int) -> _Reader:
        if id(node) not in readers:
            readers[id(node)] = _Reader(node, width, behind=len(found.channels))
            found.readers.append(readers[id(node)])
        return readers[id(node)]

    recurrent: dict[int, set[int]] = {}
    # A norm without a class may be a BatchNorm1d or a norm of maps: convolutions beside it with its width decide.
    beside = {
        (nodes[key].origin[:-1], tree.state[key].shape[1])
        for move in moves
        if move.rule in _CONVOLUTIONS
        for key in move.torch_keys
        if tree.state[key].ndim > 2
    }
    for move in moves:
        for key in move.torch_keys:
            shape, node, name = tuple(tree.state[key].shape), nodes[key], key.rpartition(".")[2]
            if move.rule in _CONVOLUTIONS and len(shape) > 2:
                found.channels.append(_out_channels(node, move, shape))
                found.inward.add(getattr(node.module, "in_channels", shape[1]))
                if "Transpose" in move.rule:
                    found.upwards.append(shape[0])
            elif node.kind in (nn.BatchNorm2d, nn.BatchNorm3d) and len(shape) == 1:
                found.channels.append(shape[0])
            elif move.rule in _GROUPED and name == "weight":
                found.grouped.append((node, shape[0]))
            elif move.rule in _NORMS and len(shape) == 1 and shape[0] > 1:
                if node.kind is not None or (node.origin[:-1], shape[0]) not in beside:
                    reader(node, shape[0])
            elif move.rule == "Linear" and len(shape) == 2 and shape[1] > 1:  # one input has no order
                one = reader(node, shape[1])
                one.gives.add(shape[0])
                one.linear = True
            elif move.rule in _ATTENTION:
                if name.endswith("_proj_weight"):  # the packed one has three of them
                    gives = shape[0] // 3 if name.startswith("in_") else shape[0]
                    here = len(found.channels)
                    found.readers.append(_Reader(node, shape[1], {gives}, fixed=True, behind=here))
            elif move.rule in _BILINEAR and len(shape) == 3:
                here = len(found.channels)
                found.readers += [
                    _Reader(node, width, {shape[0]}, fixed=True, behind=here) for width in shape[1:]
                ]
            elif move.rule in _RECURRENT and len(shape) == 2 and "weight_ih" in key:
                if not name[len("weight_ih") :].startswith("_l") or "_l0" in name:
                    reader(node, shape[1])
            elif move.rule in _RECURRENT and len(shape) == 2:
                recurrent.setdefault(id(node), set()).update((shape[1], 2 * shape[1]))
            elif len(shape) == 2 and move.rule != "Linear":  # a table
                found.known |= {*shape}
            elif len(shape) == 2 and name == "weight":
                found.known.add(shape[0])
    for place, gives in recurrent.items():
        if place in readers:
            readers[place].gives |= gives
    return found


def _owners(node: TorchNode, owner: TorchNode) -> Iterable[tuple[str, TorchNode]]:
    """Pairs of each key and the layer that its tensor belongs to."""
    for leaf in node.leaves.values():
        yield leaf.key, leaf.owners[-1][0] if leaf.owners else owner
    for name, child in node.children.items():
        yield from _owners(child, owner if owner is not node or name == COMPUTED else child)


def _out_channels(node: TorchNode, move: Move, shape: tuple[int, ...]) -> int:
    """The output channels of a convolution."""
    given = getattr(node.module, "out_channels", None)
    return given or (shape[1] if "Transpose" in move.rule else shape[0])


def _unexplained(widths: _Widths, declared: set[int]) -> set[int]:
    """The input widths that nothing known leads to.

    A layer with an explained input explains its outputs. Widths in a cycle (an encoder and its decoder, a square
    layer) do not explain each other, but they explain the widths that the cycle leads to.
    """
    explained = {*widths.channels, *widths.known}
    waiting = list(widths.readers)
    while True:
        ready = [one for one in waiting if one.width in explained or id(one.node) in declared]
        if not ready:
            break
        done = {id(one) for one in ready}
        waiting = [one for one in waiting if id(one) not in done]
        explained.update(*(one.gives for one in ready))
    edges: dict[int, set[int]] = {}
    for one in waiting:
        edges.setdefault(one.width, set()).update(one.gives)
    reach = {width: _reached(width, edges) for width in edges}
    return {
        width
        for width in edges
        if all(other in reach[width] for other in edges if other != width and width in reach[other])
    }


def _reached(start: int, edges: dict[int, set[int]]) -> set[int]:
    found: set[int] = set()
    todo = [start]
    while todo:
        for width in edges.get(todo.pop(), ()):
            if width not in found:
                found.add(width)
                todo.append(width)
    return found


def _is_of_maps(kind: type | None) -> bool:
    return kind is not None and issubclass(kind, _OF_MAPS)
