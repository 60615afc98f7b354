"""Where a feature map is flattened, or made of a flat vector: torch and Flax do it in different orders.

Arrays do not tell, so it is asked: for every layer of a model with feature maps whose input width nothing else
explains, and for every Linear whose output can only be a map. `Flatten` is the answer. What a ``Sequential`` shows
(``nn.Flatten``, ``nn.Unflatten``) is read there, and what a ``forward`` flattens in its source; else the order of
keys and of definitions says nothing.
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
from ._faults import contradicts, say_fixed, say_how, say_no_layout, say_shape, say_whose
from ._interpreter import read_forwards
from ._modules import NO_READER, PER_FEATURE, TAKES_FEATURES, in_sequentials, loose_flattens

__all__ = ["COMPUTED", "ask_about_maps", "can_be_flattened", "knows_one_order", "output_order"]

COMPUTED = "parametrizations"  # where torch keeps what a layer's tensors are computed from


def _names_of(*kinds: type) -> frozenset[str]:
    return frozenset(rule.name for rule in RULES if any(issubclass(kind, kinds) for kind in rule.types))


_CONVOLUTIONS = frozenset(rule.name for rule in RULES if any("Conv" in kind.__name__ for kind in rule.types))
_RECURRENT = _names_of(nn.RNNBase, nn.RNNCellBase)
_NORMS = _names_of(*PER_FEATURE)
_GROUPED = _names_of(nn.GroupNorm)
# What reads features through weights that no `Flatten` lays out.
_FIXED = (nn.MultiheadAttention, nn.Bilinear)
_ATTENTION, _BILINEAR = _names_of(nn.MultiheadAttention), _names_of(nn.Bilinear)
# What only a model with feature maps has.
_OF_MAPS = (
    nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Dropout2d, nn.Dropout3d, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.Unfold, nn.Fold,
    nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.LPPool2d, nn.ChannelShuffle,
)  # fmt: skip


def can_be_flattened(node: TorchNode, rule: Flatten) -> bool:
    """Whether a `Flatten` can speak of this layer; of a class that is not known, by its tensors."""
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
    """Whether a layer takes features in torch's order only, so that a `Flatten` can say nothing but None of it."""
    return node.kind is not None and issubclass(node.kind, (nn.GroupNorm, *_FIXED))


def output_order(node: TorchNode) -> tuple[int, ...] | None:
    """The ``(C, H, W)`` in whose order the output of a layer is, where the caller said so."""
    if node.kind is not None and issubclass(node.kind, PER_FEATURE):
        return node.features  # what it takes is what it gives
    return node.output


@dataclass(eq=False)
class _Reader:
    """A layer that reads features: how many, and how many it gives; ``fixed`` if in no order but torch's."""

    node: TorchNode
    width: int
    gives: set[int] = field(default_factory=set)
    linear: bool = False
    fixed: bool = False
    behind: int = 0  # so many convolutions and norms of maps are defined in front of it


@dataclass(eq=False)
class _Widths:
    """What the model's shapes say about widths."""

    channels: list[int] = field(default_factory=list)  # of the maps that its convolutions and norms give
    upwards: list[int] = field(default_factory=list)  # of the maps that its transposed convolutions take
    known: set[int] = field(default_factory=set)  # of tables, attention and the like
    inward: set[int] = field(default_factory=set)  # of the maps that its convolutions take
    readers: list[_Reader] = field(default_factory=list)
    grouped: list[tuple[TorchNode, int]] = field(default_factory=list)  # GroupNorms, and how many they take


