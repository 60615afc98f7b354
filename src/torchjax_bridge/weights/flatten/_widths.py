"""What the shapes of a model show of its features: which layer reads how many, and what explains that many.

A map may be flattened unseen wherever a width has the channels of a map as a factor, so a width that
another layer gives explains a reader only where the two are defined side by side.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isqrt

from torch import nn

from torchjax_bridge.exchange import Path

from ..pairing import Move
from ..rules import RULES
from ..trees import TorchNode, TorchTree
from ._code import names_a_flatten

__all__ = ["COMPUTED", "CONVOLUTIONS", "PER_FEATURE", "Reader", "Widths", "has_an_order", "read_widths"]

COMPUTED = (
    "parametrizations"  # the submodule in which torch keeps the tensors that a parametrization computes from
)
# Layers with one number a feature, which work in any order of the features. A GroupNorm does not.
PER_FEATURE = (nn.BatchNorm1d, nn.SyncBatchNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU)


def _names_of(*kinds: type) -> frozenset[str]:
    return frozenset(rule.name for rule in RULES if any(issubclass(kind, kinds) for kind in rule.types))


CONVOLUTIONS = frozenset(rule.name for rule in RULES if any("Conv" in kind.__name__ for kind in rule.types))
_RECURRENT = _names_of(nn.RNNBase, nn.RNNCellBase)
_NORMS = _names_of(*PER_FEATURE)
_GROUPED = _names_of(nn.GroupNorm)
_ATTENTION, _BILINEAR = _names_of(nn.MultiheadAttention), _names_of(nn.Bilinear)
_IMAGE = 4  # an image has no more channels than this


@dataclass(eq=False)
class Reader:
    """A layer that reads features: its input width and output widths; ``fixed`` if only torch's order will do."""

    node: TorchNode
    width: int
    gives: set[int] = field(default_factory=set)
    linear: bool = False
    fixed: bool = False
    behind: int = 0  # the number of convolutions and norms of maps defined before it


