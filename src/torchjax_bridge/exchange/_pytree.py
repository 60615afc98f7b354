"""Flatten and rebuild a pytree with JAX; an error names the container that JAX cannot handle, and its path.

Trees are checked before JAX flattens them. If jaxlib's flattening fails below a dict, it does not restore
Python's recursion counter (seen in 0.10.2). After one tree that contains itself, every further call in the thread
would raise ``RecursionError``; each dict of mixed keys would take away a few levels.

Refuses containers that contain themselves, nesting beyond Python's recursion limit, dicts whose keys do not sort,
and nodes whose classes cannot hold the new leaves. Custom nodes (registered classes) are checked only after JAX has
failed: flattening them twice would cost as much as the crossing.
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
from ._torch_nodes import register_with_jax

__all__ = ["flatten", "rebuild"]

_CONTAINERS = (dict, list, tuple)
# With more children than this, one set operation (in C) over their types is cheaper than a loop.
_FEW_CHILDREN = 4
_are_strings = frozenset({str}).issuperset
_are_leaves = frozenset(
    {torch.Tensor, torch.nn.Parameter, int, float, bool, complex, str, type(None)}
).issuperset
# A tree within this depth contains no cycle; a deeper one gets the full check.
_QUICK_CHECK_DEPTH = 32
# What a class may raise when it is flattened, built, or its keys are compared.
_NODE_ERRORS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)
# Stack frames of this library and of JAX between a caller and the flattening.
_OWN_FRAMES = 30


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves and the structure of a pytree, as from ``jax.tree_util.tree_flatten``.

    Registers with JAX the classes in it that only torch knows as pytree nodes.

    Raises:
        UnsupportedLeafError: JAX cannot flatten it; the message names the container and its path.
    """
    if isinstance(tree, _CONTAINERS) and not _passes_quick_check(tree):
        _refuse_unflattenable(tree)
    try:
        leaves, structure = jax.tree_util.tree_flatten(tree)
        while register_with_jax(leaves):
            leaves, structure = jax.tree_util.tree_flatten(tree)
        return leaves, structure
    except (*_NODE_ERRORS, SystemError) as err:  # SystemError: jaxlib wraps a RecursionError in it
        _refuse_unflattenable(tree)
        raise UnsupportedLeafError(f"cannot flatten this {_class_name(tree)} as a pytree: {err}.") from err


def rebuild(structure: Any, leaves: Sequence[Any], tree: Any) -> Any:
    """A tree of this structure with new leaves; `tree` is the original.

    Raises:
        UnsupportedLeafError: A node's class rejects the new leaves; the message names it and its path.
    """
    try:
        return jax.tree_util.tree_unflatten(structure, leaves)
    except _NODE_ERRORS as err:
        path, class_name = _find_failing_node(structure, leaves, tree)
        raise UnsupportedLeafError(
            f"cannot rebuild {_place(path, class_name)} around its new leaves: {class_name} raised "
            f"{type(err).__name__}: {err}. Pass its contents in a dict, list or tuple."
        ) from err


def _passes_quick_check(node: Any, levels: int = _QUICK_CHECK_DEPTH) -> bool:
    """Whether builtin containers are shallow and all their dict keys sort: a cheap check of every tree."""
    children: Iterable[Any] = node
    if isinstance(node, dict):
        children = node.values()
        # JAX keeps the order of an OrderedDict.
        if not _are_strings(map(type, node)) and type(node) is not OrderedDict and not _are_sortable(node):
            return False
    if len(node) > _FEW_CHILDREN and _are_leaves(map(type, children)):
        return True
    for child in children:
        if isinstance(child, _CONTAINERS) and not (levels and _passes_quick_check(child, levels - 1)):
            return False
    return True


def _refuse_unflattenable(tree: Any) -> None:
    """Raise for the first container, in the order of the leaves, that JAX cannot flatten, if there is one."""
    levels = max(sys.getrecursionlimit() - _stack_depth() - _OWN_FRAMES, 0)
    ancestors: dict[int, Path] = {}  # the containers around the current node
    todo: list[tuple[Path, Any, bool]] = [((), tree, False)]
    while todo:
        path, node, leaving = todo.pop()
        if leaving:
            del ancestors[id(node)]
            continue
        if id(node) in ancestors:
            outer = ancestors[id(node)]
            _refuse(
                path,
                node,
                f"it contains itself: it is {_place(outer, _class_name(node)) if outer else 'the whole tree'} "
                "again. Break the cycle: a pytree must be finite.",
            )
        try:
            children = _children(node)
        except _NODE_ERRORS as err:
            if isinstance(node, dict) and not _are_sortable(node):
                types = " and ".join(sorted({_class_name(key) for key in node}))
                _refuse(
                    path,
                    node,
                    f"its keys must sort, and these ({types}) do not. Use keys of one type that sorts, or a "
                    "collections.OrderedDict, which JAX does not sort.",
                    err,
                )
            _refuse(path, node, f"its class's flattening function raised {type(err).__name__}: {err}.", err)
        if children is None:
            continue
        if len(path) >= levels:
            _refuse(
                path[:4],
                node,
                f"its contents are nested more than {levels} levels deep, the most that Python's recursion limit "
                "allows here. Nest less, or raise the limit with sys.setrecursionlimit.",
            )
        ancestors[id(node)] = path
        todo.append((path, node, True))
        todo.extend(((*path, key), child, False) for key, child in reversed(children))


def _children(node: Any) -> list[tuple[str | int, Any]] | None:
    """The direct children of a node, by key; None for a leaf."""
    calls = itertools.count()  # is_leaf is called for `node` first; only `node` is opened
    entries = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda _: next(calls) > 0)[0]
    if any(not keypath for keypath, _ in entries):
        return None
    return [(from_jax_keypath(keypath)[0], child) for keypath, child in entries]


def _are_sortable(keys: Iterable[Any]) -> bool:
    try:
        sorted(keys)
    except _NODE_ERRORS:
        return False
    return True


def _find_failing_node(structure: Any, leaves: Sequence[Any], tree: Any) -> tuple[Path, str]:
    """The path and the class name of the innermost node that cannot be built."""
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
    raise UnsupportedLeafError(
        f"cannot flatten {_place(path, _class_name(node))} as a pytree: {why}"
    ) from err


def _place(path: Path, class_name: str) -> str:
    return f"the {class_name} at '{join_path(path)}'" if path else f"this {class_name}"


def _class_name(thing: Any) -> str:
    return type(thing).__qualname__


def _stack_depth() -> int:
    return sum(1 for _ in traceback.walk_stack(None))
