"""Finds where a feature map is flattened, or a vector viewed as a map: torch and Flax do it in different orders.

Arrays do not show the order. A run of the torch model does (`Recorded`); without one the plan asks the caller, who
passes ``inputs=`` or answers with `Flatten`. It asks about each layer of a model with feature maps if nothing else
explains its input width, or if code may flatten a map into it all the same (``_doubts``), and likewise about each
Linear whose output may become a map. The order of keys and of definitions proves nothing.
"""

from collections.abc import Iterable, Sequence
from math import isqrt

from torch import nn

from torchjax_bridge.exchange import join_path

from .._report import Fault
from ..pairing import Move
from ..rules import RULES, Flatten
from ..trees import TorchNode, TorchTree
from ._axes import Order
from ._doubts import Doubts, Reader, Widths, reached
from ._faults import (
    fixed_order_fault,
    flattened_input_fault,
    group_norm_fault,
    input_order_fault,
    mixed_order_fault,
    unclear_reader_fault,
    viewed_output_fault,
    wrong_order_faults,
)
from ._modules import NO_READER, PER_FEATURE, TAKES_FEATURES, in_sequentials, is_of_maps, loose_flattens
from ._recorded import Recorded

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


def ask_about_maps(
    tree: TorchTree, moves: Sequence[Move], recorded: Recorded | None
) -> tuple[list[Fault], list[tuple[str, str]]]:
    """A fault for each missing `Flatten`, and the assumptions as pairs: the layer, and the text."""
    told = any(node.told for node in tree.root.walk())
    behind, before = in_sequentials(tree.root)
    of_maps = any(is_of_maps(node.kind) for node in tree.root.walk())
    told |= any(
        order.kind not in ("plain", "unknown") for order in (recorded.reads if recorded else {}).values()
    )
    if not (of_maps or told or behind or before or any(move.rule in _CONVOLUTIONS for move in moves)):
        return [], []  # a language model, for example: its many tensors need no look
    widths = _read(tree, moves)
    reads, gives, _ = recorded or Recorded({}, {}, {})
    faults = [
        fault for reader in widths.readers for fault in wrong_order_faults(reader.node, widths.channels)
    ]
    maps = bool(widths.channels) or of_maps
    roots = _unexplained(widths) if maps else set()
    doubts = Doubts(tree.root, widths)
    can_run = tree.module is not None and recorded is None
    assumed = []
    viewed = {out: r.node for r in widths.readers if r.linear and r.node.output for out in r.gives}
    for reader in widths.readers:
        node, width, order = reader.node, reader.width, reads.get(id(reader.node.module), _UNKNOWN)
        known = behind.get(id(node))
        declared = "features" in node.told or (reader.fixed and id(node) in doubts.asked)
        if declared or order.kind == "plain" or known == width or not _has_an_order(width):
            continue
        if order.kind != "unknown":
            doubts.asked.add(id(node))
            if order.kind == "map":
                faults.append(fixed_order_fault(node, width, order.sizes[0], can_run=False))
            elif order.kind == "input":
                faults.append(input_order_fault(node, order.sizes))
            else:
                faults.append(mixed_order_fault(node, width))
        elif width in viewed and viewed[width] is not node:
            faults.append(unclear_reader_fault(node, width, viewed[width]))
        elif maps and (known or width in roots or doubts.may_read_a_map(reader)):
            doubts.asked.add(id(node))
            fault_of = fixed_order_fault if reader.fixed else flattened_input_fault
            channels = known or _likely_channels(reader, widths.channels)
            faults.append(fault_of(node, width, channels, can_run=can_run))
        elif not maps and known is not None:
            how = f'Flatten("{join_path(node.origin)}", None)'
            assumed.append((node.where, f"behind nn.Flatten, which {_ASSUMED} (rules=[{how}] says so)"))
    # A layer that reads as many features as a map has channels reads what was pooled to one position.
    pooled = any(one.linear and one.width in widths.channels for one in widths.readers)
    if maps and not (doubts.asked or pooled or any("features" in node.told for node in tree.root.walk())):
        assumed += [(node.where, NO_READER) for node in loose_flattens(tree.root)]
    flat = {r.width for r in widths.readers if id(r.node) in doubts.asked or r.node.features}
    for node, width in widths.grouped:
        order = reads.get(id(node.module), _UNKNOWN)
        fits = width in flat and width not in {*widths.channels, *widths.inward}
        if "features" not in node.told and (order.kind == "map" or (order.kind == "unknown" and fits)):
            faults.append(group_norm_fault(node, width))
    # An output that another Linear reads as it is belongs to a hidden layer, though its width may fit a map.
    read = {
        r.width
        for r in widths.readers
        if r.linear and id(r.node) not in doubts.asked and r.node.features is None
    }
    for reader in widths.readers:
        node, order = reader.node, gives.get(id(reader.node.module), _UNKNOWN)
        if not reader.linear or "output" in node.told or order.kind == "plain":
            continue
        for out in reader.gives:
            fitting = [c for c in widths.upwards if 1 < c < out and out % c == 0]
            hidden = out in read or out in widths.channels or out in widths.upwards
            channels = before.get(id(node), 0) or doubts.may_make_a_map(reader, out)
            shows = 1 < channels < out and out % channels == 0
            if order.kind != "unknown":
                faults.append(mixed_order_fault(node, out, output=True))
            elif shows or (fitting and not hidden):
                faults.append(viewed_output_fault(node, out, channels or fitting[0], can_run=can_run))
    return faults, assumed


