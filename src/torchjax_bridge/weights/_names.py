"""Structural matching: which torch layer is which Flax scope.

Both sides are trees. The walk goes down the two trees together; at every pair of parents the children are
paired by the first of these that gives one answer:

1. the same name (``layer1.0`` is also ``layer1_0`` and ``layer1/layers_0``);
2. the same place in two ordered containers of equal length (their numbers may have gaps);
3. the only child on the other side that fits by class, names below and shapes; several equal ones are told
   apart by their order only where both sides fix one: a ``Sequential`` or ``ModuleList`` here, linen's
   automatic numbers there.

A child that still has no partner is a fault; so is one with several. Nothing is guessed from a shape alone
when something else would fit as well.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from torchjax_bridge.exchange import join_path

from ._bind import Match, Move, bind, bind_raw, missing, unexpected
from ._flax_tree import FlaxNode
from ._layout import Stack
from ._report import Fault
from ._torch_tree import TorchNode
from .rules import LOOKALIKES, Rule

__all__ = ["Matcher"]

_NUMBERED = re.compile(r"^(.*)_(\d+)$")

_Name = str | int
_Node = TypeVar("_Node", TorchNode, FlaxNode)
_Pairs = list[tuple[TorchNode, FlaxNode]]


class Matcher:
    """Matches two trees under one set of rules; remembers what it has compared."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = tuple(rules)
        self._flax_types = frozenset(name for rule in rules for name in rule.flax_types)
        self._seen: dict[tuple[int, int], Match] = {}
        self._alive: list[FlaxNode] = []  # the made-up nodes whose ids are keys above

    def match(self, torch_node: TorchNode, flax_node: FlaxNode) -> Match:
        """All moves and faults of two subtrees that belong together."""
        key = (id(torch_node), id(flax_node))
        if key not in self._seen:
            self._alive.append(flax_node)
            self._seen[key] = self._match(torch_node, flax_node)
        return self._seen[key]

    def _match(self, torch_node: TorchNode, flax_node: FlaxNode) -> Match:
        if torch_node.kind is not None:
            rule = self.rule_for(torch_node)
            found = (
                self._inside(torch_node, flax_node)
                if rule is None
                else self._typed(rule, torch_node, flax_node)
            )
        else:
            found = self._untyped(torch_node, flax_node)
        if not found.ok and (stacked := self._stacked(torch_node, flax_node)) is not None:
            return stacked
        return found

    # --- one layer -----------------------------------------------------------------------------------

    def rule_for(self, node: TorchNode) -> Rule | None:
        """The rule of a layer of known class: its own, or its nearest ancestor's."""
        if node.kind is None:
            return None
        names = None
        for kind in node.kind.__mro__:
            for rule in self._rules:
                if kind not in rule.types:
                    continue
                if rule.applies is not None:
                    names = names if names is not None else frozenset(node.flat())
                    if not rule.applies(names):
                        continue
                return rule
        return None

    def _typed(self, rule: Rule, torch_node: TorchNode, flax_node: FlaxNode) -> Match:
        kind = flax_node.kind
        if rule.flax_types and kind in self._flax_types and kind not in rule.flax_types:
            message = f"{torch_node.where} cannot fill {flax_node.where}: it becomes a {rule.flax_types[0]}"
            return Match(faults=(Fault("mismatch", message, join_path(torch_node.origin)),))
        return bind(rule, torch_node, flax_node)

    def _untyped(self, torch_node: TorchNode, flax_node: FlaxNode) -> Match:
        """A node of a bare ``state_dict``: every rule that its names allow, if they agree."""
        names = frozenset(torch_node.flat())
        rules = [rule for rule in self._rules if rule.may_be(names)]
        if flax_node.kind in self._flax_types:
            rules = [rule for rule in rules if flax_node.kind in rule.flax_types]
        elif rules:
            rules += [rule for rule in LOOKALIKES if rule.may_be(names)]
        tried = [(rule, bind(rule, torch_node, flax_node)) for rule in rules]
        fits = {
            tuple((move.torch_keys, move.flax_paths, move.layout) for move in match.moves): (rule, match)
            for rule, match in reversed(tried)
            if match.ok
        }
        if len(fits) == 1:
            return next(iter(fits.values()))[1]
        if fits:
            return Match(faults=(_which_class(torch_node, [rule for rule, _ in fits.values()]),))
        inside = self._inside(torch_node, flax_node)
        return min([inside, *(match for _, match in tried)], key=lambda match: len(match.faults))

    # --- a module and what is in it --------------------------------------------------------------------

    def _inside(self, torch_node: TorchNode, flax_node: FlaxNode) -> Match:
        """A module without a rule: its own tensors by name, its children by structure."""
        own = bind_raw(torch_node, dict(torch_node.leaves), dict(flax_node.leaves))
        if own.faults and torch_node.leaves and _is_torchs_own(torch_node.kind):
            return Match(faults=(_no_rule(torch_node),))
        pairs, torch_left, flax_left, faults = self._pair(torch_node, flax_node)
        match = own + Match(faults=tuple(faults))
        for ours, theirs in pairs:
            match += self.match(ours, theirs)
        lost = [unexpected(leaf, node) for node in torch_left for leaf in node.flat().values()]
        no_rule = [_no_rule(node) for node in torch_left if self._has_no_rule(node)]
        empty = [missing(leaf) for node in flax_left for leaf in node.flat().values()]
        return match + Match(faults=(*no_rule, *lost, *empty))

    def _has_no_rule(self, node: TorchNode) -> bool:
        return bool(node.leaves) and _is_torchs_own(node.kind) and self.rule_for(node) is None

    def _pair(
        self, torch_node: TorchNode, flax_node: FlaxNode
    ) -> tuple[_Pairs, list[TorchNode], list[FlaxNode], list[Fault]]:
        """The children that belong together, and what is left on either side."""
        ours = {name: node for name, node in torch_node.children.items() if not node.empty}
        theirs = {name: node for name, node in flax_node.children.items() if not node.empty}
        if ours and all(isinstance(name, int) for name in ours) and not _numbers(theirs):
            # A container: flax keeps its items under "layers" (nnx) or as "layers_0", ... (linen).
            inner = theirs.get("layers") or _group(theirs, flax_node).get("layers")
            if inner is not None and "layers" not in ours:
                rest = [
                    node
                    for name, node in theirs.items()
                    if node is not inner and node not in inner.children.values() and name != "layers"
                ]
                self._alive.append(inner)
                pairs, left, right, faults = self._pair(torch_node, inner)
                return pairs, left, right + rest, faults
        if not set(ours) & set(theirs):
            # One side has a level of its own: a model held in an attribute of a model.
            if len(ours) == 1 and len(theirs) > 1 and (only := self._level(ours, torch_node)):
                return self._pair(only, flax_node)
            if len(theirs) == 1 and len(ours) > 1 and not flax_node.leaves:
                (wrapped,) = theirs.values()
                if not wrapped.leaves:
                    return self._pair(torch_node, wrapped)
        pairs = _by_name(ours, theirs, flax_node)
        more, faults = self._by_fit(list(ours.values()), list(theirs.values()), flax_node)
        for one, other in more:
            _drop(ours, one)
            _drop(theirs, other)
        pairs += more
        matched = {id(node) for _, other in more for node in other.walk()}
        settled = {id(node) for one, _ in more for node in one.walk()}
        blamed = bool(faults)
        left = [part for node in ours.values() if not blamed for part in _uncovered(node, settled)]
        right = [part for node in theirs.values() if not blamed for part in _uncovered(node, matched)]
        return pairs, left, right, faults

    # --- the last resort: what fits, and only it ---------------------------------------------------------

    def _by_fit(
        self, ours: list[TorchNode], theirs: list[FlaxNode], parent: FlaxNode
    ) -> tuple[_Pairs, list[Fault]]:
        """Pair what is left by class and shapes, opening containers that fit nothing as a whole."""
        pairs: _Pairs = []
        faults: list[Fault] = []
        while ours and theirs:
            groups = list(_group({node.path[-1]: node for node in theirs}, parent).values())
            found, ambiguous = self._unique(ours, [*theirs, *groups])
            pairs += found
            faults += ambiguous
            gone = {id(node) for _, other in found for node in (other, *other.children.values())}
            theirs = [node for node in theirs if id(node) not in gone]
            taken = {id(node) for node, _ in found}
            ours = [node for node in ours if id(node) not in taken]
            if ambiguous:
                break
            if not found:
                opened_ours = [part for node in ours for part in self._open(node)]
                if len(opened_ours) == len(ours) and all(
                    one is other for one, other in zip(opened_ours, ours, strict=True)
                ):
                    opened = [part for node in theirs for part in _open_flax(node)]
                    if len(opened) == len(theirs):
                        break
                    theirs = opened
                ours = opened_ours
        return pairs, faults

    def _level(self, ours: dict[_Name, TorchNode], parent: TorchNode) -> TorchNode | None:
        (node,) = ours.values()
        if parent.leaves or node.leaves or self.rule_for(node) is not None:
            return None
        return node

    def _open(self, node: TorchNode) -> list[TorchNode]:
        """The children of a container that owns nothing itself; else the node."""
        if node.leaves or self.rule_for(node) is not None:
            return [node]
        return [child for child in node.children.values() if not child.empty]

    def _unique(self, ours: list[TorchNode], theirs: list[FlaxNode]) -> tuple[_Pairs, list[Fault]]:
        fits = {id(one): [other for other in theirs if self._fits(one, other)] for one in ours}
        pairs: _Pairs = []
        faults: list[Fault] = []
        open_ours = [one for one in ours if fits[id(one)]]
        while open_ours:
            one = open_ours[0]
            options = fits[id(one)]
            rivals = [node for node in open_ours if any(other in options for other in fits[id(node)])]
            if len(rivals) == 1 and len(options) == 1:
                pairs.append((one, options[0]))
            elif all(fits[id(node)] == options for node in rivals) and (
                ordered := _in_order(rivals, options)
            ):
                pairs += ordered
            else:
                faults.append(_which_partner(rivals, options))
            used = {id(other) for _, other in pairs} | {id(other) for other in options}
            open_ours = [node for node in open_ours if node not in rivals]
            for node in open_ours:
                fits[id(node)] = [other for other in fits[id(node)] if id(other) not in used]
            open_ours = [node for node in open_ours if fits[id(node)]]
        return pairs, faults

    def _fits(self, torch_node: TorchNode, flax_node: FlaxNode) -> bool:
        return self.match(torch_node, flax_node).ok

    # --- scanned layers --------------------------------------------------------------------------------

    def _stacked(self, torch_node: TorchNode, flax_node: FlaxNode) -> Match | None:
        """Equal torch layers that are one Flax layer with a leading axis; None when they are not."""
        layers = [node for node in torch_node.children.values() if not node.empty]
        leaves = flax_node.flat()
        if torch_node.leaves or not layers or not leaves:
            return None
        if not all(isinstance(name, int) for name in torch_node.children):
            return None
        if any(leaf.shape[:1] != (len(layers),) for leaf in leaves.values()):
            return None
        one = _slice(flax_node)
        self._alive.append(one)
        matches = [self.match(layer, one) for layer in layers]
        if not all(match.ok for match in matches):
            return None
        moves = []
        for group in zip(*(match.moves for match in matches), strict=True):
            first: Move = group[0]
            if any(move.flax_paths != first.flax_paths or move.layout != first.layout for move in group):
                return None
            keys = tuple(key for move in group for key in move.torch_keys)
            moves.append(replace(first, torch_keys=keys, layout=Stack(len(layers), first.layout)))
        return Match(tuple(moves), tuple(key for match in matches for key in match.keeps))


