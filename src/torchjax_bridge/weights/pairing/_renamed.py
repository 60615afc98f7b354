"""Tensors that the caller renamed apart from their layer: the caller gives the place, the layer's rule the layout.

``Rename("fc.weight", "head.kernel")`` takes a weight out of its layer, and with it the class that tells its
layout. So each such tensor remembers its layers, and this file applies the rule of such a layer to the tensor
alone. A tensor that becomes one array together with others cannot be renamed alone: the caller renames the
whole layer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torchjax_bridge.exchange import Path, join_path, split_path

from .._report import Fault
from ..layouts import Identity
from ..rules import RULES, Entry, Layer, Rule
from ..trees import (
    FlaxNode,
    TorchLeaf,
    TorchNode,
    flax_assumptions,
    source_name,
    square_leaf_assumption,
    torch_assumptions,
)
from ._bind import Match, Move, bind_raw, is_square, misfit, unexpected_fault

__all__ = ["OwnerRules", "bind_moved", "split_off"]


@dataclass(frozen=True)
class OwnerRules:
    """A layer that holds a tensor, the tensor's name in it, and the rules for that layer.

    ``rules`` is empty if no rule for such a layer fills a scope of this class.
    """

    owner: TorchNode
    name: str
    rules: Sequence[Rule]


FindOwners = Callable[[TorchLeaf, FlaxNode], Sequence[OwnerRules]]
AskForClass = Callable[[TorchNode, list[Rule]], Fault]


def split_off(
    torch_node: TorchNode, flax_node: FlaxNode, owners: FindOwners, ask: AskForClass, *, deep: bool
) -> tuple[Match, TorchNode, FlaxNode]:
    """Bind the tensors that were renamed into a node; returns the two nodes without them.

    Args:
        torch_node: The node that holds renamed tensors.
        flax_node: Its partner.
        owners: Gives the layers of a tensor with their rules, outermost first; none for a parameter outside layers.
        ask: Makes the fault that asks for the class of a layer of a bare ``state_dict``.
        deep: Whether the nodes are bound as a whole, with all nodes below them.
    """
    inside = torch_node.flat() if deep else torch_node.leaves
    parts = []
    own: dict[str, TorchLeaf] = {}
    gone: set[str] = set()
    whole = flax_node
    for name, leaf in inside.items():
        if not leaf.owners:
            continue
        path = split_path(name)
        scope = _scope(whole, path[:-1])
        found = owners(leaf, scope)
        if not found:
            own[name] = leaf._replace(owners=())
            continue
        bound, place = bind_moved(leaf, str(path[-1]), scope, found, ask)
        parts.append(bound)
        gone.add(name)
        if place is not None:
            flax_node = _without_leaf(flax_node, (*path[:-1], *place))
    return Match.of(parts), _without(torch_node, gone, own), flax_node


def bind_moved(
    leaf: TorchLeaf, name: str, scope: FlaxNode, owners: Sequence[OwnerRules], ask: AskForClass
) -> tuple[Match, Path | None]:
    """Bind one renamed tensor; returns the match and the leaf that it takes.

    Args:
        leaf: The tensor.
        name: The name of the leaf, or the tensor's name in its layer.
        scope: The scope of the leaf.
        owners: As for `split_off`, at least one.
        ask: As for `split_off`.
    """
    refused: list[Fault] = []
    for owner_rules in owners:
        if not owner_rules.rules:
            why = f"'{leaf.key}' of {owner_rules.owner.where} cannot fill {scope.where}, a layer of another kind"
            layer = join_path(owner_rules.owner.origin)
            refused.append(Fault("mismatch", f"{why}; {_whole(layer)}", layer))
        if any(owner_rules.name in rule.keeps for rule in owner_rules.rules) and name not in scope.leaves:
            return Match(keeps=(leaf.key,)), None
        tried = [_apply(rule, owner_rules, leaf, name, scope) for rule in owner_rules.rules]
        tried.sort(
            key=lambda one: leaf.meta.ndim > 1 and one[0].flax_types[:1] in _NORMS
        )  # a matrix is rarely a norm's
        fits = {entry.layout: (rule, entry, path) for rule, entry, path, _ in reversed(tried) if entry}
        if len(fits) > 1:
            options = sorted(fits.values(), key=lambda one: isinstance(one[1].layout, Identity))
            return Match(faults=(ask(owner_rules.owner, [rule for rule, _, _ in options]),)), (name,)
        for rule, entry, path in fits.values():
            return _match(rule, owner_rules, leaf, scope, entry, path), path
        refused += [fault for _, _, _, fault in tried if fault is not None]
    if refused:
        return Match(faults=(refused[0],)), ((name,) if name in scope.leaves else None)
    found = bind_raw(
        owners[-1].owner,
        {name: leaf._replace(owners=())},
        {k: v for k, v in scope.leaves.items() if k == name},
    )
    return found, (name,) if name in scope.leaves else None


_BUILT_IN = frozenset(map(id, RULES))  # a caller's own rule needs no warning
_NORMS = (("LayerNorm",), ("GroupNorm",), ("RMSNorm",), ("BatchNorm",), ("InstanceNorm",))
_Tried = tuple[Rule, Entry | None, Path, Fault | None]


def _apply(rule: Rule, owner_rules: OwnerRules, leaf: TorchLeaf, name: str, scope: FlaxNode) -> _Tried:
    """The entry of a rule for this tensor, and the leaf that it fills; or a fault."""
    owner = owner_rules.owner

    def refused(why: str) -> _Tried:
        path = join_path(owner.origin)
        whole = (
            f'rename the whole layer, Rename("{path}", ...), or pass a Rule that says where its tensors go'
        )
        message = f"'{leaf.key}' of {owner.where} cannot be renamed on its own: {why}; {whole}"
        return rule, None, (), Fault("mismatch", message, path)

    ours = {key: one.meta for key, one in owner.flat().items() if not one.owners}
    ours |= {key: one.meta for key, one in owner.moved.items()}
    theirs = {path: place.shape for path, place in scope.flat().items()}
    layer = Layer(
        ours,
        theirs,
        owner.module,
        scope.kind,
        scope.module,
        owner.features,
        owner.kind,
        owner.output,
        owner.told,
    )
    given = scope.leaves.get(name)
    guesses = [theirs, theirs | {("kernel",): given.shape}] if given is not None else [theirs]
    entry, why = None, ""
    for shapes in guesses:
        try:
            entry = _entry_for(rule, replace(layer, flax=shapes), owner_rules.name)
        except (KeyError, ValueError) as err:
            why = str(err)
            continue
        why = ""
        break
    if why:
        return refused(why)
    if entry is None:
        return rule, None, (), None
    if len(entry.torch_names) > 1 or len(entry.flax_paths) != 1:
        sources = " and ".join(f"'{one}'" for one in entry.torch_names)
        targets = " and ".join(f"'{join_path(path)}'" for path in entry.flax_paths)
        return refused(f"by its layer's rule, {sources} become {targets} together")
    (usual,) = entry.flax_paths
    place = (name,) if given is not None else usual if name == owner_rules.name else ()
    there = scope.flat().get(place)
    if there is None:
        return rule, None, (), unexpected_fault(leaf, owner, f": {scope.where} has no '{name}'")
    if place != usual:
        try:
            entry = (
                _entry_for(rule, replace(layer, flax=theirs | {usual: there.shape}), owner_rules.name)
                or entry
            )
        except (KeyError, ValueError) as err:
            return refused(str(err))
        entry = replace(entry, collection=there.collection)
    fault = misfit(entry, owner, [leaf], [there])
    return (rule, entry, place, None) if fault is None else (rule, None, (), fault)


def _whole(path: str) -> str:
    return f'rename the whole layer, Rename("{path}", ...), or pass a Rule that says where its tensors go'


def _entry_for(rule: Rule, layer: Layer, name: str) -> Entry | None:
    return next((entry for entry in rule.entries_for(layer) if name in entry.torch_names), None)


def _match(
    rule: Rule, owner_rules: OwnerRules, leaf: TorchLeaf, scope: FlaxNode, entry: Entry, path: Path
) -> Match:
    owner, there = owner_rules.owner, scope.flat()[path]
    by_its_name = path in entry.flax_paths
    assumptions: list[str] = [entry.assumed] if entry.assumed else []
    if by_its_name:
        assumptions += [*torch_assumptions(rule, owner), *flax_assumptions(rule, owner, scope)]
    if not isinstance(entry.layout, Identity) and is_square([leaf], [there]) and not owner.declared:
        words = square_leaf_assumption(rule, owner, scope, path) if by_its_name else None
        if not by_its_name and id(rule) in _BUILT_IN:
            words = (
                f"'{owner_rules.name}' is square and renamed to '{join_path(there.path)}', a name that does not "
                f"show its layout: laid out by its layer's rule ({entry.layout})"
            )
            words += f"; LayerType(<path>, {source_name(owner.kind)}) says that it is" if owner.kind else ""
        assumptions += [words] if words else []
    move = Move(
        (leaf.key,),
        (there.path,),
        entry.layout,
        rule.name,
        owner.kind.__name__ if owner.kind else rule.name,
        entry.note,
    )
    layers = ((owner.origin, scope.path),) if by_its_name else ()
    return Match((move,), layers=layers, assumed=tuple([(owner.where, words) for words in assumptions]))


# --- nodes without bound tensors --------------------------------------------------------------------------


def _scope(node: FlaxNode, path: Path) -> FlaxNode:
    """The node at a path below another; an empty node if there is none."""
    for name in path:
        node = node.children.get(name) or FlaxNode((*node.path, name))
    return node


def _without(node: TorchNode, gone: set[str], own: dict[str, TorchLeaf], prefix: str = "") -> TorchNode:
    leaves = {
        name: own.get(prefix + name, leaf) for name, leaf in node.leaves.items() if prefix + name not in gone
    }
    children = {
        name: _without(child, gone, own, f"{prefix}{name}.")
        if _any_below(f"{prefix}{name}.", (*gone, *own))
        else child
        for name, child in node.children.items()
    }
    return replace(node, leaves=leaves, children=children)


def _any_below(prefix: str, names: Iterable[str]) -> bool:
    return any(name.startswith(prefix) for name in names)


def _without_leaf(node: FlaxNode, path: Path) -> FlaxNode:
    first, *rest = path
    if not rest:
        return replace(node, leaves={name: leaf for name, leaf in node.leaves.items() if name != first})
    below = {
        name: _without_leaf(child, tuple(rest)) if name == first else child
        for name, child in node.children.items()
    }
    return replace(node, children=below)
