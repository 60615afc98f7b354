"""Renames to the full path of a Flax scope (``PABlock_0.BatchNorm_0``) whose parents have other names in torch.

The pairing compares names level by level, below parents that were paired. A full Flax path contains the Flax
names of the parents. So the renamed layer stays below its own parent, under the last name of the path, and a
check at the end confirms that it was paired with the scope of that path.
"""

from collections.abc import Callable

from torchjax_bridge.exchange import Path

from ..trees import FlaxNode, TorchNode, TorchTree
from ._bind import Match

__all__ = ["match_with_full_paths"]


def match_with_full_paths(
    tree: TorchTree, flax: FlaxNode, match: Callable[[], Match]
) -> tuple[Match, dict[Path, Path]]:
    """Match the two sides; also returns the full Flax path that each renamed layer should have.

    Args:
        tree: The torch side. A layer that was renamed to a full path goes back under its own parent, or under the
            grandparent if the parent has no scope in Flax.
        flax: The Flax side.
        match: Matches the two trees in their present state.
    """
    intended = _put_under_own_parents(tree, flax)
    found = match()
    while wrong := [place for place, path in intended.items() if not _is_at(tree, found, place, path)]:
        if not [place for place in wrong if _lift(tree, intended, place)]:
            break
        found = match()
    return found, intended


def _is_at(tree: TorchTree, match: Match, place: Path, path: Path) -> bool:
    node = _chain(tree.root, place)[-1]
    return (node.origin, path) in match.layers


def _put_under_own_parents(tree: TorchTree, flax: FlaxNode) -> dict[Path, Path]:
    scopes = {node.path: node for node in flax.walk()}
    nodes = {node.origin: node for node in tree.root.walk()}
    intended: dict[Path, Path] = {}
    whole = [target for target in tree.targets if target in scopes and len(target) > 1]
    chains = {target: _chain(tree.root, target) for target in whole}
    chains = {target: chain for target, chain in chains.items() if len(chain) > len(target)}
    filled = {target[:-1] for target, chain in chains.items() if _fills(chain[-2], scopes[target[:-1]])}
    for target, chain in chains.items():
        # Where renamed layers fill all of a scope, it is matched by its name like any other.
        if target[:-1] in filled:
            continue
        parent = nodes.get(chain[-1].origin[:-1])
        if (
            parent is None
            or parent is chain[-2]
            or target[-1] in parent.children
            or not _only_renamed(chain[-2])
        ):
            continue
        for depth in range(len(target), 0, -1):  # remove the node and the empty parents above it
            if depth < len(target) and not chain[depth].empty:
                break
            del chain[depth - 1].children[target[depth - 1]]
        _put(tree, chain[-1], target, parent, target[-1])
        intended[chain[-1].path] = target
    return intended


def _lift(tree: TorchTree, intended: dict[Path, Path], place: Path) -> bool:
    """Move a layer one level up, if there is a level and its name is free."""
    chain = _chain(tree.root, place)
    if len(chain) < 3 or place[-1] in chain[-3].children:
        return False
    del chain[-2].children[place[-1]]
    _put(tree, chain[-1], place, chain[-3], place[-1])
    intended[chain[-1].path] = intended.pop(place)
    return True


def _put(tree: TorchTree, node: TorchNode, place: Path, parent: TorchNode, name: str | int) -> None:
    parent.children[name] = node
    _move(node, (*parent.path, name))
    tree.targets[node.path] = tree.targets.pop(place)


def _chain(root: TorchNode, path: Path) -> list[TorchNode]:
    """The nodes along a path, as far as they exist."""
    chain = [root]
    for name in path:
        child = chain[-1].children.get(name)
        if child is None:
            break
        chain.append(child)
    return chain


def _only_renamed(node: TorchNode) -> bool:
    """Whether a node only holds layers that were renamed into it."""
    return node.module is None and all(
        below.origin[: len(node.path)] != node.path for below in node.walk() if below.leaves
    )


def _fills(node: TorchNode, scope: FlaxNode) -> bool:
    """Whether a node has a child or a tensor of the name of each entry of a scope."""
    wanted = {*scope.leaves, *(name for name, child in scope.children.items() if not child.empty)}
    return wanted <= {*node.leaves, *node.children}


def _move(node: TorchNode, path: Path) -> None:
    node.path = path
    for name, child in node.children.items():
        _move(child, (*path, name))