_UNKNOWN = Order("unknown")


def _has_an_order(width: int) -> bool:
    """Whether a map of this many numbers can have several channels and positions: false for a prime."""
    return any(width % size == 0 for size in range(2, isqrt(width) + 1))


def _likely_channels(reader: Reader, channels: Sequence[int]) -> int:
    """The channels to propose: those of the nearest map before a layer that divide its width; 0 for none.

    Never 1: such a map has no order to lose, and a reader who typed it would have answered without looking.
    """
    nearest = [*reversed(channels[: reader.behind]), *reversed(channels[reader.behind :])]
    found = next((count for count in nearest if reader.width % count == 0), 0)
    return found if found > 1 else 0


_ASSUMED = "is assumed to flatten in one order on both sides, as it does with one channel or none"


# --- what the shapes show -------------------------------------------------------------------------------


def _read(tree: TorchTree, moves: Sequence[Move]) -> Widths:
    nodes = dict(_owners(tree.root, tree.root))
    found = Widths()
    readers: dict[int, Reader] = {}

    def reader(node: TorchNode, width: int) -> Reader:
        if id(node) not in readers:
            readers[id(node)] = Reader(node, width, behind=len(found.channels))
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
                found.inward.setdefault(getattr(node.module, "in_channels", shape[1]), set()).add(
                    found.channels[-1]
                )
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
                    found.readers.append(Reader(node, shape[1], {gives}, fixed=True, behind=here))
            elif move.rule in _BILINEAR and len(shape) == 3:
                here = len(found.channels)
                found.readers += [
                    Reader(node, width, {shape[0]}, fixed=True, behind=here) for width in shape[1:]
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


def _unexplained(widths: Widths) -> set[int]:
    """The input widths that nothing known leads to.

    A layer with an explained input explains its outputs. Widths in a cycle (an encoder and its decoder, a square
    layer) do not explain each other, but they explain the widths that the cycle leads to.
    """
    explained = {*widths.channels, *widths.known}
    waiting = list(widths.readers)
    while True:
        ready = [one for one in waiting if one.width in explained or "features" in one.node.told]
        if not ready:
            break
        done = {id(one) for one in ready}
        waiting = [one for one in waiting if id(one) not in done]
        explained.update(*(one.gives for one in ready))
    edges: dict[int, set[int]] = {}
    for one in waiting:
        edges.setdefault(one.width, set()).update(one.gives)
    reach = {width: reached(width, edges) for width in edges}
    return {
        width
        for width in edges
        if all(other in reach[width] for other in edges if other != width and width in reach[other])
    }
