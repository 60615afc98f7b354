"""A pytree is taken apart and put together again, or refused with the place that stands in the way.

JAX does both; this file asks first whether it can. That is not politeness: where jaxlib's flattening fails below
a dict it does not give back the levels of recursion it took (seen in 0.10.2), so that one tree that contains itself
leaves the thread with ``RecursionError`` at every further call, and a dict of mixed keys with a little less room.

Refuses containers that contain themselves, nesting deeper than Python's recursion allows, dicts whose keys do not
sort, and nodes of classes that cannot hold the other framework's leaves. Custom nodes (registered classes) are
entered only when JAX has failed: to flatten them twice would cost as much as the crossing.
"""

import itertools
import sys
import traceback
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import jax
import torch

from torchjax_bridge.errors import UnsupportedLeafError

from ._paths import Path, from_jax_keypath, join_path
from ._torch_nodes import tell_jax

__all__ = ["flatten", "rebuild"]

_CONTAINERS = (dict, list, tuple)
# Questions about all types in a container at once, answered in C; they are cheaper from so many on.
_FEW = 4
_are_strings = frozenset({str}).issuperset
_are_leaves = frozenset(
    {torch.Tensor, torch.nn.Parameter, int, float, bool, complex, str, type(None)}
).issuperset
# A tree no deeper cannot be endless; a deeper one is searched with care.
_SHALLOW = 32
# What a class's own flattening, construction or comparison of keys may raise.
_NODE_ERRORS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)
# Frames of our own and of jax between a caller and the flattening.
_SPARE_LEVELS = 30


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves and the structure of a pytree, as ``jax.tree_util.tree_flatten`` gives them.

    JAX is told of the classes in it that torch alone knows as nodes.

    Raises:
        UnsupportedLeafError: JAX cannot flatten it; the message names the container and its path.
    """
    if isinstance(tree, _CONTAINERS) and not _is_plain(tree):
        _refuse_faulty(tree)
    try:
        leaves, structure = jax.tree_util.tree_flatten(tree)
        while tell_jax(leaves):
            leaves, structure = jax.tree_util.tree_flatten(tree)
        return leaves, structure
    except (*_NODE_ERRORS, SystemError) as err:  # SystemError: how jaxlib wraps a RecursionError
        _refuse_faulty(tree)
        raise UnsupportedLeafError(f"cannot flatten this {_kind(tree)} as a pytree: {err}.") from err


def rebuild(structure: Any, leaves: Sequence[Any], tree: Any) -> Any:
    """The tree of this structure around other leaves; `tree` is the one it came from.

    Raises:
        UnsupportedLeafError: A node's class does not take the new leaves; the message names it and its path.
    """
    try:
        return jax.tree_util.tree_unflatten(structure, leaves)
    except _NODE_ERRORS as err:
        path, kind = _refusing_node(structure, leaves, tree)
        raise UnsupportedLeafError(
            f"cannot rebuild {_where(path, kind)} around its new leaves: {kind} refused them with "
            f"{type(err).__name__}: {err}. Pass what it holds in a dict, list or tuple."
        ) from err


def _is_plain(node: Any, room: int = _SHALLOW) -> bool:
    """Whether in a builtin container all dicts sort and no other lies deep: the quick look at every tree."""
    children: Iterable[Any] = node
    if isinstance(node, dict):
        children = node.values()
        # JAX keeps the order of an OrderedDict.
        if not _are_strings(map(type, node)) and type(node) is not OrderedDict and not _sorts(node):
            return False
    if len(node) > _FEW and _are_leaves(map(type, children)):
        return True
    for child in children:
        if isinstance(child, _CONTAINERS) and not (room and _is_plain(child, room - 1)):
            return False
    return True


def _refuse_faulty(tree: Any) -> None:
    """Raise for the first container, in the order of the leaves, that JAX cannot flatten; none may be found."""
    room = max(sys.getrecursionlimit() - _depth_of_stack() - _SPARE_LEVELS, 0)
    above: dict[int, Path] = {}  # the containers around the one looked at
    todo: list[tuple[Path, Any, bool]] = [((), tree, False)]
    while todo:
        path, node, leaving = todo.pop()
        if leaving:
            del above[id(node)]
            continue
        if id(node) in above:
            outer = above[id(node)]
            _refuse(
                path,
                node,
                f"it contains itself: it is {_where(outer, _kind(node)) if outer else 'the whole tree'} again. "
                "A pytree is finite; break the cycle.",
            )
        try:
            children = _children(node)
        except _NODE_ERRORS as err:
            if isinstance(node, dict) and not _sorts(node):
                kinds = " and ".join(sorted({_kind(key) for key in node}))
                _refuse(
                    path,
                    node,
                    f"its keys must sort among themselves, and these ({kinds}) do not. Use keys of one type "
                    "that sorts, or a collections.OrderedDict, which is not sorted.",
                    err,
                )
            _refuse(path, node, f"its class's own flattening raised {type(err).__name__}: {err}.", err)
        if children is None:
            continue
        if len(path) >= room:
            _refuse(
                path[:4],
                node,
                f"what it holds is nested more than {room} levels deep, which is all that Python's recursion "
                "limit leaves. Nest less, or raise the limit with sys.setrecursionlimit.",
            )
        above[id(node)] = path
        todo.append((path, node, True))
        todo.extend(((*path, key), child, False) for key, child in reversed(children))


def _children(node: Any) -> list[tuple[str | int, Any]] | None:
    """What a node holds directly, by key; None for a leaf."""
    asked = itertools.count()  # the first node that JAX asks about is `node`, and it alone is opened
    entries = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda _: next(asked) > 0)[0]
    if any(not keypath for keypath, _ in entries):
        return None
    return [(from_jax_keypath(keypath)[0], child) for keypath, child in entries]


def _sorts(keys: Iterable[Any]) -> bool:
    try:
        sorted(keys)
    except _NODE_ERRORS:
        return False
    return True


def _refusing_node(structure: Any, leaves: Sequence[Any], tree: Any) -> tuple[Path, str]:
    """The innermost node that cannot be built, and the name of its class."""
    start = depth = 0
    found = True
    while found:
        found, at = False, start
        child: Any
        for child in jax.tree_util.treedef_children(structure):
            try:
                jax.tree_util.tree_unflatten(child, leaves[at : at + child.num_leaves])
            except _NODE_ERRORS:
                structure, start, depth, found = child, at, depth + 1, True
                break
            at += child.num_leaves
    keypaths = [keypath for keypath, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    path = from_jax_keypath(keypaths[start][:depth]) if structure.num_leaves else ()
    return path, structure.node_data()[0].__qualname__


def _refuse(path: Path, node: Any, why: str, err: BaseException | None = None) -> NoReturn:
    raise UnsupportedLeafError(f"cannot flatten {_where(path, _kind(node))} as a pytree: {why}") from err


def _where(path: Path, kind: str) -> str:
    return f"the {kind} at '{join_path(path)}'" if path else f"this {kind}"


def _kind(thing: Any) -> str:
    return type(thing).__qualname__


def _depth_of_stack() -> int:
    return sum(1 for _ in traceback.walk_stack(None))
