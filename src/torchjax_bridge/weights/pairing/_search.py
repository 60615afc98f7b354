"""The last resort of pairing siblings: searches for the only candidate by class, names below and shapes.

Takes the nodes without a partner by name or position, and opens holders that fit nothing as a whole. In the
end, each node has the only partner that fits, is refused for having several, or is left over. Equal nodes are
paired by their numbers in linen's automatic names and torch's containers; ``_siblings`` says how far such
numbers count.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from torchjax_bridge.exchange import Path, join_path, split_path

from .._report import Fault, Series
from ..rules import Rename
from ..trees import FlaxNode, TorchNode

__all__ = [
    "Fits",
    "Name",
    "Opens",
    "Pairs",
    "UniqueFitSearch",
    "group_by_prefix",
    "rename_question",
    "restrict_series",
]

_NUMBERED = re.compile(r"^(.*)_(\d+)$")

Name = str | int
Pairs = list[tuple[TorchNode, FlaxNode]]
Fits = Callable[[TorchNode, FlaxNode], bool]
Opens = Callable[[TorchNode], bool]


class UniqueFitSearch:
    """Pairs nodes that have no partner by name, and opens holders that fit nothing as a whole."""

    def __init__(
        self, fits: Fits, opens: Opens, may_fit: Fits, torch_parent: TorchNode, parent: FlaxNode
    ) -> None:
        self._fits, self._opens, self._may_fit = fits, opens, may_fit
        self._torch_parent, self._parent = torch_parent, parent
        self.pairs: Pairs = []
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self.assumed: list[tuple[str, str]] = []
        self.done: set[int] = set()
        self._sought: set[int] = set()  # the nodes without a partner by name

    def run(self, ours: list[TorchNode], theirs: list[FlaxNode]) -> None:
        """Pair until nothing changes."""
        self._sought = {id(node) for one in ours for node in one.walk()}
        while ours and theirs:
            groups = group_by_prefix({node.path[-1]: node for node in theirs}, self._parent).values()
            before = len(self.done)
            # A group of one would compete with its only member.
            wanted = [*theirs, *(group for group in groups if len(group.children) > 1)]
            opened_ours = [part for node in ours for part in self._open(node)]
            last = opened_ours == ours  # no further torch nodes can appear
            self._round(ours, {id(one): [o for o in wanted if self._fits(one, o)] for one in ours}, last)
            if len(self.done) == before:
                # An ambiguity inside a node would only grow once the node is open.
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
        """The partners that a node may have once ambiguities are settled: the one of its name, if possible."""
        found = [other for other in theirs if self._may_fit(one, other)]
        return [other for other in found if other.path[-1] == one.path[-1]] or found

    def _round(self, ours: list[TorchNode], options: dict[int, list[FlaxNode]], last: bool) -> None:
        """Settle each set of nodes that compete for the same partners. Unequal sets wait for the last round."""
        certain: Pairs = []
        numbered: list[Pairs] = []
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
                how = "by number" if one[0].called is None else "in the order of their calls"
                words = f"equal, and paired {how} with {one[1].where} to {another[1].where}"
                # One neighbour that is paired by shape in the same direction confirms the others.
                if _numbers_of(certain, pairs):
                    self.notes.append(f"{subject}: {words}")
                else:
                    nested = "which is backwards if they are written as Layer()(Layer()(x))"
                    scopes = [node for _, node in pairs]
                    which = rename_question(one[0], scopes, self._torch_parent, self._parent)
                    self.assumed.append((subject, f"{words}, {nested}; say which is which, {which}"))
            else:
                why = ", and their numbers run the other way where shapes tell"
                self._refuse([one for one, _ in pairs], [other for _, other in pairs], why)
        self._accept(certain)

    def _accept(self, pairs: Pairs) -> None:
        self.pairs += pairs
        for one, other in pairs:
            self.done |= {id(node) for node in one.walk()} | {id(node) for node in other.walk()}

    def _refuse(self, ours: list[TorchNode], theirs: list[FlaxNode], why: str) -> None:
        left = ", ".join(node.where for node in ours)
        right = ", ".join(node.where for node in theirs)
        one = join_path(ours[0].origin)
        rename = self._by_equal_numbers(ours, theirs)
        how = (
            f"if their numbers say which is which, rules=[{rename}, ...]"
            if rename
            else f"say which is which, {rename_question(ours[0], theirs, self._torch_parent, self._parent)}"
        )
        message = f"{left} fit {right} equally well{why}; {how}{_in_order(ours, theirs)}"
        series = self._series(ours, theirs)
        self.faults.append(Fault("ambiguous", message, one, even=len(ours) == len(theirs), series=series))
        self.done |= {id(node) for parent in ours for node in parent.walk()}
        self.done |= {id(node) for parent in theirs for node in parent.walk()}

    def _by_equal_numbers(self, ours: list[TorchNode], theirs: list[FlaxNode]) -> Rename | None:
        """The one rename for ``layers.0, layers.1, ...`` to ``block0, block1, ...``; None if it would not do."""
        numbers = [node.path[-1] for node in ours]
        stem = str(theirs[0].path[-1]).rstrip("0123456789")
        places = {(*theirs[0].path[:-1], f"{stem}{number}") for number in numbers}
        if len(ours) < 2 or not all(isinstance(number, int) for number in numbers):
            return None
        if len({node.origin[:-1] for node in ours}) > 1 or places != {node.path for node in theirs}:
            return None
        beside = [node for node in self._torch_parent.walk() if node.origin[:-1] == ours[0].origin[:-1]]
        if any(id(node) not in self._sought and not node.empty for node in beside if node.origin):
            return None  # the rule would rename it too
        inside = theirs[0].path[len(self._parent.path) : -1]
        wanted = join_path((*self._torch_parent.path, *inside, f"{stem}*"))
        return Rename(join_path((*ours[0].origin[:-1], "*")), wanted)

    def _series(self, ours: list[TorchNode], theirs: list[FlaxNode]) -> Series | None:
        """What an ambiguity shares with those of equal blocks, and the rule that settles all of them."""
        torch_parent, parent = self._torch_parent, self._parent
        numbers = [name for name in torch_parent.origin if isinstance(name, int)]
        any_place = _with_stars(parent.path, numbers) if _is_automatic(parent) else None
        any_place = any_place or _with_stars(torch_parent.path, numbers)
        if not numbers or any_place is None:
            return None
        any_block = tuple("*" if isinstance(name, int) else name for name in torch_parent.origin)
        inside = tuple([join_path(node.origin[len(torch_parent.origin) :]) for node in ours])
        places = tuple([join_path(node.path[len(parent.path) :]) for node in theirs])
        pattern = join_path((*any_block, inside[0]))
        options = [join_path((*any_place, *node.path[len(parent.path) :])) for node in theirs]
        return Series(_one_of(pattern, options), pattern, inside, places)


def _with_stars(path: Path, numbers: Sequence[int]) -> Path | None:
    """The path with a ``*`` for each of these numbers. None unless they end segments of it in this order."""
    left, found = list(numbers), []
    for name in path:
        stem = str(name).removesuffix(str(left[0])) if left else str(name)
        if stem == str(name) or stem[-1:].isdigit():
            found.append(str(name))
        else:
            found.append(f"{stem}*")
            left.pop(0)
    return None if left else tuple(found)


def _rivals(
    one: TorchNode, waiting: list[TorchNode], options: dict[int, list[FlaxNode]]
) -> tuple[list[TorchNode], list[FlaxNode]]:
    """All nodes that compete with a node, directly or through others, and all their candidates."""
    wanted = {id(other): other for other in options[id(one)]}
    rivals: dict[int, TorchNode] = {}
    grown = True
    while grown:
        grown = False
        for node in waiting:
            could_be = {id(other): other for other in options[id(node)]}
            if id(node) not in rivals and not could_be.keys().isdisjoint(wanted):
                rivals[id(node)] = node
                wanted |= could_be
                grown = True
    return list(rivals.values()), list(wanted.values())


def _by_their_names(
    ours: list[TorchNode], theirs: list[FlaxNode], options: dict[int, list[FlaxNode]]
) -> Pairs:
    """Pairs equal candidates under different parents by their own names, if both sides have the same names."""
    named = {str(node.path[-1]): node for node in theirs}
    pairs = [(node, named.get(str(node.path[-1]))) for node in ours if isinstance(node.path[-1], str)]
    found = [(one, other) for one, other in pairs if other is not None and other in options[id(one)]]
    partners = {id(other) for _, other in found}
    return found if len(partners) == len(ours) == len(theirs) == len(named) else []


def _by_number(ours: list[TorchNode], theirs: list[FlaxNode]) -> Pairs:
    """Pairs equal candidates by linen's numbers and the order of torch's calls, or else torch's numbers."""
    numbers = [_number(node, ours[0]) for node in ours]
    places = [_place(node) for node in theirs]
    if len(ours) != len(theirs) or None in numbers or None in places:
        return []
    if len({place[0] for place in places if place}) != 1:
        return []
    first = sorted(ours, key=lambda node: _number(node, ours[0]) or 0)
    other = sorted(theirs, key=lambda node: (_place(node) or ((), 0))[1])
    return list(zip(first, other, strict=True))


