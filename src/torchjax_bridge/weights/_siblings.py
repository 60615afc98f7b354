"""Siblings: which child of a torch module is which child of a Flax scope.

The children of two parents that belong together are paired by the first of these that gives one answer:

1. the same name (``layer1.0`` is also ``layer1_0`` and ``layer1/layers_0``);
2. the same place in two ordered containers of equal length (their numbers may have gaps);
3. the only child on the other side that fits by class, names below and shapes. Several equal ones are told
   apart by their numbers, if both sides number them: the items of one ``Sequential`` or ``ModuleList`` here,
   linen's automatic names there. Linen numbers modules as they are made, which in an expression such as
   ``Dense(2)(Dense(3)(x))`` is backwards; so the numbers count only while no shape contradicts them, and the plan
   says where they were relied on.

A child without partner is left over, and one with several is a fault. Nothing is paired by its shape alone when
something else would fit as well.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

from torchjax_bridge.exchange import join_path

from ._flax_tree import FlaxNode
from ._report import Fault
from ._torch_tree import TorchNode
from .rules import Rename

__all__ = ["Pairing", "pair_children"]

_NUMBERED = re.compile(r"^(.*)_(\d+)$")

# The first tensor of a recurrent layer, and the name of a cell of it, behind the layer's own.
_RECURRENT = frozenset({"weight_ih_l0"})
_CELL = re.compile(r"(_l?\d+)?(_(forward|fwd|backward|bwd|reverse))?(_l?\d+)?")

_Name = str | int
_Node = TypeVar("_Node", TorchNode, FlaxNode)
_Pairs = list[tuple[TorchNode, FlaxNode]]
_Fits = Callable[[TorchNode, FlaxNode], bool]
_Opens = Callable[[TorchNode], bool]


@dataclass(frozen=True)
class Pairing:
    """The children that belong together, and the others.

    Attributes:
        pairs: What belongs together.
        torch_left: Torch nodes without partner.
        flax_left: Flax nodes without partner.
        faults: Nodes with more than one possible partner.
        notes: What was concluded from numbers whose direction shapes bear out.
        assumed: What was concluded from numbers alone: about which nodes, and what.
    """

    pairs: tuple[tuple[TorchNode, FlaxNode], ...]
    torch_left: tuple[TorchNode, ...]
    flax_left: tuple[FlaxNode, ...]
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    assumed: tuple[tuple[str, str], ...] = ()


def pair_children(
    torch_node: TorchNode, flax_node: FlaxNode, fits: _Fits, opens: _Opens, may_fit: _Fits
) -> Pairing:
    """Pair the children of two nodes.

    Args:
        torch_node: The parent on the torch side.
        flax_node: The parent on the Flax side.
        fits: Whether two subtrees fit, wholly and without a fault.
        opens: Whether a torch node is a mere holder, whose children may stand for it.
        may_fit: Whether two subtrees would fit, were a doubt inside them settled.
    """
    ours = {name: node for name, node in torch_node.children.items() if not node.empty}
    theirs = {name: node for name, node in flax_node.children.items() if not node.empty}
    if ours and all(isinstance(name, int) for name in ours) and not _numbers(theirs):
        # A container: flax keeps its items under "layers" (nnx) or as "layers_0", ... (linen).
        inner = theirs.get("layers") or _group(theirs, flax_node).get("layers")
        if inner is not None:
            rest = tuple(n for n in theirs.values() if n is not inner and n not in inner.children.values())
            found = pair_children(torch_node, inner, fits, opens, may_fit)
            return replace(found, flax_left=(*found.flax_left, *rest))
    pairs = _by_name(ours, theirs, flax_node)
    if not pairs and not torch_node.leaves and not flax_node.leaves:
        # One side has a level of its own: a model held in an attribute of a model.
        if len(ours) == 1 and len(theirs) > 1 and opens(only := next(iter(ours.values()))):
            return pair_children(only, flax_node, fits, opens, may_fit)
        if len(theirs) == 1 and len(ours) > 1 and not (inner := next(iter(theirs.values()))).leaves:
            return pair_children(torch_node, inner, fits, opens, may_fit)
    search = _Search(fits, opens, may_fit, torch_node, flax_node)
    search.run(list(ours.values()), list(theirs.values()))
    done = search.done
    shifted = [pair for pair in search.pairs if _is_shifted(pair, pairs, fits)]
    search.faults += [_shift(pair, torch_node, flax_node) for pair in shifted]
    search.pairs = [pair for pair in search.pairs if pair not in shifted]
    return Pairing(
        (*pairs, *search.pairs),
        tuple(part for node in ours.values() for part in _without(node, done)),
        tuple(part for node in theirs.values() for part in _without(node, done)),
        tuple(search.faults),
        tuple(search.notes),
        tuple(search.assumed),
    )


# --- by name, by place -------------------------------------------------------------------------------


def _by_name(ours: dict[_Name, TorchNode], theirs: dict[_Name, FlaxNode], parent: FlaxNode) -> _Pairs:
    """Pair by name, and take the pairs out of both dicts."""
    pairs: _Pairs = []
    our_numbers, their_numbers = _numbers(ours), _numbers(theirs)
    if our_numbers != their_numbers and len(our_numbers) == len(their_numbers):
        for one, other in zip(our_numbers, their_numbers, strict=True):
            pairs.append((ours.pop(one), theirs.pop(other)))
    for name in [name for name in ours if name in theirs]:
        pairs.append((ours.pop(name), theirs.pop(name)))
    for name in list(ours):
        group = _prefixed(ours[name], str(name), theirs, parent)
        if group is not None:
            gone = list(group.children.values())
            for key in [key for key, node in theirs.items() if node in gone]:
                del theirs[key]
            pairs.append((ours.pop(name), group))
    return pairs


def _numbers(nodes: dict[_Name, TorchNode] | dict[_Name, FlaxNode]) -> list[int]:
    return sorted(name for name in nodes if isinstance(name, int))


def _prefixed(node: TorchNode, name: str, theirs: dict[_Name, FlaxNode], parent: FlaxNode) -> FlaxNode | None:
    """Linen's ``blocks_0``, ``blocks_1`` or ``heads_a``, ``heads_b`` as one node with children.

    So are the cells of a recurrent layer, whose ``RNN`` and ``Bidirectional`` have no scope: ``lstm_fwd``,
    ``lstm_1_backward``. Which of them is which is for its rule to say.
    """
    found: dict[_Name, FlaxNode] = {}
    if _RECURRENT & node.leaves.keys():
        found = {
            key: child
            for key, child in theirs.items()
            if isinstance(key, str) and key.startswith(f"{name}_") and _CELL.fullmatch(key[len(name) :])
        }
        return FlaxNode((*parent.path, name), children=found) if found else None
    for key, child in theirs.items():
        if isinstance(key, str) and key.startswith(f"{name}_"):
            rest = key[len(name) + 1 :]
            if rest.isdecimal() or rest in node.children:
                found[int(rest) if rest.isdecimal() else rest] = child
    if not found or not node.children:
        return None
    return FlaxNode((*parent.path, name), children=found)


def _group(theirs: dict[_Name, FlaxNode], parent: FlaxNode) -> dict[str, FlaxNode]:
    """Children named ``prefix_0``, ``prefix_1``, ... as one ordered node for every prefix."""
    groups: dict[str, FlaxNode] = {}
    for name, node in theirs.items():
        numbered = _NUMBERED.match(name) if isinstance(name, str) else None
        if numbered:
            prefix, number = numbered.groups()
            group = groups.setdefault(prefix, FlaxNode((*parent.path, prefix)))
            group.children[int(number)] = node
    return groups


# --- a numbering that is off by some ---------------------------------------------------------------------


def _is_shifted(pair: tuple[TorchNode, FlaxNode], named: _Pairs, fits: _Fits) -> bool:
    """Whether a pair found by shape alone belongs to a row of names that both sides may number differently.

    ``conv1, conv2`` here and ``conv0, conv1`` there: ``conv1`` is in both, and need not be the same layer.
    """
    one, other = pair
    stem, theirs = _stem(one), _stem(other)
    if not stem or stem != theirs:
        return False
    return any(_stem(a) == stem == _stem(b) and fits(a, other) and fits(one, b) for a, b in named)


def _stem(node: TorchNode | FlaxNode) -> str:
    """A name without the number at its end; empty where it has none."""
    name = str(node.path[-1]) if node.path else ""
    return name.rstrip("0123456789") if name[-1:].isdigit() else ""


def _rename(one: TorchNode, other: FlaxNode, torch_parent: TorchNode, parent: FlaxNode) -> Rename:
    """The rule that makes two nodes a pair by name and leaves their parents to be each other's."""
    name = (*torch_parent.path, *other.path[len(parent.path) :])
    return Rename(join_path(one.origin), join_path(name))


