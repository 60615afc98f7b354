"""What the shapes of a model show of its features: which layer reads how many, and what explains that many.

A map may be flattened unseen wherever a width has the channels of a map as a factor, so a width that another layer
gives explains a reader only where the two are defined side by side.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isqrt
from typing import Literal

from torch import nn

from torchjax_bridge.exchange import Path

from ..pairing import Move
from ..rules import RULES
from ..trees import TorchNode, TorchTree
from ._code import names_a_flatten

__all__ = ["COMPUTED", "CONVOLUTIONS", "PER_FEATURE", "Reader", "Widths", "has_a_factor", "read_widths"]

# The submodule in which torch keeps the tensors that a parametrization computes from.
COMPUTED = "parametrizations"
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


Kind = Literal["norm", "linear", "recurrent", "fixed", "grouped"]


@dataclass(eq=False)
class Reader:
    """A layer that reads features.

    Attributes:
        node: The layer.
        width: How many it reads.
        kind: ``fixed`` if only torch's order will do; ``grouped`` is a GroupNorm, which is fixed too.
        behind: The number of convolutions and norms of maps defined before it.
        gives: How many features it gives.
        flat: Whether it reads a flattened map, as was said or asked, or what a layer makes of one.
        sure: Whether it is known what it reads.
    """

    node: TorchNode
    width: int
    kind: Kind
    behind: int
    gives: set[int] = field(default_factory=set)
    flat: bool = False
    sure: bool = False


@dataclass(eq=False)
class Widths:
    """The widths that the shapes of the model show.

    Attributes:
        channels: Of output maps of convolutions and norms, in order.
        flow: Of input maps of convolutions, with those that they make of them.
        firsts: Of input maps that no convolution in front gives.
        upwards: Of input maps of transposed convolutions.
        known: Of embedding tables and the like.
        readers: The layers that read features, in order.
        around: The modules with a convolution, by path.
    """

    channels: list[int] = field(default_factory=list)
    flow: dict[int, set[int]] = field(default_factory=dict)
    firsts: set[int] = field(default_factory=set)
    upwards: list[int] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    readers: list[Reader] = field(default_factory=list)
    around: dict[Path, nn.Module | None] = field(default_factory=dict)

    def explains(self, reader: Reader) -> bool:
        """Whether a map or a table has as many features; for a GroupNorm, a map that is read too."""
        width = reader.width
        return (
            width in self.known or width in self.channels or (reader.kind == "grouped" and width in self.flow)
        )

    def follows(self, reader: Reader, last: Reader) -> bool:
        """Whether a layer reads what the one defined right before it gives.

        Code that flattens the map of a convolution beside them may give it that instead, unless the one before
        reads what is flattened.
        """
        side_by_side = last.sure and last.behind == reader.behind and reader.width in last.gives
        return side_by_side and (last.flat or not names_a_flatten(self.around.get(reader.node.origin[:-1])))

    def reads_channels(self, reader: Reader) -> bool:
        """Whether it reads as many features as the last map in front of it has channels, which is no inner one.

        A norm may be one of an inner map, in front of the convolution that reads it; a GroupNorm, of any map.
        """
        if reader.kind == "grouped":
            return self.explains(reader)
        if not reader.behind or self.channels[reader.behind - 1] != reader.width:
            return False
        ends = self._ends if reader.gives else self._ends & {*self.channels[: reader.behind]}
        return reader.width in ends or not has_a_factor(reader.width, ends)

    @cached_property
    def _ends(self) -> set[int]:
        """The channels that convolutions make no others of, except such as lead back to them."""
        made = {count: _reached(count, self.flow) for count in (*self.flow, *self.channels)}
        return {count for count in self.channels if all(count in made[other] for other in made[count])}

    def of_a_map_made_of(self, width: int, upsamples: bool) -> int:
        """The channels of a map that may be made of so many features; 0 for none.

        A transposed convolution may read it, or a convolution that has none in front; in a model that makes larger
        maps or images, any convolution.
        """
        draws = upsamples or any(min(makes) <= _IMAGE < takes for takes, makes in self.flow.items())
        makers = self.flow if draws else self.firsts
        square = [c for c in makers if c > _IMAGE and isqrt(width // c) ** 2 * c == width]
        return next((c for c in (*self.upwards, *square) if has_a_factor(width, [c])), 0)

    def likely_channels(self, reader: Reader) -> int:
        """The channels to propose: those of the nearest map before a layer that divide its width; 0 for none.

        Never 1: such a map has no order to lose, and a reader who typed it would have answered without looking.
        """
        nearest = [*reversed(self.channels[: reader.behind]), *reversed(self.channels[reader.behind :])]
        found = next((count for count in nearest if reader.width % count == 0), 0)
        return found if found > 1 else 0


def read_widths(tree: TorchTree, moves: Sequence[Move]) -> Widths:
    """The widths of the layers that cross, in the order of their definition."""
    nodes = dict(_owners(tree.root, tree.root))
    modules = {one.origin: one.module for one in tree.root.walk()}
    rules = {key: move.rule for move in moves for key in move.torch_keys}
    maps = {key for key, rule in rules.items() if rule in CONVOLUTIONS and tree.state[key].ndim > 2}
    # A norm without a class may be a BatchNorm1d or a norm of maps: convolutions beside it with its width decide.
    beside = {(nodes[key].origin[:-1], tree.state[key].shape[1]) for key in maps}
    found = Widths()
    readers: dict[tuple[int, int], Reader] = {}

    def read(kind: Kind, node: TorchNode, width: int, *gives: int) -> None:
        place = id(node), width if kind == "fixed" else 0
        readers.setdefault(place, Reader(node, width, kind, len(found.channels))).gives.update(gives)

    for key, rule in ((key, rules[key]) for key in tree.state if key in rules):
        shape, node, name = tuple(tree.state[key].shape), nodes[key], key.rpartition(".")[2]
        if key in maps:
            up = "Transpose" in rule
            takes = getattr(node.module, "in_channels", shape[0 if up else 1])
            found.firsts |= {takes} - {*found.channels}
            found.channels.append(getattr(node.module, "out_channels", shape[1 if up else 0]))
            found.flow.setdefault(takes, set()).add(found.channels[-1])
            found.upwards += [takes] if up else []
            owners = (node.origin[:end] for end in range(len(node.origin)))
            found.around.update((owner, modules.get(owner)) for owner in owners)
        elif len(shape) == 1 and node.kind and issubclass(node.kind, nn.BatchNorm2d | nn.BatchNorm3d):
            found.channels.append(shape[0])
        elif rule in _GROUPED:
            read("grouped", node, shape[0])
        elif rule in _NORMS:
            one_each = len(shape) == 1 and shape[0] > 1
            if one_each and (node.kind or (node.origin[:-1], shape[0]) not in beside):
                read("norm", node, shape[0])
        elif rule in _ATTENTION:
            if name.endswith("_proj_weight"):  # the packed one has three of them
                read("fixed", node, shape[1], shape[0] // 3 if name.startswith("in_") else shape[0])
        elif rule in _BILINEAR and len(shape) == 3:
            read("fixed", node, shape[1], shape[0])
            read("fixed", node, shape[2], shape[0])
        elif len(shape) == 2 and rule in _RECURRENT:
            if "weight_ih" not in key:
                read("recurrent", node, shape[1], shape[1], 2 * shape[1])
            elif "weight_ih_l0" in name or not name.startswith("weight_ih_l"):
                read("recurrent", node, shape[1])
        elif len(shape) == 2 and rule != "Linear":  # a table
            found.known |= {*shape}
        elif len(shape) == 2 and shape[1] > 1:  # one input has no order
            read("linear", node, shape[1], shape[0])
        elif len(shape) == 2 and name == "weight":
            found.known.add(shape[0])
    found.readers += readers.values()
    return found


def _owners(node: TorchNode, owner: TorchNode) -> Iterable[tuple[str, TorchNode]]:
    """Pairs of each key and the layer that its tensor belongs to."""
    for leaf in node.leaves.values():
        yield leaf.key, leaf.owners[-1][0] if leaf.owners else owner
    for name, child in node.children.items():
        yield from _owners(child, owner if owner is not node or name == COMPUTED else child)


def has_a_factor(width: int, sizes: Iterable[int]) -> bool:
    """Whether one of these sizes divides a width into more than one part, of more than one."""
    return any(1 < size < width and width % size == 0 for size in sizes)


def _reached(start: int, edges: Mapping[int, set[int]]) -> set[int]:
    """The numbers that edges lead to."""
    found: set[int] = set()
    todo = [start]
    while todo:
        new = edges.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found