def _number(node: TorchNode, beside: TorchNode) -> int | None:
    """A number by which a node can be compared with another: of its first call, or else in their container."""
    if node.called is not None and beside.called is not None:
        return node.called
    name = node.path[-1]
    return name if isinstance(name, int) and node.path[:-1] == beside.path[:-1] else None


def _place(node: FlaxNode) -> tuple[tuple[Name, ...], int] | None:
    """The path and prefix of an automatic name, and its number; None for other names."""
    numbered = _NUMBERED.match(str(node.path[-1]))
    if numbered is None or node.kind is None:
        return None
    return (*node.path[:-1], numbered.group(1)), int(numbered.group(2))


def _runs_forward(known: Pairs, pairs: Pairs) -> bool:
    """Whether numbers rise together among all pairs that have comparable ones."""
    return all(before[1] < after[1] for before, after in pairwise(sorted(_numbers_of(known, pairs))))


def _numbers_of(known: Pairs, pairs: Pairs) -> list[tuple[int, int]]:
    """The numbers on both sides of the known pairs that can be compared with those of ``pairs``."""
    prefix = (_place(pairs[0][1]) or ((), 0))[0]
    line = []
    for one, other in known:
        place = _place(other)
        number = _number(one, pairs[0][0])
        if number is not None and place is not None and place[0] == prefix:
            line.append((number, place[1]))
    return line