def _shift(pair: tuple[TorchNode, FlaxNode], torch_parent: TorchNode, parent: FlaxNode) -> Fault:
    one, other = pair
    path = join_path(one.origin)
    return Fault(
        "ambiguous",
        f"{one.where} has no partner of its name, and {other.where} none either, but their equal siblings share "
        "names: the two sides may count from different numbers. Say which is which for all of them, for example "
        f"rules=[{_rename(one, other, torch_parent, parent)}, ...]",
        path,
    )


# --- by what alone fits --------------------------------------------------------------------------------


class _Search:
    """Pairs what has no partner by name, opening holders that fit nothing as a whole."""

    def __init__(
        self, fits: _Fits, opens: _Opens, may_fit: _Fits, torch_parent: TorchNode, parent: FlaxNode
    ) -> None:
        self._fits, self._opens, self._may_fit = fits, opens, may_fit
        self._torch_parent, self._parent = torch_parent, parent
        self.pairs: _Pairs = []
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self.assumed: list[tuple[str, str]] = []
        self.done: set[int] = set()

    def run(self, ours: list[TorchNode], theirs: list[FlaxNode]) -> None:
        """Pair until nothing changes any more."""
        while ours and theirs:
            groups = _group({node.path[-1]: node for node in theirs}, self._parent).values()
            before = len(self.done)
            # A group of one would compete with the one.
            wanted = [*theirs, *(group for group in groups if len(group.children) > 1)]
            opened_ours = [part for node in ours for part in self._open(node)]
            last = opened_ours == ours  # nothing more can turn up on the torch side
            self._round(ours, {id(one): [o for o in wanted if self._fits(one, o)] for one in ours}, last)
            if len(self.done) == before:
                # What is in doubt inside would be in doubt among more candidates once it is open.
                self._round(ours, {id(one): self._likely(one, wanted) for one in ours}, last)
            if len(self.done) == before:
                opened_theirs = [part for node in theirs for part in _open_flax(node)]
                if not last:
                    ours = opened_ours
                elif opened_theirs != theirs:
                    theirs = opened_theirs
                else:
                    return
            ours = [node for node in ours if id(node) not in self.done]
            theirs = [node for node in theirs if id(node) not in self.done]

    def _open(self, node: TorchNode) -> list[TorchNode]:
        return [n for n in node.children.values() if not n.empty] if self._opens(node) else [node]

    def _likely(self, one: TorchNode, theirs: list[FlaxNode]) -> list[FlaxNode]:
        """The partners that a node would have, were a doubt settled: the one of its name, if that is among them."""
        found = [other for other in theirs if self._may_fit(one, other)]
        return [other for other in found if other.path[-1] == one.path[-1]] or found

    def _round(self, ours: list[TorchNode], options: dict[int, list[FlaxNode]], last: bool) -> None:
        """Settle every set of nodes that compete for the same partners, of equal numbers unless it is the last."""
        certain: _Pairs = []
        numbered: list[_Pairs] = []
        waiting = [one for one in ours if options[id(one)]]
        while waiting:
            rivals, wanted = _rivals(waiting[0], waiting, options)
            if len(rivals) == len(wanted) == 1:
                certain.append((rivals[0], wanted[0]))
            elif by_name := _by_their_names(rivals, wanted, options):
                certain += by_name
            elif all(options[id(node)] == wanted for node in rivals) and (
                pairs := _by_number(rivals, wanted)
            ):
                numbered.append(pairs)
            elif last or len(rivals) == len(wanted):
                self._refuse(rivals, wanted, "")
            waiting = [node for node in waiting if node not in rivals]
        for pairs in numbered:
            if _runs_forward([*certain, *(pair for other in numbered for pair in other)], pairs):
                self._accept(pairs)
                one, another = pairs[0], pairs[-1]
                subject = f"{one[0].where} to {another[0].where}"
                words = f"equal, and paired by number with {one[1].where} to {another[1].where}"
                # One neighbour that its shape pairs in the same direction bears the others out.
                if _line(certain, pairs):
                    self.notes.append(f"{subject}: {words}")
                else:
                    nested = "which is backwards if they are written as Layer()(Layer()(x))"
                    rename = _rename(*one, self._torch_parent, self._parent)
                    self.assumed.append(
                        (subject, f"{words}, {nested}; rules=[{rename}, ...] says that it is not")
                    )
            else:
                why = ", and their numbers run the other way where shapes tell"
                self._refuse([one for one, _ in pairs], [other for _, other in pairs], why)
        self._accept(certain)

    def _accept(self, pairs: _Pairs) -> None:
        self.pairs += pairs
        for one, other in pairs:
            self.done |= {id(node) for node in one.walk()} | {id(node) for node in other.walk()}

    def _refuse(self, ours: list[TorchNode], theirs: list[FlaxNode], why: str) -> None:
        left = ", ".join(node.where for node in ours)
        right = ", ".join(node.where for node in theirs)
        alike = [node for node in theirs if node.path[-1] == ours[0].path[-1]]
        one = join_path(ours[0].origin)
        rename = _rename(ours[0], (alike or theirs)[0], self._torch_parent, self._parent)
        message = (
            f"{left} fit {right} equally well{why}; say which is which, for example rules=[{rename}, ...]"
        )
        self.faults.append(Fault("ambiguous", message, one, even=len(ours) == len(theirs)))
        self.done |= {id(node) for parent in ours for node in parent.walk()}
        self.done |= {id(node) for parent in theirs for node in parent.walk()}


