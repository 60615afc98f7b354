"""Pairs the children of a torch module with those of a Flax scope.

The first of these that gives exactly one answer decides:

1. the same name (``layer1.0`` is also ``layer1_0`` and ``layer1/layers_0``);
2. the same position in two ordered containers of equal length (their numbers may have gaps);
3. the only child on the other side that fits by class, names below and shapes. Equal children are paired by
   number if both sides have numbers: the items of one ``Sequential`` or ``ModuleList`` in torch, automatic names
   in linen. Linen numbers modules as they are made, which is backwards in an expression such as
   ``Dense(2)(Dense(3)(x))``. So numbers count only while no shape contradicts them, and the plan says where it
   relied on them.

A child without a partner is left over, and one with several possible partners is a fault. No child is paired by
shape alone if another one fits as well.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from torchjax_bridge.exchange import join_path

from .._report import Fault
from ..rules import CELL_MARKS
from ..trees import FlaxNode, TorchNode
from ._search import Fits, Name, Opens, Pairs, UniqueFitSearch, group_by_prefix, rename_question

__all__ = ["Pairing", "pair_children", "with_loose_cells"]

# The first tensor of a recurrent layer, and what a cell of it adds to the layer's name.
_RECURRENT = frozenset({"weight_ih_l0"})
_CELL = re.compile(r"(_l?\d+)?(_(forward|fwd|backward|bwd|reverse))?(_l?\d+)?")

_Node = TypeVar("_Node", TorchNode, FlaxNode)


@dataclass(frozen=True)
class Pairing:
    """The paired children, and the others.

    Attributes:
        pairs: The pairs.
        torch_left: Torch nodes without partner.
        flax_left: Flax nodes without partner.
        faults: Nodes with more than one possible partner.
        notes: Conclusions from numbers whose direction shapes confirm.
        assumed: Conclusions from numbers alone, as pairs: the nodes, and the text.
    """

    pairs: tuple[tuple[TorchNode, FlaxNode], ...]
    torch_left: tuple[TorchNode, ...]
    flax_left: tuple[FlaxNode, ...]
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    assumed: tuple[tuple[str, str], ...] = ()


def pair_children(
    torch_node: TorchNode, flax_node: FlaxNode, fits: Fits, opens: Opens, may_fit: Fits
) -> Pairing:
    """Pair the children of two nodes.

    Args:
        torch_node: The parent on the torch side.
        flax_node: The parent on the Flax side.
        fits: Whether two subtrees fit without a fault.
        opens: Whether a torch node only holds others, so that its children may be paired instead.
        may_fit: Whether two subtrees would fit if the ambiguities in them were settled.
    """
    ours = {name: node for name, node in torch_node.children.items() if not node.empty}
    theirs = {name: node for name, node in flax_node.children.items() if name in ours or not node.empty}
    if ours and all(isinstance(name, int) for name in ours) and not _numbers(theirs):
        # A container: flax keeps its items under "layers" (nnx) or as "layers_0", ... (linen).
        inner = theirs.get("layers") or group_by_prefix(theirs, flax_node).get("layers")
        if inner is not None:
            rest = tuple(n for n in theirs.values() if n is not inner and n not in inner.children.values())
            found = pair_children(torch_node, inner, fits, opens, may_fit)
            return replace(found, flax_left=(*found.flax_left, *rest))
    pairs = _by_name(ours, theirs, flax_node)
    if not pairs and not torch_node.leaves and not flax_node.leaves:
        # One side has an extra level: a model in an attribute of a model.
        if len(ours) == 1 and len(theirs) > 1 and opens(only := next(iter(ours.values()))):
            return _noted(pair_children(only, flax_node, fits, opens, may_fit), only, "torch")
        if len(theirs) == 1 and len(ours) > 1 and not (inner := next(iter(theirs.values()))).leaves:
            return _noted(pair_children(torch_node, inner, fits, opens, may_fit), inner, "Flax")
    search = UniqueFitSearch(fits, opens, may_fit, torch_node, flax_node)
    search.run(list(ours.values()), list(theirs.values()))
    done = search.done
    shifted = [pair for pair in search.pairs if _is_shifted(pair, pairs, fits)]
    search.faults += [_shift_fault(pair, torch_node, flax_node) for pair in shifted]
    search.pairs = [pair for pair in search.pairs if pair not in shifted]
    return Pairing(
        (*pairs, *search.pairs),
        tuple(part for node in ours.values() for part in _without(node, done)),
        tuple(part for node in theirs.values() for part in _without(node, done)),
        tuple(search.faults),
        tuple(search.notes),
        tuple(search.assumed),
    )


def _noted(found: Pairing, level: TorchNode | FlaxNode, side: str) -> Pairing:
    """The same, with a note on the extra level of one side."""
    path = level.origin if isinstance(level, TorchNode) else level.path
    note = f"looked through '{path[-1]}.', a level that the {side} side alone has"
    return replace(found, notes=(note, *found.notes))


def with_loose_cells(found: Pairing, parent: FlaxNode) -> Pairing:
    """The same, with the remaining cells given to the one recurrent layer without a partner.

    Its rule decides which cell is which.
    """
    layers = [node for node in found.torch_left if _RECURRENT & node.leaves.keys()]
    cells = [node for node in found.flax_left if any(CELL_MARKS & set(path) for path in node.flat())]
    if len(layers) != 1 or len(cells) < 2:
        return found
    (layer,) = layers
    group = FlaxNode((*parent.path, layer.path[-1]), children={node.path[-1]: node for node in cells})
    return replace(
        found,
        pairs=(*found.pairs, (layer, group)),
        torch_left=tuple(node for node in found.torch_left if node is not layer),
        flax_left=tuple(node for node in found.flax_left if node not in cells),
    )


# --- by name, by place -------------------------------------------------------------------------------


def _by_name(ours: dict[Name, TorchNode], theirs: dict[Name, FlaxNode], parent: FlaxNode) -> Pairs:
    """Pair by name, and remove the pairs from both dicts."""
    pairs: Pairs = []
    our_numbers, their_numbers = _numbers(ours), _numbers(theirs)
    if our_numbers != their_numbers and len(our_numbers) == len(their_numbers):
        for one, other in zip(our_numbers, their_numbers, strict=True):
            pairs.append((ours.pop(one), theirs.pop(other)))
    for name in [name for name in ours if name in theirs]:
        pairs.append((ours.pop(name), theirs.pop(name)))
    for name in list(ours):
        group = _prefixed(ours[name], str(name), theirs, parent)
        if group is not None:
            gone = list(group.walk())
            for key in [key for key, node in theirs.items() if node in gone]:
                del theirs[key]
            pairs.append((ours.pop(name), group))
    return pairs


def _numbers(nodes: dict[Name, TorchNode] | dict[Name, FlaxNode]) -> list[int]:
    return sorted(name for name in nodes if isinstance(name, int))


def _prefixed(node: TorchNode, name: str, theirs: dict[Name, FlaxNode], parent: FlaxNode) -> FlaxNode | None:
    """Linen's ``blocks_0``, ``blocks_1`` or ``heads_a``, ``heads_b`` as one node with children.

    Likewise the cells of a recurrent layer, such as ``lstm_fwd`` and ``lstm_1_backward``: linen's ``RNN`` and
    ``Bidirectional`` have no scope. The rule decides which cell is which.
    """
    found: dict[Name, FlaxNode] = {}
    if _RECURRENT & node.leaves.keys():
        found = {
            key: child
            for key, child in theirs.items()
            if isinstance(key, str) and key.startswith(f"{name}_") and _CELL.fullmatch(key[len(name) :])
        }
        return FlaxNode((*parent.path, name), children=found) if found else None
    if not node.children:
        return None
    group = FlaxNode((*parent.path, name))
    for key, child in theirs.items():
        if isinstance(key, str) and key.startswith(f"{name}_"):
            _put(group, node, key[len(name) + 1 :], child)
    return group if group.children else None


def _put(group: FlaxNode, node: TorchNode, rest: str, child: FlaxNode) -> None:
    """Put a scope below a group by the rest of its name, level by level: ``0_1`` is item 1 of item 0."""
    if rest.isdecimal() or rest in node.children:
        group.children[int(rest) if rest.isdecimal() else rest] = child
        return
    for name, part in node.children.items():
        if rest.startswith(f"{name}_") and not part.leaves and part.children:
            inner = group.children.setdefault(name, FlaxNode((*group.path, name)))
            _put(inner, part, rest[len(str(name)) + 1 :], child)
            if not inner.children:
                del group.children[name]


# --- a numbering that is off by some ---------------------------------------------------------------------


def _is_shifted(pair: tuple[TorchNode, FlaxNode], named: Pairs, fits: Fits) -> bool:
    """Whether a pair found by shape alone is part of a series that both sides may number differently.

    Of ``conv1, conv2`` in torch and ``conv0, conv1`` in Flax, ``conv1`` need not be the same layer.
    """
    one, other = pair
    stem, theirs = _stem(one), _stem(other)
    if not stem or stem != theirs:
        return False
    return any(_stem(a) == stem == _stem(b) and fits(a, other) and fits(one, b) for a, b in named)


def _stem(node: TorchNode | FlaxNode) -> str:
    """The last name without its final number; empty if it has none."""
    name = str(node.path[-1]) if node.path else ""
    return name.rstrip("0123456789") if name[-1:].isdigit() else ""


def _shift_fault(pair: tuple[TorchNode, FlaxNode], torch_parent: TorchNode, parent: FlaxNode) -> Fault:
    one, other = pair
    path = join_path(one.origin)
    row = [node for node in parent.children.values() if _stem(node) == _stem(other)]
    return Fault(
        "ambiguous",
        f"{one.where} has no partner of its name, and {other.where} none either, but their equal siblings share "
        "names: the two sides may count from different numbers. Say which is which for all of them, "
        f"{rename_question(one, row, torch_parent, parent)}",
        path,
    )


def _without(node: _Node, done: set[int]) -> Iterable[_Node]:
    """The parts of a node that the search has not settled."""
    if id(node) in done or node.empty:
        return
    if any(id(below) in done for below in node.walk()):
        for child in node.children.values():
            yield from _without(child, done)
    else:
        yield node
