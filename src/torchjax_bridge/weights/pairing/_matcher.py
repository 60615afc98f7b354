"""Structural matching: finds the Flax scope of each torch layer.

Walks both trees together. A layer with a rule is bound to its scope. A module without one matches its own
tensors by name, and ``_siblings`` pairs its children. A bare ``state_dict`` names no classes: each rule that
the names of the tensors allow is tried, and all that fit must agree. Equal torch layers beside one scope with
a leading axis are a scan over layers.

Guesses nothing: a layer with two answers becomes a fault that says how to settle it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torchjax_bridge.exchange import join_path

from .._report import Fault
from ..layouts import Stack
from ..rules import LOOKALIKES, PARTS, Rule
from ..trees import FlaxLeaf, FlaxNode, TorchLeaf, TorchNode
from ._alike import Structures
from ._bind import Match, Move, bind, bind_raw, missing_faults, unexpected_fault
from ._class_questions import class_fault
from ._custom_layers import custom_layer_fault, is_torch_layer, no_rule_fault
from ._fused import split_fused
from ._renamed import OwnerRules, split_off
from ._row_questions import ask_about_rows
from ._siblings import pair_children, with_loose_cells

__all__ = ["Matcher"]


class _Verdict(NamedTuple):
    fits: bool
    may_fit: bool


class _Known(NamedTuple):
    """A match, and the two nodes: while these live, nothing else has the ids that lead to it."""

    match: Match
    torch_node: TorchNode
    flax_node: FlaxNode


class Matcher:
    """Matches two trees under one set of rules; remembers what it has compared."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = tuple(rules)
        self._by_class: dict[type, list[Rule]] = {}
        for rule in self._rules:
            for kind in rule.types:
                self._by_class.setdefault(kind, []).append(rule)
        self._flax_types = frozenset(name for rule in rules for name in rule.flax_types)
        self._any_renamed: bool | None = None
        self._matches: dict[tuple[int, int], _Known] = {}
        self._structures = Structures(lambda node: node.kind is None or self.rule_for(node) is not None)
        self._verdicts: dict[tuple[int, int], _Verdict] = {}

    def match(self, torch_node: TorchNode, flax_node: FlaxNode) -> Match:
        """All moves and faults of two subtrees that belong together."""
        key = (id(torch_node), id(flax_node))
        if key not in self._matches:
            self._matches[key] = _Known(self._match(torch_node, flax_node), torch_node, flax_node)
        return self._matches[key].match

    def _match(self, torch_node: TorchNode, flax_node: FlaxNode) -> Match:
        if torch_node.fused:
            fused, ours, theirs = split_fused(torch_node, flax_node, self.match)
            return fused if ours.empty and theirs.empty else Match.of((fused, self.match(ours, theirs)))
        if self._any_renamed is None:
            self._any_renamed = bool(torch_node.moved)  # the walk begins at the root, which knows all of them
        if not self._any_renamed:
            return self._match_own(torch_node, flax_node)
        deep = self.rule_for(torch_node) is not None
        leaves = torch_node.flat() if deep else torch_node.leaves
        if not any(leaf.owners for leaf in leaves.values()):
            return self._match_own(torch_node, flax_node)
        moved, ours, theirs = split_off(torch_node, flax_node, self._owner_rules, class_fault, deep=deep)
        if ours.empty and theirs.empty:
            return moved
        return Match.of((moved, self._match_own(ours, theirs)))

    def _owner_rules(self, leaf: TorchLeaf, scope: FlaxNode) -> list[OwnerRules]:
        """The layers that hold a tensor, with the rules for them that fit its new scope."""
        found = []
        for owner, name in leaf.owners:
            if owner.kind is None:
                rules = self._rules_by_names(owner, FlaxNode(()))
                fitting = self._rules_by_names(owner, scope)
            else:
                rule = self.rule_for(owner)
                rules = [] if rule is None else [rule]
                fitting = [rule for rule in rules if self._can_fill(rule, scope) or scope.kind in PARTS]
            if rules:
                found.append(OwnerRules(owner, name, fitting))
        return found

    def _match_own(self, torch_node: TorchNode, flax_node: FlaxNode) -> Match:
        if torch_node.kind is not None:
            rule = self.rule_for(torch_node)
            found = (
                self._by_structure(torch_node, flax_node)
                if rule is None
                else self._typed(rule, torch_node, flax_node)
            )
        else:
            found = self._untyped(torch_node, flax_node)
        if not found.ok and (stacked := self._stacked(torch_node, flax_node)) is not None:
            return stacked
        if not found.ok and (axis := self._axis_of_layers(torch_node, flax_node)) is not None:
            return Match(faults=(_not_in_front(torch_node, flax_node, axis),))
        return found

    # --- one layer -----------------------------------------------------------------------------------

    def rule_for(self, node: TorchNode) -> Rule | None:
        """The rule for a layer's class, or for its nearest base class."""
        if node.kind is None:
            return None
        for kind in node.kind.__mro__:
            for rule in self._by_class.get(kind, ()):
                if rule.applies is None or rule.applies(node.names()):
                    return rule
        return None

    def _typed(self, rule: Rule, torch_node: TorchNode, flax_node: FlaxNode) -> Match:
        if not self._can_fill(rule, flax_node):
            message = f"{torch_node.where} cannot fill {flax_node.where}: it becomes a {rule.flax_types[0]}"
            return Match(faults=(Fault("mismatch", message, join_path(torch_node.origin)),))
        return bind(rule, torch_node, flax_node)

    def _can_fill(self, rule: Rule, flax_node: FlaxNode) -> bool:
        """Whether this rule may fill the scope: its class is one of the rule's, or of no rule's."""
        kind = flax_node.kind
        return not rule.flax_types or kind not in self._flax_types or kind in rule.flax_types

    def _rules_by_names(self, torch_node: TorchNode, flax_node: FlaxNode) -> list[Rule]:
        """The rules that the tensor names of a layer of a bare ``state_dict`` allow."""
        names = torch_node.names()
        rules = [rule for rule in self._rules if rule.may_be(names)]
        if flax_node.kind in self._flax_types:
            return [rule for rule in rules if flax_node.kind in rule.flax_types]
        return rules + [rule for rule in LOOKALIKES if rule.may_be(names)] if rules else rules

    def _untyped(self, torch_node: TorchNode, flax_node: FlaxNode) -> Match:
        """Match a node of a bare ``state_dict`` by every rule that its names allow, if they agree."""
        rules = self._rules_by_names(torch_node, flax_node)
        tried = [(rule, bind(rule, torch_node, flax_node)) for rule in rules]
        fits = {
            tuple((move.torch_keys, move.flax_paths, move.layout) for move in match.moves): (rule, match)
            for rule, match in reversed(tried)
            if match.ok
        }
        if len(fits) == 1:
            return next(iter(fits.values()))[1]
        if fits:
            return Match(faults=(class_fault(torch_node, [rule for rule, _ in fits.values()]),))
        inside = self._by_structure(torch_node, flax_node)
        return min([inside, *(match for _, match in tried)], key=lambda match: len(match.faults))

    # --- a module and its children --------------------------------------------------------------------

    def _by_structure(self, torch_node: TorchNode, flax_node: FlaxNode) -> Match:
        """Match a module without a rule: its own tensors by name, its children by structure."""
        torch_node = _with_parameter_lists_inlined(torch_node, flax_node)
        own = bind_raw(torch_node, dict(torch_node.leaves), dict(flax_node.leaves))
        if own.faults and (fault := custom_layer_fault(torch_node, flax_node)) is not None:
            return Match(faults=(fault,))
        if own.faults and torch_node.leaves and is_torch_layer(torch_node.kind):
            return Match(faults=(no_rule_fault(torch_node),))
        kept = {
            name: child
            for name, child in torch_node.children.items()
            if name not in flax_node.children and self._stays(child)
        }
        if kept:
            left = {name: child for name, child in torch_node.children.items() if name not in kept}
            torch_node = replace(torch_node, children=left)
        paired = pair_children(torch_node, flax_node, self._fits, self._opens, self._may_fit)
        paired = with_loose_cells(paired, flax_node)
        pair = (torch_node.origin, flax_node.path)
        here = Match(faults=paired.faults, notes=paired.notes, layers=(pair,), assumed=paired.assumed)
        below = [self.match(ours, theirs) for ours, theirs in paired.pairs]
        torch_left = [node for node in paired.torch_left if not self._stays(node)]
        stay = [*kept.values(), *(node for node in paired.torch_left if self._stays(node))]
        keeps = tuple(leaf.key for node in stay for leaf in node.flat().values())
        asked, torch_left, flax_left = ask_about_rows(torch_node, flax_node, torch_left, paired.flax_left)
        why = self._why(torch_left, flax_left)
        lost = [unexpected_fault(leaf, node) for node in torch_left for leaf in node.flat().values()]
        lost[:1] = [replace(fault, message=fault.message + why) for fault in lost[:1]]
        unknown = [no_rule_fault(node) for node in torch_left if self._has_no_rule(node)]
        empty = missing_faults(leaf for node in flax_left for leaf in node.flat().values())
        return Match.of((own, here, *below, Match(keeps=keeps, faults=(*asked, *unknown, *lost, *empty))))

    def _stays(self, node: TorchNode) -> bool:
        """Whether rules keep all of a layer's tensors in torch, so that it needs no scope."""
        if node.empty:
            return False
        if (rule := self.rule_for(node)) is not None:
            return node.flat().keys() <= set(rule.keeps)
        parts = [child for child in node.children.values() if not child.empty]
        return not node.leaves and all(self._stays(child) for child in parts)

    def _why(self, ours: Sequence[TorchNode], theirs: Sequence[FlaxNode]) -> str:
        """Why the only remaining layer does not fit the only remaining scope; else empty."""
        if len(ours) != 1 or len(theirs) != 1:
            return ""
        faults = self.match(ours[0], theirs[0]).faults
        return next((f"; {fault.message}" for fault in faults if fault.kind == "mismatch"), "")

    def _has_no_rule(self, node: TorchNode) -> bool:
        return not node.empty and is_torch_layer(node.kind) and self.rule_for(node) is None

    def _fits(self, torch_node: TorchNode, flax_node: FlaxNode) -> bool:
        return self._verdict(torch_node, flax_node).fits

    def _may_fit(self, torch_node: TorchNode, flax_node: FlaxNode) -> bool:
        """Whether a pair has no other faults than ambiguities."""
        return self._verdict(torch_node, flax_node).may_fit

    def _verdict(self, torch_node: TorchNode, flax_node: FlaxNode) -> "_Verdict":
        """Whether a pair fits. Cached by structure, so that equal blocks are not compared each with each."""
        key = (self._structures.of_torch(torch_node), self._structures.of_flax(flax_node))
        if key not in self._verdicts:
            faults = self.match(torch_node, flax_node).faults
            only_ambiguous = all(fault.kind == "ambiguous" and fault.even for fault in faults)
            self._verdicts[key] = _Verdict(not faults, only_ambiguous)
        return self._verdicts[key]

    def _opens(self, node: TorchNode) -> bool:
        """Whether a module only holds other modules."""
        return not node.leaves and self.rule_for(node) is None

    # --- scanned layers --------------------------------------------------------------------------------

    def _stacked(self, torch_node: TorchNode, flax_node: FlaxNode) -> Match | None:
        """Match equal torch layers with one Flax layer with a leading axis; None if they are not that."""
        layers, leaves = _numbered_layers(torch_node), _needed(flax_node)
        if not layers or not leaves:
            return None
        if any(leaf.shape[:1] != (len(layers),) for leaf in leaves):
            return None
        one = _slice(flax_node, len(layers))
        matches = [self.match(layer, one) for layer in layers]
        if (failed := next((match for match in matches if not match.ok), None)) is not None:
            # An ambiguity alone means that the layers would fit.
            kinds = {fault.kind for fault in failed.faults}
            return Match(faults=failed.faults) if kinds == {"ambiguous"} else None
        moves = []
        for group in zip(*(match.moves for match in matches), strict=True):
            first: Move = group[0]
            if any(move.flax_paths != first.flax_paths or move.layout != first.layout for move in group):
                return None
            keys = tuple(key for move in group for key in move.torch_keys)
            moves.append(replace(first, torch_keys=keys, layout=Stack(len(layers), first.layout)))
        keeps = tuple(key for match in matches for key in match.keeps)
        notes = tuple(note for match in matches for note in match.notes)
        layer_pairs = tuple(pair for match in matches for pair in match.layers)
        assumed = list(dict.fromkeys(one for match in matches for one in match.assumed))
        if _could_lie_otherwise([leaf.shape for leaf in leaves]):
            assumed.append((torch_node.where, _FIRST_AXIS))
        return Match(tuple(moves), keeps, notes=notes, layers=layer_pairs, assumed=tuple(assumed))

    def _axis_of_layers(self, torch_node: TorchNode, flax_node: FlaxNode) -> int | None:
        """An axis other than the first along which equal torch layers are stacked; None if there is none."""
        layers, shapes = _numbered_layers(torch_node), [leaf.shape for leaf in _needed(flax_node)]
        if not layers or not shapes:
            return None
        least = min(map(len, shapes))
        for axis in (*range(1, least), *range(-1, -least, -1)):
            if all(shape[axis] == len(layers) for shape in shapes):
                one = _slice(flax_node, len(layers), axis)
                if all(self.match(layer, one).ok for layer in layers):
                    return axis
        return None


