"""Optimizer state crosses, so that training handed over in mid-run goes on along the same trajectory.

Moments take the layouts of their weights, by the weights' own plan; step counts follow. Owns the two verbs; which
number is which is the table in ``_optimizer_kinds``. Refuses optimizers whose formulas differ, states that have no
single step count, and weights whose layout no moment can take (a sum of two biases). Hyperparameters live in
optax's closures and not in its state, so they are not compared, except those that ``inject_hyperparams`` shows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isclose
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.errors import OptimizerStateError
from torchjax_bridge.exchange import Path, from_jax_keypath, join_path, to_jax, to_torch

from ._bind import Move
from ._memory import fresh
from ._optimizer_kinds import COUNTED, KINDS, REFUSED, Kind, Slot, refusals
from ._plan import UserRule, plan

__all__ = ["to_optax", "to_optimizer_state"]

_COUNTED = dict(COUNTED)


def to_optax(
    optimizer: torch.optim.Optimizer,
    opt_state: Any,
    *,
    module: nn.Module,
    template: Any,
    rules: Iterable[UserRule] = (),
    step: int | None = None,
) -> Any:
    """An optax state that goes on where a torch optimizer stands.

    Args:
        optimizer: ``torch.optim`` SGD, Adam, AdamW, RMSprop or Adagrad over parameters of ``module``.
        opt_state: The state to fill, from ``tx.init(params)``, however the transformation is chained, masked
            or injected; or an ``nnx.Optimizer``. It is left untouched.
        module: The torch module whose parameters are optimized.
        template: The Flax side that ``opt_state`` was made for: an ``nnx.Module``, an ``nnx.State`` or linen
            variables, as for `to_flax`.
        rules: As for `to_flax`.
        step: How many steps have been taken, for optimizers that torch does not count them for (SGD); only
            needed where the optax state counts them (a schedule).

    Returns:
        A state of the same structure, or a new ``nnx.Optimizer``, with moments in the layouts of the
        weights.

    Raises:
        OptimizerStateError: The optimizer has no counterpart, or its state none in this ``opt_state``; the
            message lists every reason.
        PlanError: Module and template do not fit.

    Memory:
        Always copies.
    """
    kind, group = _kind_of(optimizer)
    moves = _moves(module, template, rules)
    names = _names(optimizer, module)
    faults: list[str] = []
    count = _step_of(optimizer, kind, names, step, faults)
    filled: dict[tuple[str, str], dict[Path, jax.Array | None]] = {}
    for slot in _slots(kind, group):
        filled[slot.state.__name__, slot.field] = _moments_to_jax(
            optimizer, slot, group, moves, names, faults
        )
    state = opt_state.opt_state if isinstance(opt_state, nnx.Optimizer) else opt_state
    new = _rewrite(state, filled, count, faults)
    _check_found(state, kind, group, faults)
    _check_hyperparameters(state, group, faults)
    _raise_all("hand the torch optimizer over to optax", faults)
    if not isinstance(opt_state, nnx.Optimizer):
        return new
    graphdef, flat = nnx.split(opt_state)
    successor: Any = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, flat))
    successor.opt_state = nnx.data(new)
    if count is not None:
        successor.step[...] = jnp.asarray(count, successor.step[...].dtype)
    return successor


def to_optimizer_state(
    opt_state: Any,
    optimizer: torch.optim.Optimizer,
    *,
    module: nn.Module,
    template: Any,
    rules: Iterable[UserRule] = (),
    step: int | None = None,
) -> dict[str, Any]:
    """A ``state_dict`` for a torch optimizer that goes on where an optax state stands.

    Args:
        opt_state: The optax state, or an ``nnx.Optimizer``.
        optimizer: The torch optimizer to fill; it is only read. Its hyperparameters are kept.
        module: The torch module whose parameters it optimizes.
        template: The Flax side that ``opt_state`` belongs to.
        rules: As for `to_flax`.
        step: How many steps have been taken, where torch counts them and the optax state does not (RMSprop
            and Adagrad without a schedule, outside an ``nnx.Optimizer``).

    Returns:
        What ``optimizer.load_state_dict`` takes.

    Raises:
        OptimizerStateError: As for `to_optax`.
        PlanError: Module and template do not fit.

    Memory:
        Always copies.
    """
    kind, group = _kind_of(optimizer)
    moves = _moves(module, template, rules)
    names = _names(optimizer, module)
    state = opt_state.opt_state if isinstance(opt_state, nnx.Optimizer) else opt_state
    faults: list[str] = []
    _check_found(state, kind, group, faults)
    _check_hyperparameters(state, group, faults)
    _raise_all("hand the optax state over to torch", faults)
    count = _count_in(state, opt_state)
    if step is not None and count not in (None, step):
        raise OptimizerStateError(f"step={step} was passed, but the optax state has counted {count}.")
    count = step if count is None else count
    indices = {name: place for place, name in enumerate(names.values())}
    entries: dict[int, dict[str, Any]] = {place: {} for place in indices.values()}
    if kind.has_step:
        if count is None:
            raise OptimizerStateError(
                "cannot hand the optax state over to torch: it counts no steps, and torch's "
                f"{kind.torch_type.__name__} does. Pass step=, how many were taken."
            )
        for entry in entries.values():
            entry["step"] = torch.tensor(float(count))
    for slot in _slots(kind, group):
        arrays = _moments_of(state, slot)
        for move in moves:
            for key, tensor in _moments_to_torch(arrays, slot, group, move, faults):
                if key in indices:
                    entries[indices[key]][slot.name] = tensor
    for name, place in indices.items():
        missing = [slot.name for slot in _slots(kind, group) if slot.name not in entries[place]]
        if missing:
            faults.append(f"'{name}': optax has no {', '.join(missing)} for it")
    _raise_all("hand the optax state over to torch", faults)
    groups = optimizer.state_dict()["param_groups"]
    return {"state": {place: entry for place, entry in entries.items() if entry}, "param_groups": groups}


# --- the torch side ----------------------------------------------------------------------------------


def _kind_of(optimizer: torch.optim.Optimizer) -> tuple[Kind, Mapping[str, Any]]:
    """The table's row for an optimizer, and its one set of hyperparameters."""
    for torch_type, why in REFUSED.items():
        if isinstance(optimizer, torch_type):
            raise OptimizerStateError(f"torch.optim.{torch_type.__name__} cannot be handed over: {why}.")
    for kind in KINDS:
        if type(optimizer) is kind.torch_type:
            break
    else:
        known = ", ".join(kind.torch_type.__name__ for kind in KINDS)
        raise OptimizerStateError(
            f"a {type(optimizer).__name__} cannot be handed over; these can: {known} of torch.optim."
        )
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    faults = [reason for group in groups for reason in refusals(group)]
    if any(group != groups[0] for group in groups):
        faults.append(
            "its param_groups differ in their hyperparameters; hand them over one by one into the inner states "
            "of optax.partition"
        )
    _raise_all(f"hand torch.optim.{kind.torch_type.__name__} over", list(dict.fromkeys(faults)))
    return kind, groups[0]


