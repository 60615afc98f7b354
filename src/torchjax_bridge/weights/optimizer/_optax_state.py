"""The optax side of an optimizer state: a chain of named tuples, in which those of the table are found by type.

Owns the walk through the wrappers of a state (chains, masks, injected hyperparameters, nnx variables), the
rebuilding of a state with other moments and counts, and the checks of its content. Knows nothing about torch's
state.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import isclose
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from torchjax_bridge.exchange import Path, from_jax_keypath, join_path

from ._classes import COUNTED, OPTIMIZERS, OptimizerClass, Slot

__all__ = ["check_found", "check_hyperparameters", "count_in", "moments_of", "places_of", "rewrite"]

_COUNTED = dict(COUNTED)


def rewrite(
    state: Any,
    filled: Mapping[tuple[str, str], Mapping[Path, jax.Array | None]],
    count: int | None,
    unmoved: Collection[Path],
    faults: list[str],
) -> Any:
    """The same chain with moments and counts replaced. Leaves in ``unmoved`` need no moment."""

    def renew(node: Any) -> Any:
        if not _is_known(node):
            return node
        fields = {}
        for name, value in zip(node._fields, node, strict=True):
            if name in _COUNTED.get(type(node), ()):
                fields[name] = _set_count(type(node), value, count, faults)
            elif (type(node).__name__, name) in filled:
                fields[name] = _set_moments(value, filled[type(node).__name__, name], unmoved, faults)
            else:
                fields[name] = jax.tree.map(renew, value, is_leaf=_is_known)
        return type(node)(**fields)

    return jax.tree.map(renew, state, is_leaf=_is_known)


def _set_count(kind: type, value: Any, count: int | None, faults: list[str]) -> Any:
    old = _array_of(value)
    if count is None:
        if kind is optax.ScaleByScheduleState:
            faults.append("a schedule counts steps and torch's SGD does not: pass step=, how many were taken")
        return value
    new = jnp.asarray(count, old.dtype)
    return _with_array(value, new)


def _set_moments(
    tree: Any, arrays: Mapping[Path, jax.Array | None], unmoved: Collection[Path], faults: list[str]
) -> Any:
    used = set()

    def fill(keypath: Any, leaf: Any) -> Any:
        if _is_masked(leaf):
            return leaf
        path = _find_path(from_jax_keypath(keypath), arrays)
        if path is None:
            where = from_jax_keypath(keypath)
            if _find_path(where, unmoved) is None:  # check_unmoved has judged the others
                faults.append(f"'{join_path(where)}' is trained by optax and not by the torch optimizer")
            return leaf
        used.add(path)
        array = arrays[path]
        if array is None:
            return leaf
        old = _array_of(leaf)
        if old.dtype != array.dtype or old.shape != array.shape:
            faults.append(
                f"'{join_path(path)}': optax holds {old.dtype}{old.shape}, torch {array.dtype}{array.shape}"
            )
        elif isinstance(old, jax.Array) and len(old.sharding.device_set) > 1:
            array = jax.device_put(array, old.sharding)
        return _with_array(leaf, array)

    new = jax.tree_util.tree_map_with_path(fill, tree, is_leaf=_is_variable)
    faults += [
        f"'{join_path(path)}' is trained by the torch optimizer and not by optax"
        for path in arrays.keys() - used - set(unmoved)
    ]
    return new


def _find_path(path: Path, arrays: Collection[Path]) -> Path | None:
    """The plan's path of a leaf of a moment tree (linen's may lack the collection); None if it has none."""
    for candidate in (path, ("params", *path)):
        if candidate in arrays:
            return candidate
    return None


def moments_of(state: Any, slot: Slot) -> dict[Path, jax.Array]:
    """The moments of one slot, by path."""
    (node,) = (node for node in _walk(state) if type(node) is slot.state)
    leaves = jax.tree_util.tree_leaves_with_path(getattr(node, slot.field), is_leaf=_is_variable)
    return {from_jax_keypath(keypath): _array_of(leaf) for keypath, leaf in leaves if not _is_masked(leaf)}


def places_of(state: Any, slots: Iterable[Slot], known: Collection[Path]) -> dict[Path, bool] | None:
    """Whether each leaf of the plan has a moment (True) or is masked (False); None where there are no moments."""
    fields = {(slot.state, slot.field) for slot in slots}
    if not fields:
        return None
    found: dict[Path, bool] = {}
    for node in _walk(state):
        for name in (field for kind, field in fields if kind is type(node)):
            leaves = jax.tree_util.tree_leaves_with_path(getattr(node, name), is_leaf=_is_place)
            for keypath, leaf in leaves:
                if (path := _find_path(from_jax_keypath(keypath), known)) is not None:
                    found[path] = not (_is_masked(leaf) or isinstance(leaf, optax.MaskedNode))
    return found


def count_in(state: Any, holder: Any) -> int | None:
    """The number of steps that an optax chain, or the ``nnx.Optimizer`` around it, has counted."""
    for node in _walk(state):
        for name in _COUNTED.get(type(node), ()):
            value = getattr(node, name)
            return int(_array_of(value))
    return int(holder.step[...]) if isinstance(holder, nnx.Optimizer) else None


def check_found(state: Any, kind: OptimizerClass, group: Mapping[str, Any], faults: list[str]) -> None:
    """Add a fault unless every moment has exactly one place, and no other accumulator needs one."""
    present = [type(node) for node in _walk(state)]
    wanted = {slot.state for slot in kind.slots_for(group)}
    faults += [
        f"the optax state has {present.count(want)} {want.__name__} where one is needed; build it with {kind.optax}"
        for want in wanted
        if present.count(want) != 1
    ]
    others = {found.__name__ for found in present if found in _SLOT_STATES - wanted} | set(
        _unknown_states(state)
    )
    faults += [
        f"the optax state has a {extra} that torch.optim.{kind.torch_type.__name__} has no moments for"
        for extra in sorted(others)
    ]


def _unknown_states(state: Any) -> Iterator[str]:
    """The states outside the table that keep an array for each parameter, as moments do."""
    for node in jax.tree.leaves(state, is_leaf=_is_state):
        if not _is_state(node):
            continue
        own = [leaf for value in node for leaf in jax.tree.leaves(value, is_leaf=_is_state)]
        arrays = [leaf for leaf in own if not _is_state(leaf)]
        if not _is_known(node) and any(
            getattr(a, "ndim", 0) and jnp.issubdtype(a.dtype, jnp.inexact) for a in arrays
        ):
            yield type(node).__name__
        for value in node:
            yield from _unknown_states(value)


# What torch calls the hyperparameters that optax.inject_hyperparams keeps in its state.
_HYPERPARAMETERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "learning_rate": lambda group: group.get("lr"),
    "b1": lambda group: group["betas"][0] if "betas" in group else None,
    "b2": lambda group: group["betas"][1] if "betas" in group else None,
    "eps": lambda group: group.get("eps"),
    "weight_decay": lambda group: group.get("weight_decay"),
    "momentum": lambda group: group.get("momentum"),
    "decay": lambda group: group.get("alpha"),
}


def check_hyperparameters(state: Any, group: Mapping[str, Any], faults: list[str]) -> None:
    """Compare the hyperparameters in the state: only injected ones are there."""
    for node in _walk(state):
        if type(node) is not optax.InjectStatefulHyperparamsState:
            continue
        for name, value in node.hyperparams.items():
            theirs = _HYPERPARAMETERS[name](group) if name in _HYPERPARAMETERS else None
            ours = _array_of(value)
            if theirs is not None and not isclose(float(ours), float(theirs), rel_tol=1e-6, abs_tol=1e-12):
                faults.append(f"{name} is {float(ours):g} in optax and {float(theirs):g} in torch")


def _walk(state: Any) -> Iterator[Any]:
    """Every known state inside a chain, outer ones first."""
    for node in jax.tree.leaves(state, is_leaf=_is_known):
        if _is_known(node):
            yield node
            for value in node:
                yield from _walk(value)


def _is_known(node: Any) -> bool:
    return type(node) in _COUNTED or type(node) in _SLOT_STATES


_SLOT_STATES = frozenset(slot.state for kind in OPTIMIZERS for slot in kind.slots)


def _is_state(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _is_place(node: Any) -> bool:
    return _is_variable(node) or isinstance(node, optax.MaskedNode)


def _array_of(node: Any) -> Any:
    """The array of an nnx variable, or the array itself."""
    return node.get_value() if _is_variable(node) else node


def _with_array(node: Any, value: Any) -> Any:
    """The same nnx variable or array with another value."""
    return node.copy(value) if _is_variable(node) else value


def _is_masked(node: Any) -> bool:
    """Whether a variable holds the blank of a mask (``jax.tree.map`` over variables puts it inside)."""
    return _is_variable(node) and isinstance(node.get_raw_value(), optax.MaskedNode)