def _numbered_layers(torch_node: TorchNode) -> list[TorchNode]:
    """The layers of a container that only holds numbered layers."""
    if torch_node.leaves or not all(isinstance(name, int) for name in torch_node.children):
        return []
    return [node for node in torch_node.children.values() if not node.empty]


def _with_parameter_lists_inlined(torch_node: TorchNode, flax_node: FlaxNode) -> TorchNode:
    """The module with the tensors of its ``ParameterList`` or ``ParameterDict`` as its own, as linen writes them.

    ``scales.0`` becomes the module's tensor ``scales_0`` if the scope has a leaf of that name.
    """
    found: dict[str, TorchLeaf] = {}
    left: dict[str | int, TorchNode] = {}
    for name, child in torch_node.children.items():
        if name not in flax_node.children and not child.children:
            inside = {f"{name}_{key}": leaf for key, leaf in child.leaves.items()}
            if inside.keys() & flax_node.leaves.keys():
                found |= inside
                continue
        left[name] = child
    return replace(torch_node, leaves=torch_node.leaves | found, children=left) if found else torch_node


_FIRST_AXIS = "taken to be stacked along the first axis of every leaf, and another axis has as many entries"


def _could_lie_otherwise(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether another axis could be the axis of the layers. A scan's ``variable_axes`` decides."""
    least = min(map(len, shapes))
    return any(
        all(_drop(shape, axis % len(shape)) == shape[1:] for shape in shapes)
        for axis in (*range(1, least), *range(1 - least, 0))
    )


def _drop(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _needed(node: FlaxNode) -> list[FlaxLeaf]:
    return [leaf for leaf in node.flat().values() if not leaf.optional]


def _slice(node: FlaxNode, count: int, axis: int = 0) -> FlaxNode:
    """The node for one of its stacked layers: without the axis of the layers."""
    return FlaxNode(
        node.path,
        node.kind,
        node.module,
        {
            name: leaf._replace(shape=_drop(leaf.shape, axis % len(leaf.shape)))
            for name, leaf in node.leaves.items()
            if not leaf.optional or leaf.shape[axis:][:1] == (count,)
        },
        {name: _slice(child, count, axis) for name, child in node.children.items()},
    )


# --- faults -------------------------------------------------------------------------------------------


def _not_in_front(torch_node: TorchNode, flax_node: FlaxNode, axis: int) -> Fault:
    return Fault(
        "mismatch",
        f"the layers of {torch_node.where} are stacked along axis {axis} in {flax_node.where}, and only the first "
        'axis is understood: scan with variable_axes={"params": 0} (nnx: vmap with out_axes=0), or move that axis '
        "of every leaf to the front with jnp.moveaxis",
        join_path(torch_node.origin),
    )
