"""Whether the names that the caller's renames give are there on the Flax side.

A pair may be found by structure whatever it is called, so a name that is nowhere would pass unseen and its layer go
elsewhere. What a name may stand for is what the pairing takes it for: ``blocks.0`` is also ``blocks_0`` and
``blocks/layers_0``, and a container that has no scope is none the less the place of what is in it.
"""

from collections.abc import Mapping
from itertools import takewhile

from torchjax_bridge.exchange import Path, join_path

from .._nearest import did_you_mean
from .._report import Fault
from ..rules import Rename
from ..trees import FlaxNode, TorchNode, TorchTree
from ._bind import Match

__all__ = ["names_that_are_not_there"]


def names_that_are_not_there(
    tree: TorchTree, flax: FlaxNode, match: Match, meant: Mapping[Path, Path]
) -> list[Fault]:
    """A fault for every rename whose place in Flax is another than it says, or nowhere.

    Args:
        tree: The torch side.
        flax: The Flax side.
        match: What they come to.
        meant: For places of renamed layers, the whole paths in Flax that the renames say.
    """
    if not tree.targets:
        return []
    pairs: dict[Path, list[Path]] = {}
    for ours, theirs in match.layers:
        pairs.setdefault(ours, []).append(theirs)
    faults: dict[tuple[Rename, Path], Fault] = {}
    places = {
        move.torch_keys[0]: move.flax_paths[0] for move in match.moves if move.torch_keys and move.flax_paths
    }
    scopes = [node.path for node in flax.walk() if node.path]
    leaves = [(*node.path, name) for node in flax.walk() for name in node.leaves]
    for place, rename in tree.targets.items():
        node = _at(tree.root, place)
        if place in meant and node is not None and meant[place] not in pairs.get(node.origin, []):
            went = next(
                (f", which is paired with '{join_path(one)}'" for one in pairs.get(node.origin, [])), ""
            )
            message = f"{rename} gives '{join_path(node.origin)}' a place in another block than its own{went}"
            faults[rename, place] = Fault("rules", message, join_path(meant[place]))
            continue
        target = place
        for _ in takewhile(lambda name: name == "*", reversed(rename.flax.split("."))):
            target = target[:-1]  # that is called as it is in torch
        if not target:
            continue
        node, names = _at(tree.root, target), scopes
        if node is not None and not node.empty:
            found = pairs.get(node.origin, [])
            right = any(_agree(target, path) for path in found) if found else _is_there(target, scopes)
        else:
            parent = _at(tree.root, target[:-1])
            leaf = parent.leaves.get(str(target[-1])) if parent is not None else None
            if parent is None or leaf is None:
                continue
            moved = leaf.key in places
            if moved and not _only_renamed(parent):
                continue  # its scope is the twin of a layer
            if moved or not _is_there(target[:-1], scopes):
                target = target[:-1]
            names = scopes if len(target) < len(place) else leaves
            right = _agree(target, places[leaf.key][:-1]) if moved else _is_there(target, names)
            right = right or bool(leaf.owners and target[-1] == leaf.owners[-1][1])
        if not right:
            near = did_you_mean(join_path(target), map(join_path, names))
            faults[rename, target] = Fault(
                "rules", f"{rename} names nothing on the Flax side{near}", join_path(target)
            )
    return list(faults.values())


def _at(node: TorchNode, path: Path) -> TorchNode | None:
    for name in path:
        child = node.children.get(name)
        if child is None:
            return None
        node = child
    return node


def _only_renamed(node: TorchNode) -> bool:
    """Whether a node is there for the sake of tensors that were renamed into it."""
    return bool(node.path) and node.module is None and all(leaf.owners for leaf in node.leaves.values())


def _agree(target: Path, path: Path) -> bool:
    """Whether a place in Flax is called as the caller says."""
    name = str(path[-1]) if path else ""
    parts = [str(part) for part in target]
    return name == f"layers_{parts[-1]}" or name in ["_".join(parts[depth:]) for depth in range(len(parts))]


def _is_there(target: Path, scopes: list[Path]) -> bool:
    """Whether anything in Flax is called so, though it is no layer's twin: a container, or the prefix of many."""
    name = str(target[-1]) if target else ""
    return not target or any(
        str(part) == name or str(part).startswith(f"{name}_") for path in scopes for part in path
    )
