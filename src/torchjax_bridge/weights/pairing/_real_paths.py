"""A rename to the whole path of a scope in Flax, whose parents torch calls otherwise: ``PABlock_0.BatchNorm_0``.

The pairing compares names level by level, below parents that belong together. A path that is there in Flax says the
same with the parents' names of the other side, so the layer stays where it was, under its last name alone; that the
path is where it went is checked in the end.
"""

from collections.abc import Callable

from torchjax_bridge.exchange import Path

from ..trees import FlaxNode, TorchNode, TorchTree
from ._bind import Match

__all__ = ["matched_by_real_paths"]


def matched_by_real_paths(
    tree: TorchTree, flax: FlaxNode, match: Callable[[], Match]
) -> tuple[Match, dict[Path, Path]]:
    """Match the two sides, and say for renamed layers which whole path in Flax each of them was to have.

    Args:
        tree: The torch side. A layer that was renamed to a whole path is put under its own parent again, or under
            what holds that, where the parent has no scope in Flax.
        flax: The Flax side.
        match: Matches the two as they are.
    """
    meant = _bring_back(tree, flax)
    found = match()
    while wrong := [place for place, path in meant.items() if not _is_at(tree, found, place, path)]:
        if not [place for place in wrong if _lift(tree, meant, place)]:
            break
        found = match()
    return found, meant


def _is_at(tree: TorchTree, match: Match, place: Path, path: Path) -> bool:
    node = _chain(tree.root, place)[-1]
    return (node.origin, path) in match.layers


def _bring_back(tree: TorchTree, flax: FlaxNode) -> dict[Path, Path]:
    scopes = {node.path for node in flax.walk()}
    nodes = {node.origin: node for node in tree.root.walk()}
    meant: dict[Path, Path] = {}
    for target in [target for target in tree.targets if target in scopes and len(target) > 1]:
        chain = _chain(tree.root, target)
        if len(chain) <= len(target):
            continue
        parent = nodes.get(chain[-1].origin[:-1])
        if parent is None or parent is chain[-2] or target[-1] in parent.children or not _made_up(chain[-2]):
            continue
        for depth in range(len(target), 0, -1):  # and with it what only led to it
            if depth < len(target) and not chain[depth].empty:
                break
            del chain[depth - 1].children[target[depth - 1]]
        _put(tree, chain[-1], target, parent, target[-1])
        meant[chain[-1].path] = target
    return meant


def _lift(tree: TorchTree, meant: dict[Path, Path], place: Path) -> bool:
    """Put a layer one level up, where there is one and its name is free."""
    chain = _chain(tree.root, place)
    if len(chain) < 3 or place[-1] in chain[-3].children:
        return False
    del chain[-2].children[place[-1]]
    _put(tree, chain[-1], place, chain[-3], place[-1])
    meant[chain[-1].path] = meant.pop(place)
    return True


def _put(tree: TorchTree, node: TorchNode, place: Path, parent: TorchNode, name: str | int) -> None:
    parent.children[name] = node
    _move(node, (*parent.path, name))
    tree.targets[node.path] = tree.targets.pop(place)


def _chain(root: TorchNode, path: Path) -> list[TorchNode]:
    """The nodes on a path, as far as there are any."""
    chain = [root]
    for name in path:
        child = chain[-1].children.get(name)
        if child is None:
            break
        chain.append(child)
    return chain


def _made_up(node: TorchNode) -> bool:
    """Whether nothing below a node was there before layers were renamed into it."""
    return node.module is None and all(
        below.origin[: len(node.path)] != node.path for below in node.walk() if below.leaves
    )


def _move(node: TorchNode, path: Path) -> None:
    node.path = path
    for name, child in node.children.items():
        _move(child, (*path, name))
