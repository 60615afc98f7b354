"""Reads the torch side: an ``nn.Module`` or a bare ``state_dict`` becomes a `TorchTree`.

Paths are those of the model without its wrappers, renamed where the caller says so. Keys stay the caller's
own. Refuses everything else, such as a checkpoint that still wraps its ``state_dict``.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import Path, join_path, split_path

from .._report import Fault, what_it_is
from ..rules import Rename
from ._renaming import Renaming
from ._ties import find_ties, ties_without_memory
from ._torch_tree import TorchLeaf, TorchNode, TorchTree
from ._wrappers import unwrap_keys, unwrap_modules

__all__ = ["read_torch"]


def read_torch(source: Any, renames: Sequence[Rename] = ()) -> TorchTree:
    """Read an ``nn.Module`` or a ``state_dict``.

    Args:
        source: The module or the mapping from dotted keys to tensors.
        renames: Names that differ on the other side. The first that matches a path decides.

    Raises:
        PlanError: It is neither of the two.
    """
    if isinstance(source, nn.Module):
        modules = dict(source.named_modules(remove_duplicate=False))
        state = dict(source.state_dict())
        unwrap, notes = unwrap_modules(modules)
    elif isinstance(source, Mapping):
        modules = {}
        state = dict(source)
        _refuse_what_is_no_state_dict(state)
        unwrap, notes = unwrap_keys(state)
    else:
        raise PlanError(
            f"{what_it_is(source)} is no source of torch weights: pass an instance of nn.Module or its "
            "state_dict()."
        )
    rename = Renaming(renames)
    builder = _TorchTreeBuilder()
    for name, module in modules.items():
        path = unwrap(split_path(name))
        if path is not None:
            node = builder.node_at(rename(path))
            node.kind, node.module, node.origin = _class_of(module), module, path
    others, faults = [], []
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            others.append(key)
            continue
        if is_lazy(tensor):
            raise PlanError(
                f"'{key}' has no shape yet: it belongs to a lazy module. Call the module once on an example input."
            )
        path = unwrap(split_path(key))
        if path is None:  # a counter of a wrapper
            others.append(key)
            continue
        place, home = rename(path), rename(path[:-1])
        alone = place != (*home, path[-1])
        node, name = builder.node_at(place[:-1]), str(place[-1])
        for where in (home,) if alone else (place[:-1],):
            if not (one := builder.node_at(where)).leaves and one.module is None:
                builder.set_origin(where, path[:-1])
        if name in node.leaves:
            message = f"'{key}' and '{node.leaves[name].key}' are both renamed to this"
            faults.append(Fault("rules", message, join_path(place), key))
            continue
        bare = tensor.detach() if tensor.requires_grad else tensor
        leaf = TorchLeaf(key, bare, _meta(tensor.shape, tensor.dtype))
        if alone:
            depths = range(len(path))
            owners = [(builder.node_at(rename(path[:depth])), join_path(path[depth:])) for depth in depths]
            leaf = leaf._replace(owners=tuple(owners))
            for owner, local in owners:
                owner.moved[local] = leaf
        node.leaves[name] = leaf
    builder.move_whole_layers()
    faults += rename.unused()
    live = source if isinstance(source, nn.Module) else None
    ties = find_ties(state) | (ties_without_memory(live, state) if live is not None else {})
    return TorchTree(builder.root, state, ties, tuple(others), notes, tuple(faults), live, rename.targets)


@lru_cache(maxsize=4096)
def _meta(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    # Shared by all tensors of this shape: it has no memory to write to.
    return torch.empty(shape, dtype=dtype, device="meta")


class _TorchTreeBuilder:
    """Makes the nodes of a tree as paths to them come up."""

    def __init__(self) -> None:
        self.root = TorchNode(())
        self._known: dict[Path, TorchNode] = {(): self.root}
        self._origins: dict[Path, Path] = {}

    def node_at(self, path: Path) -> TorchNode:
        """The node at a path, which is made if it is new."""
        node = self._known.get(path)
        if node is None:
            node = self._known[path] = TorchNode(path, path)
            self.node_at(path[:-1]).children[path[-1]] = node
        return node

    def set_origin(self, place: Path, origin: Path) -> None:
        """Record the origin of a node without a module, and of its parents up to where the names differ."""
        while place and origin and (node := self.node_at(place)).module is None:
            if self._origins.setdefault(place, origin) != origin:
                node.origin = place  # renames brought two modules together
                return
            node.origin = origin
            if place[-1] != origin[-1]:
                return
            place, origin = place[:-1], origin[:-1]

    def move_whole_layers(self) -> None:
        """Move the module too where a pattern (``Rename("fc.*", "head.*")``) renamed all of its tensors."""
        for node in list(self._known.values()):
            renamed = [leaf for leaf in node.leaves.values() if leaf.owners]
            if not renamed or node.module is not None:
                continue
            owner, _ = renamed[0].owners[-1]
            as_before = all(
                leaf.owners and leaf.owners[-1] == (owner, name) for name, leaf in node.leaves.items()
            )
            if as_before and owner.empty and owner is not node:
                node.kind, node.module, node.origin = owner.kind, owner.module, owner.origin
                owner.kind = owner.module = None
                for leaf in renamed:
                    for one, name in leaf.owners:
                        del one.moved[name]
                node.leaves = {name: leaf._replace(owners=()) for name, leaf in node.leaves.items()}


def _class_of(module: nn.Module) -> type:
    """The class of the source code, not the one that a parametrization or ``fully_shard`` put in its place."""
    kind = type(module)
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if fsdp in kind.__mro__[1:2]:  # fully_shard makes a class of FSDPModule and the module's own
        return kind.__mro__[2]
    # hasattr would call nn.Module.__getattr__, which is slow where it finds nothing.
    if kind.__module__ == "torch.nn.utils.parametrize" or "parametrizations" in module._modules:
        return kind.__mro__[1]
    return kind


def _refuse_what_is_no_state_dict(state: dict[str, Any]) -> None:
    inner = [
        key
        for key, value in state.items()
        if isinstance(value, nn.Module)
        or (isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values()))
    ]
    if inner and not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise PlanError(
            f"this mapping holds its weights one level down, beside {len(state) - 1} other entries: pass "
            f"source[{inner[0]!r}] instead."
        )
    if not state:
        raise PlanError("the state_dict is empty: there is nothing to convert.")
    for key, value in state.items():
        if not isinstance(key, str):
            raise PlanError(f"{key!r} is no key of a state_dict: keys are dotted strings.")
        if not isinstance(value, torch.Tensor) and not key.endswith("_extra_state"):
            raise PlanError(
                f"'{key}' is {what_kind(value)}, not a torch.Tensor: pass a state_dict of tensors "
                "(to_torch converts a tree of JAX arrays)."
            )