# --- names -------------------------------------------------------------------------------------------


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
            for node in group.children.values():
                _drop(theirs, node)
            pairs.append((ours.pop(name), group))
    return pairs


def _numbers(nodes: dict[_Name, TorchNode] | dict[_Name, FlaxNode]) -> list[int]:
    return sorted(name for name in nodes if isinstance(name, int))


def _prefixed(node: TorchNode, name: str, theirs: dict[_Name, FlaxNode], parent: FlaxNode) -> FlaxNode | None:
    """Linen's ``blocks_0``, ``blocks_1`` or ``heads_a``, ``heads_b`` as one node with children."""
    found: dict[_Name, FlaxNode] = {}
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


def _slice(node: FlaxNode) -> FlaxNode:
    """The node as one of its stacked layers sees it: without the leading axis."""
    return FlaxNode(
        node.path,
        node.kind,
        node.module,
        {name: replace(leaf, shape=leaf.shape[1:]) for name, leaf in node.leaves.items()},
        {name: _slice(child) for name, child in node.children.items()},
    )


def _open_flax(node: FlaxNode) -> list[FlaxNode]:
    if node.leaves:
        return [node]
    return [child for child in node.children.values() if not child.empty]


def _drop(nodes: dict[_Name, TorchNode] | dict[_Name, FlaxNode], gone: TorchNode | FlaxNode) -> None:
    for name, node in list(nodes.items()):
        if node is gone:
            del nodes[name]


