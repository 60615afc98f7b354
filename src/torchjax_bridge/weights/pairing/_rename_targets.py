"""Checks that the names that the caller's renames give exist on the Flax side.

Structure alone may pair a layer, whatever its name. So a name that does not exist would go unnoticed, and its
layer could end up elsewhere. Names count as the pairing understands them: ``blocks.0`` is also ``blocks_0``
and ``blocks/layers_0``, and a container without a scope is still the place of its children.
"""

from collections.abc import Mapping
from itertools import takewhile

from torchjax_bridge.exchange import Path, join_path

from .._nearest import did_you_mean
from .._report import Fault
from ..rules import Rename
from ..trees import FlaxNode, TorchNode, TorchTree
from ._bind import Match

__all__ = ["rename_target_faults"]


def rename_target_faults(
    tree: TorchTree, flax: FlaxNode, match: Match, intended: Mapping[Path, Path]
) -> list[Fault]:
    """A fault for every rename whose new name does not exist in Flax, or whose layer was paired with another scope.

    Args:
        tree: The torch side.
        flax: The Flax side.
        match: The result of matching both sides.
        intended: For renamed layers, the full Flax paths that the renames give.
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
        if place in intended and node is not None and intended[place] not in pairs.get(node.origin, []):
            went = next(
                (f", which is paired with '{join_path(one)}'" for one in pairs.get(node.origin, [])), ""
            )
            message = f"{rename} gives '{join_path(node.origin)}' a place in another block than its own{went}"
            faults[rename, place] = Fault("rules", message, join_path(intended[place]))
            continue
        target = place
        for _ in takewhile(lambda name: name == "*", reversed(rename.flax.split("."))):
            target = target[:-1]  # a star keeps the name of torch
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
                continue  # its scope belongs to a layer
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
    """Whether a node only holds tensors that were renamed into it."""
    return bool(node.path) and node.module is None and all(leaf.owners for leaf in node.leaves.values())


def _agree(target: Path, path: Path) -> bool:
    """Whether a Flax path has the name that the caller gave."""
    name = str(path[-1]) if path else ""
    parts = [str(part) for part in target]
    return name == f"layers_{parts[-1]}" or name in ["_".join(parts[depth:]) for depth in range(len(parts))]


def _is_there(target: Path, scopes: list[Path]) -> bool:
    """Whether the name exists in Flax, if only as a container or as a prefix."""
    name = str(target[-1]) if target else ""
    return not target or any(
        str(part) == name or str(part).startswith(f"{name}_") for path in scopes for part in path
    )