@dataclass(eq=False)
class Widths:
    """The widths that the shapes of the model show."""

    channels: list[int] = field(default_factory=list)  # of output maps of convolutions and norms
    upwards: list[int] = field(default_factory=list)  # of input maps of transposed convolutions
    known: set[int] = field(default_factory=set)  # of embedding tables, attention and the like
    flow: dict[int, set[int]] = field(
        default_factory=dict
    )  # of input maps of convolutions, with their outputs
    readers: list[Reader] = field(default_factory=list)
    grouped: list[Reader] = field(default_factory=list)  # GroupNorms
    around: dict[Path, nn.Module | None] = field(default_factory=dict)  # the modules with a convolution

    def may_be_a_map(self, width: int) -> bool:
        """Whether a flattened map of these channels could have this many numbers."""
        return _has_a_factor(width, self.channels)

    def follows(self, reader: Reader, last: Reader, *, explained: bool) -> bool:
        """Whether it reads what the layer defined right before it gives.

        Code that flattens the map of a convolution beside them may give it that instead, unless what it flattens is
        ``explained``, since the layer before reads it.
        """
        return (
            reader.width in last.gives
            and last.behind == reader.behind
            and (explained or not names_a_flatten(self.around.get(reader.node.origin[:-1])))
        )

    def reads_channels(self, reader: Reader) -> bool:
        """Whether it reads as many features as the last map in front of it has channels, which is no inner one.

        A norm may be one of an inner map, in front of the convolution that reads it.
        """
        if not reader.behind or self.channels[reader.behind - 1] != reader.width:
            return False
        ends = self._ends if reader.gives else self._ends & {*self.channels[: reader.behind]}
        return reader.width in ends or not _has_a_factor(reader.width, ends)

    @cached_property
    def _starts(self) -> set[int]:
        """The channels that convolutions take, and that convolutions of others do not make."""
        return _firsts(self.flow)

    @cached_property
    def _ends(self) -> set[int]:
        """The channels that convolutions make no others of, except such as lead back to them."""
        back = {takes: set[int]() for takes in self.flow}
        for takes, makes in self.flow.items():
            for c in makes:
                back.setdefault(c, set()).add(takes)
        return {*self.channels} - ({*back} - _firsts(back))

    def of_a_map_made_of(self, width: int, upsamples: bool) -> int:
        """The channels of a map that may be made of so many features; 0 for none.

        A transposed convolution may read it, or a convolution whose channels no other convolution makes; in a model
        that makes larger maps or images, any convolution.
        """
        draws = upsamples or any(min(makes) <= _IMAGE < takes for takes, makes in self.flow.items())
        makers = self.flow if draws else self._starts
        square = [c for c in makers if c > _IMAGE and isqrt(width // c) ** 2 * c == width]
        return next((c for c in (*self.upwards, *square) if _has_a_factor(width, [c])), 0)

    def likely_channels(self, reader: Reader) -> int:
        """The channels to propose: those of the nearest map before a layer that divide its width; 0 for none.

        Never 1: such a map has no order to lose, and a reader who typed it would have answered without looking.
        """
        nearest = [*reversed(self.channels[: reader.behind]), *reversed(self.channels[reader.behind :])]
        found = next((count for count in nearest if reader.width % count == 0), 0)
        return found if found > 1 else 0

    def unexplained(self) -> set[int]:
        """The input widths that nothing known leads to.

        A layer with an explained input explains its outputs. Widths in a cycle (an encoder and its decoder, a
        square layer) do not explain each other, but they explain the widths that the cycle leads to.
        """
        explained = {*self.channels, *self.known}
        waiting = list(self.readers)

        def clear(one: Reader) -> bool:
            return one.width in explained or "features" in one.node.told

        while ready := [one for one in waiting if clear(one)]:
            waiting = [one for one in waiting if not clear(one)]
            explained.update(*(one.gives for one in ready))
        edges: dict[int, set[int]] = {}
        for one in waiting:
            edges.setdefault(one.width, set()).update(one.gives)
        return _firsts(edges)


def has_an_order(width: int) -> bool:
    """Whether a map of this many numbers can have several channels and positions: false for a prime."""
    return any(width % size == 0 for size in range(2, isqrt(width) + 1))


def read_widths(tree: TorchTree, moves: Sequence[Move]) -> Widths:
    """The widths of the layers that cross, in the order of their definition."""
    nodes = dict(_owners(tree.root, tree.root))
    modules = {one.origin: one.module for one in tree.root.walk()}
    found = Widths()
    readers: dict[int, Reader] = {}

    def reader(node: TorchNode, width: int, *gives: int, linear: bool = False) -> None:
        if id(node) not in readers:
            readers[id(node)] = Reader(node, width, linear=linear, behind=len(found.channels))
            found.readers.append(readers[id(node)])
        readers[id(node)].gives |= {*gives}

    def fixed(node: TorchNode, width: int, gives: int) -> None:
        found.readers.append(Reader(node, width, {gives}, fixed=True, behind=len(found.channels)))

    # A norm without a class may be a BatchNorm1d or a norm of maps: convolutions beside it with its width decide.
    beside = {
        (nodes[key].origin[:-1], tree.state[key].shape[1])
        for move in moves
        if move.rule in CONVOLUTIONS
        for key in move.torch_keys
        if tree.state[key].ndim > 2
    }
    rules = {key: move.rule for move in moves for key in move.torch_keys}
    for key, rule in ((key, rules[key]) for key in tree.state if key in rules):
        shape, node, name = tuple(tree.state[key].shape), nodes[key], key.rpartition(".")[2]
        if rule in CONVOLUTIONS and len(shape) > 2:
            up = "Transpose" in rule
            found.channels.append(getattr(node.module, "out_channels", shape[1] if up else shape[0]))
            owners = (node.origin[:end] for end in range(len(node.origin)))
            found.around.update((owner, modules.get(owner)) for owner in owners)
            takes = getattr(node.module, "in_channels", shape[1])
            found.flow.setdefault(takes, set()).add(found.channels[-1])
            found.upwards += [shape[0]] if up else []
        elif len(shape) == 1 and node.kind and issubclass(node.kind, nn.BatchNorm2d | nn.BatchNorm3d):
            found.channels.append(shape[0])
        elif rule in _GROUPED and name == "weight":
            found.grouped.append(Reader(node, shape[0], fixed=True))
        elif rule in _NORMS and len(shape) == 1 and shape[0] > 1:
            if node.kind is not None or (node.origin[:-1], shape[0]) not in beside:
                reader(node, shape[0])
        elif rule == "Linear" and len(shape) == 2 and shape[1] > 1:  # one input has no order
            reader(node, shape[1], shape[0], linear=True)
        elif rule in _ATTENTION:
            if name.endswith("_proj_weight"):  # the packed one has three of them
                fixed(node, shape[1], shape[0] // 3 if name.startswith("in_") else shape[0])
        elif rule in _BILINEAR and len(shape) == 3:
            fixed(node, shape[1], shape[0])
            fixed(node, shape[2], shape[0])
        elif rule in _RECURRENT and len(shape) == 2:
            if "weight_ih" not in key:
                reader(node, shape[1], shape[1], 2 * shape[1])
            elif "weight_ih_l0" in name or not name.startswith("weight_ih_l"):
                reader(node, shape[1])
        elif len(shape) == 2 and rule != "Linear":  # a table
            found.known |= {*shape}
        elif len(shape) == 2 and name == "weight":
            found.known.add(shape[0])
    return found


def _owners(node: TorchNode, owner: TorchNode) -> Iterable[tuple[str, TorchNode]]:
    """Pairs of each key and the layer that its tensor belongs to."""
    for leaf in node.leaves.values():
        yield leaf.key, leaf.owners[-1][0] if leaf.owners else owner
    for name, child in node.children.items():
        yield from _owners(child, owner if owner is not node or name == COMPUTED else child)


def _has_a_factor(width: int, sizes: Iterable[int]) -> bool:
    return any(1 < size < width and width % size == 0 for size in sizes)


def _firsts(edges: Mapping[int, set[int]]) -> set[int]:
    """The numbers that no others lead to, except such as they lead to themselves."""
    reach = {start: _reached(start, edges) for start in edges}
    return {one for one in edges if all(other in reach[one] for other in edges if one in reach[other])}


def _reached(start: int, edges: Mapping[int, set[int]]) -> set[int]:
    """The numbers that edges lead to."""
    found: set[int] = set()
    todo = [start]
    while todo:
        new = edges.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found