def _uncovered(node: _Node, done: set[int]) -> Iterable[_Node]:
    """The parts of a container that were not paired while it was open."""
    if id(node) in done or node.empty:
        return
    if any(id(below) in done for below in node.walk()):
        for child in node.children.values():
            yield from _uncovered(child, done)
    else:
        yield node


# --- order -------------------------------------------------------------------------------------------


def _in_order(ours: list[TorchNode], theirs: list[FlaxNode]) -> _Pairs:
    """Equal candidates paired by order, if both sides have one; else nothing."""
    if len(ours) != len(theirs):
        return []
    parents = {node.path[:-1] for node in ours}
    if len(parents) != 1 or not all(isinstance(node.path[-1], int) for node in ours):
        return []
    numbers: dict[int, FlaxNode] = {}
    prefixes = set()
    for node in theirs:
        numbered = _NUMBERED.match(str(node.path[-1]))
        if numbered is None or node.kind is None:
            return []
        prefixes.add((node.path[:-1], numbered.group(1)))
        numbers[int(numbered.group(2))] = node
    if len(prefixes) != 1:
        return []
    first = sorted(ours, key=lambda node: int(node.path[-1]))
    return list(zip(first, [numbers[number] for number in sorted(numbers)], strict=True))


# --- words -------------------------------------------------------------------------------------------