def ask_about_maps(
    tree: TorchTree, moves: Sequence[Move], rules: Iterable[object]
) -> tuple[list[Fault], list[tuple[str, str]]]:
    """What must be said about maps and is not, and what was assumed: about which layer, and what."""
    said = [rule for rule in rules if isinstance(rule, Flatten)]
    behind, before = in_sequentials(tree.root)
    of_maps = any(_is_of_maps(node.kind) for node in tree.root.walk())
    if not (of_maps or said or behind or before or any(move.rule in _CONVOLUTIONS for move in moves)):
        return [], []  # as in a language model, whose thousand tensors need no reading
    widths = _read(tree, moves)
    taken, shaped = (
        {
            id(r.node)
            for r in widths.readers
            for rule in said
            if bool(rule.output) == out and rule.names(r.node.origin)
        }
        for out in (False, True)
    )
    faults = [fault for reader in widths.readers for fault in contradicts(reader.node, widths.channels)]
    maps = bool(widths.channels) or of_maps
    roots = _unexplained(widths, taken) if maps else set()
    shown, made, plain = read_forwards(tree.root) if maps and tree.module is not None else ({}, {}, set())
    asked: set[int] = set()
    assumed = []
    viewed = {out: r.node for r in widths.readers if r.linear and r.node.output for out in r.gives}
    for reader in widths.readers:
        path = id(reader.node)
        known = behind.get(path) or shown.get(path, behind.get(path))
        told = path in taken or (reader.fixed and path in asked)
        pooled_to_a_point = path in shown and shown[path] is None
        if told or pooled_to_a_point or known == reader.width or not _has_an_order(reader.width):
            continue
        flattened = known or (path in shown and reader.width not in widths.channels)
        if reader.width in viewed and viewed[reader.width] is not reader.node:
            faults.append(say_whose(reader.node, reader.width, viewed[reader.width]))
        elif maps and (flattened or (reader.width in roots and path not in plain)):
            asked.add(path)
            channels = known or _likely_channels(reader, widths.channels)
            faults.append((say_fixed if reader.fixed else say_how)(reader.node, reader.width, channels))
        elif not maps and known is not None:
            how = f'Flatten("{join_path(reader.node.origin)}", None)'
            assumed.append((reader.node.where, f"behind nn.Flatten, which {_TAKEN} (rules=[{how}] says so)"))
    # A layer that reads as many features as a map has channels reads what was pooled to one position.
    pooled = any(one.linear and one.width in widths.channels for one in widths.readers)
    if maps and not asked and not pooled and all(rule.output for rule in said):
        assumed += [(node.where, NO_READER) for node in loose_flattens(tree.root)]
    flat = {r.width for r in widths.readers if id(r.node) in asked or r.node.features}
    for node, width in widths.grouped:
        said_none = any(rule.features is None and rule.names(node.origin) for rule in said)
        if width in flat and width not in {*widths.channels, *widths.inward} and not said_none:
            faults.append(say_no_layout(node, width))
    # A hidden layer whose width happens to fit is read by a layer that reads no map.
    read = {
        r.width for r in widths.readers if r.linear and id(r.node) not in asked and r.node.features is None
    }
    for reader in widths.readers:
        if not reader.linear or id(reader.node) in shaped:
            continue
        for out in reader.gives:
            fitting = [c for c in widths.upwards if 1 < c < out and out % c == 0]
            hidden = out in read or out in widths.channels or out in widths.upwards
            channels = before.get(id(reader.node)) or made.get(id(reader.node), 0)
            shows = 1 < channels < out and out % channels == 0
            if shows or (fitting and not hidden):
                faults.append(say_shape(reader.node, out, channels or fitting[0]))
    return faults, assumed


def _has_an_order(width: int) -> bool:
    """Whether a map of this many numbers has several channels and several positions: not if it is a prime."""
    return any(width % size == 0 for size in range(2, isqrt(width) + 1))


def _likely_channels(reader: _Reader, channels: Sequence[int]) -> int:
    """The channels to propose: those of the nearest maps in front of a layer that fit its width; 0 for none.

    Nor is a map of one channel proposed: it has no order to lose, and typed as it stands would pass for an answer.
    """
    nearest = [*reversed(channels[: reader.behind]), *reversed(channels[reader.behind :])]
    found = next((count for count in nearest if reader.width % count == 0), 0)
    return found if found > 1 else 0


_TAKEN = "is taken to flatten in one order on both sides, as it does what has one channel or no channels"


# --- what the shapes say -------------------------------------------------------------------------------


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
    # Of a norm without a class, whose shapes are those of a BatchNorm1d too: what the convolutions beside it take.
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
                found.channels.append(_channels(node, move, shape))
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
    """For every key, the layer that the tensor belongs to."""
    for leaf in node.leaves.values():
        yield leaf.key, leaf.owners[-1][0] if leaf.owners else owner
    for name, child in node.children.items():
        yield from _owners(child, owner if owner is not node or name == COMPUTED else child)


def _channels(node: TorchNode, move: Move, shape: tuple[int, ...]) -> int:
    """How many channels a convolution gives."""
    given = getattr(node.module, "out_channels", None)
    return given or (shape[1] if "Transpose" in move.rule else shape[0])


def _unexplained(widths: _Widths, taken: set[int]) -> set[int]:
    """The widths that nothing known leads to: those that only they themselves, or nothing, give.

    A layer whose input is explained explains its output. Among the others, widths that give each other in a circle
    (an encoder and its decoder, a square layer) explain nobody; what such a circle leads to is explained by it.
    """
    explained = {*widths.channels, *widths.known}
    waiting = list(widths.readers)
    while True:
        ready = [one for one in waiting if one.width in explained or id(one.node) in taken]
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