def _slots(kind: Kind, group: Mapping[str, Any]) -> list[Slot]:
    return [slot for slot in kind.slots if slot.when(group)]


def _moves(module: nn.Module, template: Any, rules: Iterable[UserRule]) -> tuple[Move, ...]:
    made = plan(module, template, rules=rules)
    made.report.raise_unless_ok("match the optimizer's parameters", strict=True)
    trained = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return tuple(move for move in made.moves if trained.intersection(move.torch_keys))


def _names(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[int, str]:
    """The name of every optimized parameter by its identity, in the order of torch's indices."""
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    names = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise OptimizerStateError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is none of the "
                    "module's: pass the module that it was built from."
                )
            names[id(parameter)] = known[id(parameter)]
    return names


def _step_of(
    optimizer: torch.optim.Optimizer,
    kind: Kind,
    names: Mapping[int, str],
    given: int | None,
    faults: list[str],
) -> int | None:
    """The one number of steps taken, if torch or the caller knows it."""
    if not kind.has_step:
        return given
    steps: dict[int, list[str]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            taken = optimizer.state.get(parameter, {}).get("step", 0)
            steps.setdefault(int(taken), []).append(names[id(parameter)])
    if len(steps) > 1:
        listed = "; ".join(
            f"{count} for {', '.join(sorted(who)[:3])}" for count, who in sorted(steps.items())
        )
        faults.append(
            f"its parameters have taken different numbers of steps ({listed}), and optax counts one"
        )
        return None
    (count,) = steps or {0: []}
    if given is not None and given != count:
        faults.append(f"step={given} was passed, but the optimizer has counted {count}")
    return count


def _moments_to_jax(
    optimizer: torch.optim.Optimizer,
    slot: Slot,
    group: Mapping[str, Any],
    moves: Iterable[Move],
    names: Mapping[int, str],
    faults: list[str],
) -> dict[Path, jax.Array | None]:
    """The moments by their leaf; None where a fault was told of it already."""
    parameters = {name: p for g in optimizer.param_groups for p in g["params"] for name in [names[id(p)]]}
    laid_out: dict[Path, torch.Tensor | None] = {}
    for move in moves:
        if not any(key in parameters for key in move.torch_keys):
            continue
        if (fault := _no_image(move)) is not None:
            faults.append(fault)
            laid_out |= dict.fromkeys(move.flax_paths)
            continue
        absent = [key for key in move.torch_keys if key not in parameters]
        if absent:
            faults.append(f"{absent} are not optimized, but they are one leaf with others that are")
            continue
        tensors = []
        for key in move.torch_keys:
            parameter = parameters[key]
            moment = optimizer.state.get(parameter, {}).get(slot.name)
            moment = torch.zeros_like(parameter) if moment is None else moment
            tensors.append(moment.detach() * slot.factor(group))
        for path, tensor in zip(move.flax_paths, move.layout.forward(tensors), strict=True):
            laid_out[path] = fresh(tensor)
    arrays = to_jax({join_path(path): tensor for path, tensor in laid_out.items()})
    return {path: arrays[join_path(path)] for path in laid_out}


def _no_image(move: Move) -> str | None:
    if move.layout.is_linear and move.layout.lossless:
        return None
    return (
        f"{' + '.join(move.torch_keys)}: Flax has one weight for these ({move.layout}), and their moments do not "
        "give its moments; go on with a fresh optimizer state"
    )


# --- the optax side ----------------------------------------------------------------------------------


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _known(node: Any) -> bool:
    return type(node) in _COUNTED or type(node) in _SLOT_STATES


_SLOT_STATES = frozenset(slot.state for kind in KINDS for slot in kind.slots)


def _walk(state: Any) -> Iterator[Any]:
    """Every known state inside a chain, outer ones first."""
    for node in jax.tree.leaves(state, is_leaf=_known):
        if _known(node):
            yield node
            for value in node:
                yield from _walk(value)


def _rewrite(
    state: Any,
    filled: Mapping[tuple[str, str], Mapping[Path, jax.Array | None]],
    count: int | None,
    faults: list[str],
) -> Any:
    """The same chain with moments and counts replaced."""

    def replace(node: Any) -> Any:
        if not _known(node):
            return node
        fields = {}
        for name, value in zip(node._fields, node, strict=True):
            if name in _COUNTED.get(type(node), ()):
                fields[name] = _set_count(type(node), value, count, faults)
            elif (type(node).__name__, name) in filled:
                fields[name] = _set_moments(value, filled[type(node).__name__, name], faults)
            else:
                fields[name] = jax.tree.map(replace, value, is_leaf=_known)
        return type(node)(**fields)

    return jax.tree.map(replace, state, is_leaf=_known)


def _set_count(kind: type, value: Any, count: int | None, faults: list[str]) -> Any:
    old = value.get_value() if _is_variable(value) else value
    if count is None:
        if kind is optax.ScaleByScheduleState:
            faults.append("a schedule counts steps and torch's SGD does not: pass step=, how many were taken")
        return value
    new = jnp.asarray(count, old.dtype)
    return value.copy(new) if _is_variable(value) else new


def _set_moments(tree: Any, arrays: Mapping[Path, jax.Array | None], faults: list[str]) -> Any:
    used = set()

    def replace(keypath: Any, leaf: Any) -> Any:
        path = _find(from_jax_keypath(keypath), arrays)
        if path is None:
            faults.append(
                f"'{join_path(from_jax_keypath(keypath))}' is trained by optax and not by the torch optimizer; "
                "mask it (optax.masked), or give it to both"
            )
            return leaf
        used.add(path)
        array = arrays[path]
        if array is None:
            return leaf
        old = leaf.get_value() if _is_variable(leaf) else leaf
        if old.dtype != array.dtype or old.shape != array.shape:
            faults.append(
                f"'{join_path(path)}': optax holds {old.dtype}{old.shape}, torch {array.dtype}{array.shape}"
            )
        return leaf.copy(array) if _is_variable(leaf) else array

    new = jax.tree_util.tree_map_with_path(replace, tree, is_leaf=_is_variable)
    faults += [
        f"'{join_path(path)}' is trained by the torch optimizer and not by optax"
        for path in arrays.keys() - used
    ]
    return new


def _find(path: Path, arrays: Mapping[Path, Any]) -> Path | None:
    """The path under which the plan knows a leaf of a moment tree (linen's may lack the collection)."""
    for candidate in (path, ("params", *path)):
        if candidate in arrays:
            return candidate
    return None


def _moments_of(state: Any, slot: Slot) -> dict[Path, jax.Array]:
    (node,) = (node for node in _walk(state) if type(node) is slot.state)
    leaves = jax.tree_util.tree_leaves_with_path(getattr(node, slot.field), is_leaf=_is_variable)
    return {
        from_jax_keypath(keypath): leaf.get_value() if _is_variable(leaf) else leaf
        for keypath, leaf in leaves
    }


def _moments_to_torch(
    arrays: Mapping[Path, jax.Array],
    slot: Slot,
    group: Mapping[str, Any],
    move: Move,
    faults: list[str],
) -> Iterator[tuple[str, torch.Tensor]]:
    found = []
    for path in move.flax_paths:
        short = path[1:] if path[:1] == ("params",) else path
        array = arrays.get(path, arrays.get(short))
        if array is None:
            return
        found.append(array)
    if (fault := _no_image(move)) is not None:
        faults.append(fault)
        return
    tensors = list(to_torch(dict(enumerate(found))).values())
    factor = slot.factor(group)
    for key, tensor in zip(move.torch_keys, move.layout.inverse(tensors), strict=True):
        yield key, fresh(tensor) if factor == 1 else fresh(tensor) / factor


def _count_in(state: Any, holder: Any) -> int | None:
    """How many steps an optax chain, or the ``nnx.Optimizer`` around it, has counted."""
    for node in _walk(state):
        for name in _COUNTED.get(type(node), ()):
            value = getattr(node, name)
            return int(value.get_value() if _is_variable(value) else value)
    return int(holder.step[...]) if isinstance(holder, nnx.Optimizer) else None


def _check_found(state: Any, kind: Kind, group: Mapping[str, Any], faults: list[str]) -> None:
    """Every moment has exactly one place, and no other accumulator waits for one."""
    present = [type(node) for node in _walk(state)]
    wanted = {slot.state for slot in _slots(kind, group)}
    faults += [
        f"the optax state has {present.count(want)} {want.__name__} where one is needed; build it with {kind.optax}"
        for want in wanted
        if present.count(want) != 1
    ]
    faults += [
        f"the optax state has a {extra} that torch.optim.{kind.torch_type.__name__} has no moments for"
        for extra in sorted({found.__name__ for found in present if found in _SLOT_STATES - wanted})
    ]


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


def _check_hyperparameters(state: Any, group: Mapping[str, Any], faults: list[str]) -> None:
    """Compare the hyperparameters that are in the state, which only injected ones are."""
    for node in _walk(state):
        if type(node) is not optax.InjectStatefulHyperparamsState:
            continue
        for name, value in node.hyperparams.items():
            theirs = _HYPERPARAMETERS[name](group) if name in _HYPERPARAMETERS else None
            ours = value.get_value() if _is_variable(value) else value
            if theirs is not None and not isclose(float(ours), float(theirs), rel_tol=1e-6, abs_tol=1e-12):
                faults.append(f"{name} is {float(ours):g} in optax and {float(theirs):g} in torch")


def _raise_all(what: str, faults: list[str]) -> None:
    if faults:
        lines = "\n".join(f"  {fault}" for fault in dict.fromkeys(faults))
        raise OptimizerStateError(f"cannot {what}:\n{lines}")