def _is_torchs_own(kind: type | None) -> bool:
    return kind is not None and kind.__module__.startswith("torch.nn.modules") and kind is not nn.Module


def _no_rule(node: TorchNode) -> Fault:
    names = ", ".join(node.leaves)
    kind = node.kind.__name__ if node.kind else "?"
    return Fault(
        "no rule",
        f"torch.nn.{kind} ({names}) has no counterpart in Flax; pass rules=[Rule({kind}, [Entry(...), ...])] "
        "that says where its tensors go",
        join_path(node.origin),
    )


def _which_class(node: TorchNode, rules: list[Rule]) -> Fault:
    shapes = ", ".join(f"{name} {tuple(leaf.meta.shape)}" for name, leaf in node.flat().items())
    options = " or ".join(rule.name for rule in rules)
    kind = next((kind.__name__ for rule in rules for kind in rule.types), "Linear")
    path = join_path(node.origin)
    return Fault(
        "ambiguous",
        f"{node.where} ({shapes}) could be {options}, which convert differently; pass the nn.Module instead "
        f'of its state_dict, or rules=[LayerType("{path}", nn.{kind})]',
        path,
    )


def _which_partner(ours: list[TorchNode], theirs: list[FlaxNode]) -> Fault:
    left = ", ".join(node.where for node in ours)
    right = ", ".join(node.where for node in theirs)
    one, other = join_path(ours[0].origin), join_path(theirs[0].path)
    return Fault(
        "ambiguous",
        f"{left} fit {right} equally well; say which is which, for example "
        f'rules=[Rename("{one}", "{other}"), ...]',
        one,
    )