def _rivals(
    one: TorchNode, waiting: list[TorchNode], options: dict[int, list[FlaxNode]]
) -> tuple[list[TorchNode], list[FlaxNode]]:
    """Everything that competes with a node, directly or through others, and all they could be."""
    wanted = list(options[id(one)])
    rivals: list[TorchNode] = []
    grown = True
    while grown:
        grown = False
        for node in waiting:
            if node not in rivals and any(other in wanted for other in options[id(node)]):
                rivals.append(node)
                wanted += [other for other in options[id(node)] if other not in wanted]
                grown = True
    return rivals, wanted


def _by_their_names(
    ours: list[TorchNode], theirs: list[FlaxNode], options: dict[int, list[FlaxNode]]
) -> _Pairs:
    """Equal candidates under different parents by their own names, if both sides have the same; else nothing."""
    named = {str(node.path[-1]): node for node in theirs}
    pairs = [(node, named.get(str(node.path[-1]))) for node in ours if isinstance(node.path[-1], str)]
    found = [(one, other) for one, other in pairs if other is not None and other in options[id(one)]]
    partners = {id(other) for _, other in found}
    return found if len(partners) == len(ours) == len(theirs) == len(named) else []


def _by_number(ours: list[TorchNode], theirs: list[FlaxNode]) -> _Pairs:
    """Equal candidates by their numbers, if both sides have them; else nothing."""
    if len(ours) != len(theirs) or len({node.path[:-1] for node in ours}) != 1:
        return []
    places = [_place(node) for node in theirs]
    if not all(isinstance(node.path[-1], int) for node in ours) or None in places:
        return []
    if len({place[0] for place in places if place}) != 1:
        return []
    first = sorted(ours, key=lambda node: int(node.path[-1]))
    other = sorted(theirs, key=lambda node: (_place(node) or ((), 0))[1])
    return list(zip(first, other, strict=True))