def _open_flax(node: FlaxNode) -> list[FlaxNode]:
    # A WeightNorm or SpectralNorm changes its layer, so the layer cannot be paired instead.
    if node.leaves or "layer_instance" in node.children:
        return [node]
    return [child for child in node.children.values() if not child.empty]


def group_by_prefix(theirs: dict[Name, FlaxNode], parent: FlaxNode) -> dict[str, FlaxNode]:
    """Children named ``prefix_0``, ``prefix_1``, ... as one ordered node for each prefix."""
    groups: dict[str, FlaxNode] = {}
    for name, node in theirs.items():
        numbered = _NUMBERED.match(name) if isinstance(name, str) else None
        if numbered:
            prefix, number = numbered.groups()
            group = groups.setdefault(prefix, FlaxNode((*parent.path, prefix)))
            group.children[int(number)] = node
    return groups


def rename_question(
    one: TorchNode, options: Sequence[FlaxNode], torch_parent: TorchNode, parent: FlaxNode
) -> str:
    """The `Rename` that asks which scope a node is. It has a blank, so that it is no answer as it stands."""
    above = torch_parent.path if not _is_automatic(parent) else parent.path
    places = [join_path((*above, *other.path[len(parent.path) :])) for other in options]
    return f"rules=[{_one_of(join_path(one.origin), places)}, ...]"


def _is_automatic(node: FlaxNode) -> bool:
    """Whether linen gave a scope its name. Torch cannot have such a name, so messages use the Flax path."""
    return node.module is None and node.kind is not None and not node.one_of_many


def _one_of(pattern: str, places: Sequence[str]) -> str:
    more = " or ..." if len(places) > _MOST_OPTIONS else ""
    options = " or ".join(f'"{place}"' for place in places[:_MOST_OPTIONS])
    return f'Rename("{pattern}", <{options}{more}>)'


_MOST_OPTIONS = 4


def _in_order(ours: Sequence[TorchNode], theirs: Sequence[FlaxNode]) -> str:
    """What the order of definition suggests, if both sides have kept it. Sorted names may have lost it."""
    names = [str(node.path[-1]) for node in theirs]
    known = all(node.module is not None for node in ours) and names != sorted(names)
    one_parent = len({node.origin[:-1] for node in ours}) == len({node.path[:-1] for node in theirs}) == 1
    if not (known and one_parent and len(ours) == len(theirs)):
        return ""
    pairs = ", ".join(
        f"'{one.origin[-1]}' as '{other.path[-1]}'" for one, other in zip(ours, theirs, strict=True)
    )
    return f" (they are defined in the order that has {pairs}, which proves nothing)"


def restrict_series(faults: Sequence[Fault], root: TorchNode) -> list[Fault]:
    """The faults, without each series whose pattern also matches a layer outside the series.

    Layers that the caller has renamed do not count: the earlier rule decides there.
    """
    ambiguous: dict[Series, set[str]] = {}
    for fault in faults:
        if fault.series and fault.series.pattern:
            ambiguous.setdefault(fault.series, set()).add(fault.path)
    nodes = [node for node in root.walk() if node.origin[-1:] == node.path[-1:]] if ambiguous else []
    too_wide = set()
    for series, paths in ambiguous.items():
        pattern = Rename(series.pattern, "")
        depth = len(split_path(series.pattern))
        reached = (node.origin for node in nodes if len(node.origin) == depth)
        if any(pattern.apply(path) is not None and join_path(path) not in paths for path in reached):
            too_wide.add(series)
    return [replace(fault, series=None) if fault.series in too_wide else fault for fault in faults]
