"""Classes that torch takes apart as pytrees and JAX does not: ``torch.Size``, a ``ModelOutput``, a ``TensorDict``.

JAX is told of such a class when a tree that holds one first crosses. From then on it is a node for every function
of JAX, so that ``jax.jit`` returns it. Owns what is made of a node around new children: what it was, where its
class can hold them; otherwise a named tuple, an ``OrderedDict`` or a tuple, as torch names its children: by
attribute, by key or by number.

Does not judge leaves. torch's registry has no public name: where it is gone, ``torch.return_types.*`` and
``torch.Size`` are known all the same.
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

__all__ = ["tell_jax"]

_LOCK = threading.Lock()
# What a class's own flattening and construction may raise.
_NODE_ERRORS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)
# The leaves of nearly every tree.
_LEAVES = frozenset({torch.Tensor, torch.nn.Parameter, np.ndarray, bool, int, float, complex, str})
_Flatten = Callable[[Any], tuple[Sequence[Any], Any]]


@dataclass(frozen=True, slots=True)
class _Node:
    """How torch takes a class apart and puts it together again."""

    flatten: _Flatten
    unflatten: Callable[[list[Any], Any], Any]
    flatten_with_keys: Callable[[Any], tuple[Sequence[tuple[Any, Any]], Any]] | None


def tell_jax(leaves: Sequence[Any]) -> bool:
    """Make JAX know the classes among these leaves that torch knows as nodes.

    Returns:
        Whether there was one: then the tree is to be flattened anew.
    """
    told = False
    for kind in set(map(type, leaves)) - _LEAVES:
        node = _torch_node(kind)
        if node is not None:
            told = True
            with _LOCK:
                if _is_leaf(next(leaf for leaf in leaves if type(leaf) is kind)):
                    _register(kind, node)
    return told


def _torch_node(kind: type) -> _Node | None:
    # By its own class: torch's registry makes a plain tuple of a Size.
    if kind is torch.Size or kind.__module__ == "torch.return_types":
        return _Node(lambda node: (list(node), None), lambda values, _: kind(values), None)
    try:
        from torch.utils._pytree import SUPPORTED_NODES
    except ImportError:
        return None
    node = SUPPORTED_NODES.get(kind)
    return node and _Node(node.flatten_fn, node.unflatten_fn, node.flatten_with_keys_fn)


def _is_leaf(value: Any) -> bool:
    return jax.tree_util.all_leaves([value])


@dataclass(frozen=True, slots=True, eq=False)
class _Context:
    """What a node is besides its children; equal where torch says so, and hashable, as JAX wants it."""

    kind: type
    keys: tuple[Any, ...]
    value: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Context) or (self.kind, self.keys) != (other.kind, other.keys):
            return False
        return self.value is other.value or bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash((self.kind, self.keys))


def _register(kind: type, node: _Node) -> None:
    able: list[bool] = []  # found out once, when a node of this class is first made

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], _Context]:
        if node.flatten_with_keys is None:
            children, context = node.flatten(value)
            pairs = [(jax.tree_util.SequenceKey(i), child) for i, child in enumerate(children)]
        else:
            named, context = node.flatten_with_keys(value)
            pairs = [(_jax_key(key), child) for key, child in named]
        return pairs, _Context(kind, tuple(key for key, _ in pairs), context)

    def flatten(value: Any) -> tuple[list[Any], _Context]:
        pairs, context = flatten_with_keys(value)
        return [child for _, child in pairs], context

    def unflatten(context: _Context, children: Iterable[Any]) -> Any:
        children = list(children)
        if not able and children:  # a node without children shows nothing
            able.append(_holds_anything(node, context))
        made = _made(node, context, children) if _are_torch(children) or able[0] else None
        return _stand_in(context, children) if made is None else made

    jax.tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)


def _made(node: _Node, context: _Context, children: list[Any]) -> Any:
    """The node of the class itself; None where the class refuses the children, or drops some."""
    try:
        made = node.unflatten(children, copy.copy(context.value))  # a copy: some classes write to it
        whole = type(made) is context.kind and len(node.flatten(made)[0]) == len(children)
    except _NODE_ERRORS:
        return None
    return made if whole else None


def _holds_anything(node: _Node, context: _Context) -> bool:
    """Whether a node of the class keeps whatever it is made of, and does not convert it."""
    marks = [object() for _ in context.keys]
    made = _made(node, context, marks)
    return made is not None and all(a is b for a, b in zip(node.flatten(made)[0], marks, strict=True))


def _are_torch(children: list[Any]) -> bool:
    """Whether trees hold nothing but tensors and Python's own values."""
    return all(isinstance(leaf, tuple(_LEAVES)) for leaf in jax.tree_util.tree_leaves(children))


def _jax_key(key: Any) -> Any:
    """JAX's word for how torch says where a child is."""
    if hasattr(key, "name"):
        return jax.tree_util.GetAttrKey(key.name)
    if hasattr(key, "idx"):
        return jax.tree_util.SequenceKey(key.idx)
    return jax.tree_util.DictKey(key.key)


def _stand_in(context: _Context, children: list[Any]) -> Any:
    """What is made where the class cannot hold the children."""
    keys = context.keys
    if keys and all(isinstance(key, jax.tree_util.GetAttrKey) for key in keys):
        return _named_tuple(context.kind, tuple(key.name for key in keys))(*children)
    if keys and all(isinstance(key, jax.tree_util.DictKey) for key in keys):
        return collections.OrderedDict(zip((key.key for key in keys), children, strict=True))
    return tuple(children)


@functools.cache
def _named_tuple(kind: type, names: tuple[str, ...]) -> Any:
    return collections.namedtuple(kind.__name__, names)