def _place(node: FlaxNode) -> tuple[tuple[_Name, ...], int] | None:
    """The scope and prefix of an automatic name, and its number."""
    numbered = _NUMBERED.match(str(node.path[-1]))
    if numbered is None or node.kind is None:
        return None
    return (*node.path[:-1], numbered.group(1)), int(numbered.group(2))


def _runs_forward(known: _Pairs, pairs: _Pairs) -> bool:
    """Whether, among all pairs of the same container and prefix, numbers rise together."""
    return all(before[1] < after[1] for before, after in pairwise(sorted(_line(known, pairs))))


def _line(known: _Pairs, pairs: _Pairs) -> list[tuple[int, int]]:
    """The numbers, on both sides, of the known pairs of the same container and prefix as ``pairs``."""
    container = pairs[0][0].path[:-1]
    prefix = (_place(pairs[0][1]) or ((), 0))[0]
    line = []
    for one, other in known:
        place = _place(other)
        if one.path[:-1] == container and place is not None and place[0] == prefix:
            line.append((int(one.path[-1]), place[1]))
    return line


def _open_flax(node: FlaxNode) -> list[FlaxNode]:
    # A WeightNorm or SpectralNorm changes the layer that it holds, so that layer does not stand for it.
    if node.leaves or "layer_instance" in node.children:
        return [node]
    return [child for child in node.children.values() if not child.empty]


def _without(node: _Node, done: set[int]) -> Iterable[_Node]:
    """The parts of a node that were not settled while it was open."""
    if id(node) in done or node.empty:
        return
    if any(id(below) in done for below in node.walk()):
        for child in node.children.values():
            yield from _without(child, done)
    else:
        yield node
