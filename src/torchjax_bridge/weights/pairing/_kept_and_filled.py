"""Applies `Keep` and `Fill`: torch tensors that stay in torch, and Flax leaves that get a constant.

Both are taken out of the trees before the matching, so that nothing is looked for in their place.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from torchjax_bridge.exchange import Path, join_path, split_path, torch_dtype

from .._nearest import did_you_mean
from .._report import Fault
from ..layouts import Constant
from ..rules import Fill, Keep
from ..trees import FlaxLeaf, FlaxNode, TorchTree
from ._bind import Move

__all__ = ["Filled", "fill_moves", "keep_in_torch", "take_out_filled"]

Filled = tuple[FlaxLeaf, Fill]


def keep_in_torch(tree: TorchTree, rules: Iterable[object]) -> tuple[tuple[str, ...], list[Fault]]:
    """Take what `Keep` rules match out of the torch tree; returns the keys, and the faults of unused rules."""
    keeps = [rule for rule in rules if isinstance(rule, Keep)]
    keys: dict[str, None] = {}
    used: set[Keep] = set()
    names: dict[str, None] = {}
    for node in tree.root.walk() if keeps else ():
        for name, leaf in list(node.leaves.items()):
            path = split_path(leaf.owners[0][1]) if leaf.owners else (*node.origin, name)
            names |= dict.fromkeys(join_path(path[:depth]) for depth in range(1, len(path) + 1))
            matching = [rule for rule in keeps if rule.matches(path)]
            if matching:
                used |= set(matching)
                keys[leaf.key] = None
                del node.leaves[name]
                for owner, local in leaf.owners:
                    owner.moved.pop(local, None)
    faults = [
        Fault("rules", f"{rule} names nothing on the torch side{did_you_mean(rule.torch, names)}", rule.torch)
        for rule in keeps
        if rule not in used
    ]
    return tuple(key for key in tree.state if key in keys), faults


def take_out_filled(root: FlaxNode, rules: Iterable[object]) -> tuple[FlaxNode, list[Filled], list[Fault]]:
    """The Flax tree without the leaves that `Fill` rules match, these leaves, and the faults of the rules."""
    fills = [rule for rule in rules if isinstance(rule, Fill)]
    if not fills:
        return root, [], []
    taken: list[Filled] = []
    used: set[Fill] = set()
    names: list[str] = []

    def without(node: FlaxNode) -> FlaxNode:
        left = {}
        for name, leaf in node.leaves.items():
            path = (*node.path, *split_path(name))
            names.append(join_path(path))
            matching = [rule for rule in fills if rule.matches(path) or rule.matches(leaf.path)]
            if matching:
                used.update(matching)
                taken.append((leaf, matching[0]))
            else:
                left[name] = leaf
        children = {name: without(child) for name, child in node.children.items()}
        return replace(node, leaves=left, children=children)

    pruned = without(root)
    faults = []
    for rule in fills:
        if rule not in used:
            below = next((name for name in names if name.startswith(f"{rule.flax}.")), "")
            near = f"; it takes a leaf, such as '{below}'" if below else did_you_mean(rule.flax, names)
            faults.append(Fault("rules", f"{rule} names no leaf of the Flax side{near}", rule.flax))
    for leaf, rule in taken:
        dtype = torch_dtype(leaf.dtype)
        whole = dtype.is_floating_point or dtype.is_complex
        if not whole and rule.value != int(rule.value):
            message = f"{rule} is no value for a leaf of {leaf.dtype}"
            faults.append(Fault("rules", message, join_path(leaf.path)))
    return pruned, taken, faults


def fill_moves(taken: Sequence[Filled], moves: Sequence[Move], tree: TorchTree) -> list[Move]:
    """The moves that fill leaves with constants, in the dtype of the weights beside them."""
    return [
        Move((), (leaf.path,), Constant(rule.value, leaf.shape, _dtype(leaf, moves, tree)), "Fill", "Fill")
        for leaf, rule in taken
    ]


def _dtype(leaf: FlaxLeaf, moves: Sequence[Move], tree: TorchTree) -> torch.dtype:
    own = torch_dtype(leaf.dtype)
    if not own.is_floating_point:
        return own
    near = max(moves, key=lambda move: _shared(move, leaf.path) if move.torch_keys else -1, default=None)
    beside = tree.state[near.torch_keys[0]].dtype if near is not None and near.torch_keys else own
    return beside if beside.is_floating_point else own


def _shared(move: Move, path: Path) -> int:
    """The length of the common prefix of a move's path and another."""
    pairs = enumerate(zip(move.flax_paths[0], path, strict=False)) if move.flax_paths else ()
    return next((depth for depth, (one, other) in pairs if one != other), len(path))
