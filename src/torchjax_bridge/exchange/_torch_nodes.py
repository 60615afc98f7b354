"""Classes that only torch knows as pytree nodes: ``torch.Size``, a ``ModelOutput``, a ``TensorDict``.

Such a class is registered with JAX when a tree that holds one first crosses. From then on every JAX function treats
it as a node, so ``jax.jit`` can return it. A node is rebuilt as its own class if that class can hold the new
children. Otherwise it becomes a named tuple, an ``OrderedDict`` or a tuple, according to how torch names its
children: by attribute, key or position.

torch's registry is private. Where it is missing, only ``torch.return_types.*`` and ``torch.Size`` are known.
"""

import collections
import copy
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch

__all__ = ["register_with_jax"]

_LOCK = threading.Lock()
# What a class may raise when it is flattened or built.
_NODE_ERRORS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)
# The classes of nearly all leaves.
_PLAIN_CLASSES = frozenset({torch.Tensor, torch.nn.Parameter, np.ndarray, bool, int, float, complex, str})
_Flatten = Callable[[Any], tuple[Sequence[Any], Any]]


@dataclass(frozen=True, slots=True)
class _Node:
    """torch's functions that flatten and unflatten a class."""

    flatten: _Flatten
    unflatten: Callable[[list[Any], Any], Any]
    flatten_with_keys: Callable[[Any], tuple[Sequence[tuple[Any, Any]], Any]] | None


def register_with_jax(leaves: Sequence[Any]) -> bool:
    """Register with JAX the classes of these leaves that torch knows as nodes.

    Returns:
        Whether there was one; if so, flatten the tree again.
    """
    found = False
    for cls in set(map(type, leaves)) - _PLAIN_CLASSES:
        node = _torch_node(cls)
        if node is not None:
            found = True
            with _LOCK:
                if _is_leaf(next(leaf for leaf in leaves if type(leaf) is cls)):
                    _register(cls, node)
    return found


def _torch_node(cls: type) -> _Node | None:
    # Not by torch's registry, which rebuilds a Size as a plain tuple.
    if cls is torch.Size or cls.__module__ == "torch.return_types":
        return _Node(lambda node: (list(node), None), lambda values, _: cls(values), None)
    try:
        from torch.utils._pytree import SUPPORTED_NODES
    except ImportError:
        return None
    node = SUPPORTED_NODES.get(cls)
    return node and _Node(node.flatten_fn, node.unflatten_fn, node.flatten_with_keys_fn)


def _is_leaf(value: Any) -> bool:
    return jax.tree_util.all_leaves([value])


@dataclass(frozen=True, slots=True, eq=False)
class _Context:
    """The part of a node that is not a child; hashable, as JAX requires, and equal if torch's contexts are."""

    cls: type
    keys: tuple[Any, ...]
    value: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Context) or (self.cls, self.keys) != (other.cls, other.keys):
            return False
        return self.value is other.value or bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash((self.cls, self.keys))


def _register(cls: type, node: _Node) -> None:
    keeps_any_child: list[bool] = []  # filled once, when a node of this class is first rebuilt

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], _Context]:
        if node.flatten_with_keys is None:
            children, context = node.flatten(value)
            pairs = [(jax.tree_util.SequenceKey(i), child) for i, child in enumerate(children)]
        else:
            named, context = node.flatten_with_keys(value)
            pairs = [(_jax_key(key), child) for key, child in named]
        return pairs, _Context(cls, tuple(key for key, _ in pairs), context)

    def flatten(value: Any) -> tuple[list[Any], _Context]:
        pairs, context = flatten_with_keys(value)
        return [child for _, child in pairs], context

    def unflatten(context: _Context, children: Iterable[Any]) -> Any:
        children = list(children)
        if not keeps_any_child and children:  # a node without children cannot tell
            keeps_any_child.append(_keeps_any_child(node, context))
        fits = _has_only_plain_leaves(children) or keeps_any_child[0]
        rebuilt = _rebuild(node, context, children) if fits else None
        return _substitute(context, children) if rebuilt is None else rebuilt

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


def _rebuild(node: _Node, context: _Context, children: list[Any]) -> Any:
    """A node of the original class; None if the class rejects the children or drops some."""
    try:
        rebuilt = node.unflatten(children, copy.copy(context.value))  # a copy: some classes write to it
        whole = type(rebuilt) is context.cls and len(node.flatten(rebuilt)[0]) == len(children)
    except _NODE_ERRORS:
        return None
    return rebuilt if whole else None


def _keeps_any_child(node: _Node, context: _Context) -> bool:
    """Whether the class keeps arbitrary objects as children, without converting them."""
    markers = [object() for _ in context.keys]
    rebuilt = _rebuild(node, context, markers)
    return rebuilt is not None and all(a is b for a, b in zip(node.flatten(rebuilt)[0], markers, strict=True))


def _has_only_plain_leaves(children: list[Any]) -> bool:
    """Whether all leaves are tensors, NumPy arrays or Python values."""
    return all(isinstance(leaf, tuple(_PLAIN_CLASSES)) for leaf in jax.tree_util.tree_leaves(children))


def _jax_key(key: Any) -> Any:
    """The JAX key for a torch pytree key."""
    if hasattr(key, "name"):
        return jax.tree_util.GetAttrKey(key.name)
    if hasattr(key, "idx"):
        return jax.tree_util.SequenceKey(key.idx)
    return jax.tree_util.DictKey(key.key)


def _substitute(context: _Context, children: list[Any]) -> Any:
    """A builtin container for children that the class cannot hold."""
    keys = context.keys
    if keys and all(isinstance(key, jax.tree_util.GetAttrKey) for key in keys):
        return _named_tuple(context.cls, tuple(key.name for key in keys))(*children)
    if keys and all(isinstance(key, jax.tree_util.DictKey) for key in keys):
        return collections.OrderedDict(zip((key.key for key in keys), children, strict=True))
    return tuple(children)


@functools.cache
def _named_tuple(cls: type, names: tuple[str, ...]) -> Any:
    return collections.namedtuple(cls.__name__, names)
