"""Finds which subtrees have equal structure, so that they are compared only once.

Sixty equal blocks beside sixty equal scopes are 3,600 pairs and one answer. Two nodes are alike if their
classes, settings, tensors and children are equal, including the names below them but not their own. Compares
no torch node with a Flax node. A setting that cannot be compared by value makes its node unlike all others:
that costs time, and never gives a wrong answer.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from flax import nnx
from torch import nn

from ..trees import FlaxNode, TorchLeaf, TorchNode

__all__ = ["Structures"]

# Attributes of every nn.Module that are no settings: the tree has the tensors and submodules already.
_NO_SETTINGS = frozenset({"_parameters", "_buffers", "_modules", "training"})
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device)
# A longer container is a table (a vocabulary) rather than a setting, and a deeper one may hold itself.
_MOST_ENTRIES = 64
_DEEPEST = 8
# Not a class derived from one of them, which may have settings of its own.
_CONTAINERS = (list, tuple, set, frozenset, dict, OrderedDict, MappingProxyType)


class Structures:
    """Gives each node a number, the same for all nodes that are alike. Keeps the nodes in memory.

    Args:
        ruled: Whether a rule may read the settings of a node's module.
    """

    def __init__(self, ruled: Callable[[TorchNode], bool]) -> None:
        self._ruled = ruled
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[Hashable, tuple[int, object]] = {}

    def of_torch(self, node: TorchNode, *, below_rule: bool = False) -> int:
        """The number of a torch node."""
        where = (id(node), below_rule)
        if where not in self._known:
            with_settings = below_rule or self._ruled(node)
            what = (
                node.kind,
                node.declared,
                node.features,
                node.output,
                node.told,
                node.fused,
                _torch_settings(node.module) if with_settings else (),
                tuple([(name, _of_leaf(leaf)) for name, leaf in node.leaves.items()]),
                tuple(node.moved),
                tuple(
                    [
                        (name, child.path[len(node.path) :], self.of_torch(child, below_rule=with_settings))
                        for name, child in node.children.items()
                    ]
                ),
            )
            self._known[where] = (self._number(what), node)
        return self._known[where][0]

    def of_flax(self, node: FlaxNode) -> int:
        """The number of a Flax node; never that of a torch node."""
        where = id(node)
        if where not in self._known:
            what = (
                node.kind,
                _flax_settings(node.module),
                tuple(
                    [(name, leaf.collection, leaf.shape, leaf.optional) for name, leaf in node.leaves.items()]
                ),
                tuple(
                    [
                        (name, child.path[len(node.path) :], self.of_flax(child))
                        for name, child in node.children.items()
                    ]
                ),
            )
            self._known[where] = (self._number(what), node)
        return self._known[where][0]

    def _number(self, what: Hashable) -> int:
        return self._numbers.setdefault(what, len(self._numbers))


def _of_leaf(leaf: TorchLeaf) -> Hashable:
    """The structure of a leaf. Owners count: a rule reads the layer that owns a renamed tensor."""
    return (leaf.meta.shape, leaf.meta.dtype, tuple([(id(node), name) for node, name in leaf.owners]))


def _torch_settings(module: nn.Module | None) -> Hashable:
    if module is None:
        return None
    # Buffers of torch's own layers are statistics and no settings.
    torchs = type(module).__module__.startswith("torch.")
    tensors = module._parameters if torchs else {**module._parameters, **module._buffers}
    settings = [(name, value) for name, value in vars(module).items() if name not in _NO_SETTINGS]
    return tuple([(name, _by_value(value)) for name, value in (*settings, *tensors.items())])


def _flax_settings(module: Any) -> Hashable:
    if module is None:
        return None
    return tuple(
        [
            (name, _by_value(value))
            for name, value in vars(module).items()
            if not (name.startswith("_pytree__") or isinstance(value, nnx.Pytree | nnx.Variable))
        ]
    )


def _by_value(value: Any, depth: int = 0) -> Hashable:
    """A key that is equal for equal settings; the object's identity if it cannot be compared by value."""
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    if isinstance(value, weakref.ref):  # a recurrent layer holds its weights a second time
        return _by_value(value())
    plain = type(value) in _CONTAINERS or isinstance(value, tuple)
    if plain and len(value) <= _MOST_ENTRIES and depth < _DEEPEST:
        if isinstance(value, Mapping):
            pairs = [(_by_value(key, depth + 1), _by_value(one, depth + 1)) for key, one in value.items()]
            return (type(value), tuple(pairs))
        parts = [_by_value(one, depth + 1) for one in value]
        return (type(value), frozenset(parts) if isinstance(value, set | frozenset) else tuple(parts))
    return id(value)


def _of_tensor(tensor: torch.Tensor) -> Hashable:
    """The key of a tensor. Values count unless it is a parameter, since they may be a setting."""
    outside = (type(tensor), tensor.shape, tensor.dtype, tensor.requires_grad)
    if isinstance(tensor, nn.Parameter):
        return outside
    # Only values of plain tensors are read: others may wait for a device or a network.
    plain = type(tensor) is torch.Tensor and tensor.is_cpu and tensor.layout is torch.strided
    if not plain or tensor.is_quantized or tensor.numel() > _MOST_ENTRIES:
        return id(tensor)
    return (outside, tuple(tensor.flatten().tolist()))
