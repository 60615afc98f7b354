"""Copies of the caller's inputs, one set for each model: a model may write to what it is given.

Containers keep their classes, and their keys keep their order (JAX sorts those of a dict). An array that stands
in two places is one array in the copy. Models are passed on as they are.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import flax.linen
import jax
import numpy as np
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.exchange import Path, from_jax_keypath

__all__ = ["map_arrays", "own_copies", "tensors_in"]

Leaf = Callable[[Path, Any], Any]

_ARRAYS = (torch.Tensor, np.ndarray, jax.Array)


def own_copies(tree: Any) -> Any:
    """The tree with a copy of every tensor and numpy array, and containers of its own.

    A tensor that stands in two places is one tensor in the copy; tensors that share memory share it there. A copy
    requires grad if its tensor does, and is detached from its graph.
    """
    sharing = Counter(_memory(tensor) for tensor in {id(one): one for one in tensors_in(tree)}.values())
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}

    def leaf(_: Path, array: Any) -> Any:
        if isinstance(array, jax.Array):
            return array
        if id(array) not in copies:
            if isinstance(array, np.ndarray):
                copies[id(array)] = array.copy(order="K")
            else:
                copies[id(array)] = _copy(array, storages, alone=sharing[_memory(array)] == 1)
        return copies[id(array)]

    return map_arrays(tree, leaf)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree, in order."""
    found: list[torch.Tensor] = []

    def leaf(_: Path, array: Any) -> Any:
        if isinstance(array, torch.Tensor):
            found.append(array)
        return array

    map_arrays(tree, leaf)
    return found


def _memory(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage, which others may share; its identity if it has no storage."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (tensor.untyped_storage().data_ptr() if plain and not tensor.is_meta else 0) or id(tensor)


def _copy(tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage], *, alone: bool) -> torch.Tensor:
    bare = tensor.detach()
    if alone:
        made = bare.clone()
    else:
        memory = _memory(tensor)
        if memory not in storages:
            storages[memory] = bare.untyped_storage().clone()
        made = torch.empty(0, dtype=bare.dtype, device=bare.device)
        made.set_(storages[memory], bare.storage_offset(), bare.size(), bare.stride())
        made = made.conj() if bare.is_conj() else made
    return made.requires_grad_(tensor.requires_grad)


# --- trees ---------------------------------------------------------------------------------------------


def map_arrays(tree: Any, leaf: Leaf) -> Any:
    """The tree with ``leaf(path, array)`` in the place of every array.

    It opens lists, tuples, mappings, nodes registered with JAX, and the attributes of other objects that are not
    callable. What holds no array and no container is passed on as it is.
    """
    return _map_arrays(tree, leaf, (), {})


def _map_arrays(tree: Any, leaf: Leaf, path: Path, made: dict[int, tuple[Any, Any]]) -> Any:
    if isinstance(tree, _ARRAYS):
        return leaf(path, tree)
    if id(tree) not in made:
        made[id(tree)] = (tree, tree)  # the tree is held, so that its id stays its own; a cycle ends here
        made[id(tree)] = (tree, _container(tree, leaf, path, made))
    return made[id(tree)][1]


def _container(tree: Any, leaf: Leaf, path: Path, made: dict[int, tuple[Any, Any]]) -> Any:
    def inside(key: Any, item: Any) -> Any:
        return _map_arrays(item, leaf, (*path, key if isinstance(key, int) else str(key)), made)

    if isinstance(tree, nn.Module | nnx.Module | flax.linen.Module):
        return tree
    if isinstance(tree, tuple):
        items = [inside(place, item) for place, item in enumerate(tree)]
        if all(one is other for one, other in zip(items, tree, strict=True)):
            return tree
        return tree._make(items) if hasattr(tree, "_make") else type(tree)(items)
    if isinstance(tree, list):
        again = copy.copy(tree)
        again[:] = [inside(place, item) for place, item in enumerate(tree)]
        return again
    if isinstance(tree, dict):
        return _mapping(tree, inside)
    branches, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda one: one is not tree)
    if any(one is not tree for _, one in branches):
        items = [inside(".".join(map(str, from_jax_keypath(key))), one) for key, one in branches]
        return jax.tree.unflatten(structure, items)
    if isinstance(tree, MutableMapping):
        return _mapping(tree, inside)
    if isinstance(tree, type) or callable(tree) or not hasattr(tree, "__dict__"):
        return tree
    parts = {name: inside(name, item) for name, item in vars(tree).items()}
    changed = {name: part for name, part in parts.items() if part is not vars(tree)[name]}
    if not changed:
        return tree
    again = copy.copy(tree)
    vars(again).update(changed)
    return again


def _mapping(tree: Mapping[Any, Any], inside: Callable[[Any, Any], Any]) -> Any:
    again: Any = copy.copy(tree)
    for key, item in tree.items():
        again[key] = inside(key, item)
    return again
