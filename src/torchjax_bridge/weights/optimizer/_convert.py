"""Optimizer state crosses, so that training handed over in mid-run goes on along the same trajectory.

Moments take the layouts of their weights, by the weights' own plan; step counts follow. Owns the two verbs; which
number is which is the table in ``_classes``, and what an optax state holds is for ``_optax_state``. Refuses
optimizers whose formulas differ, states that have no single step count, and weights whose layout no moment can take
(a sum of two biases) or whose tie Flax does not keep; and parameters that one side trains and the other does not,
which ``_frozen`` finds out. Hyperparameters live in optax's closures and not in its
state, so they are not compared, except those that ``inject_hyperparams`` shows; nor are formulas whose states
are alike.
"""

from collections.abc import Iterable, Iterator, Mapping
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.errors import OptimizerStateError
from torchjax_bridge.exchange import Path, join_path, to_jax, to_torch

from .._plan import UserRule
from ..moving import fresh
from ..pairing import Move
from ._classes import OPTIMIZERS, REFUSED, OptimizerClass, Slot, refusals
from ._frozen import FREEZE, UnmovedLeaf, check_unmoved, try_transformation, unmoved_leaves, untrained_faults
from ._optax_state import check_found, check_hyperparameters, count_in, moments_of, places_of, rewrite
from ._trained import lost_ties, moves_of, names_of

__all__ = ["to_optax", "to_optimizer_state"]


def to_optax(
    optimizer: torch.optim.Optimizer,
    opt_state: Any,
    *,
    module: nn.Module,
    template: Any,
    rules: Iterable[UserRule] = (),
    step: int | None = None,
    tx: optax.GradientTransformation | None = None,
) -> Any:
    """An optax state that goes on where a torch optimizer stands.

    Args:
        optimizer: ``torch.optim`` SGD, Adam, AdamW, RMSprop or Adagrad over parameters of ``module``.
        opt_state: The state to fill, from ``tx.init(params)``, however the transformation is chained, masked
            or injected; or an ``nnx.Optimizer``. It is left untouched.
        module: The torch module whose parameters are optimized.
        template: The side that ``opt_state`` was made for: an ``nnx.Module``, an ``nnx.State`` or linen variables,
            as for `to_flax`, or the variables of ``as_jax_module(module)``, which have torch's names and layouts.
        rules: As for `to_flax`.
        step: How many steps have been taken, for optimizers that torch does not count them for (SGD); only
            needed where the optax state counts them (a schedule).
        tx: The transformation that a bare ``opt_state`` is of; an ``nnx.Optimizer`` has its own. With it, what is
            trained on one side and not on the other is found by trying it on small stand-ins.

    Returns:
        A state of the same structure, or a new ``nnx.Optimizer``, with moments in the layouts of the
        weights.

    What an optax state does not hold is not seen: learning rate, decay, betas and eps (other than injected ones),
    and which of the formulas it is that keep the same state. ``optax.nadam``, ``adamax``, ``radam``, ``yogi`` and
    ``lamb`` are taken for Adam, and so is ``adamw(nesterov=True)``; ``optax.rmsprop`` needs ``eps_in_sqrt=False``,
    which is not its default. Take one step on both sides to see that they agree.

    Parameters that torch leaves as they are (``requires_grad`` is off, the optimizer does not have them, no
    gradient ever came) must stay in optax as well: by a label of ``optax.partition`` that stands for
    ``optax.set_to_zero()``, or by the ``wrt`` of an ``nnx.Optimizer``. ``optax.masked`` would pass their raw
    gradients on as updates.

    Raises:
        OptimizerStateError: The optimizer has no counterpart, or its state none in this ``opt_state``, or one of
            the two would move a parameter that the other leaves; the message lists every reason.
        PlanError: Module and template do not fit.

    Warns:
        FrozenWarning: torch leaves parameters as they are, and a bare ``opt_state`` does not show whether optax
            does.

    Memory:
        Always copies.
    """
    kind, group = _class_of(optimizer)
    step = _checked(step)
    moves = moves_of(module, template, rules)
    names = names_of(optimizer, module)
    faults = lost_ties(moves, names)
    state = opt_state.opt_state if isinstance(opt_state, nnx.Optimizer) else opt_state
    unmoved, apart = _unmoved_by_torch(
        optimizer, opt_state, module, template, moves, kind.slots_for(group), tx, faults
    )
    count = _step_of(
        optimizer, kind, {k: name for k, name in names.items() if name not in apart}, step, faults
    )
    filled: dict[tuple[str, str], dict[Path, jax.Array | None]] = {}
    for slot in kind.slots_for(group):
        filled[slot.state.__name__, slot.field] = _moments_to_jax(
            optimizer, slot, group, moves, names, faults
        )
    new = rewrite(state, filled, count, unmoved, faults)
    check_found(state, kind, group, faults)
    check_hyperparameters(state, group, faults)
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
    tx: optax.GradientTransformation | None = None,
) -> dict[str, Any]:
    """A ``state_dict`` for a torch optimizer that goes on where an optax state stands.

    Args:
        opt_state: The optax state, or an ``nnx.Optimizer``.
        optimizer: The torch optimizer to fill; it is only read. Its hyperparameters are kept.
        module: The torch module whose parameters it optimizes.
        template: The side that ``opt_state`` belongs to, as for `to_optax`.
        rules: As for `to_flax`.
        step: How many steps have been taken, where torch counts them and the optax state does not (RMSprop
            and Adagrad without a schedule, outside an ``nnx.Optimizer``).
        tx: The transformation of a bare ``opt_state``, as for `to_optax`.

    Returns:
        What ``optimizer.load_state_dict`` takes. Moments that came from torch come back to the bit, except
        RMSprop's momentum, which optax keeps times the learning rate.

    What an optax state does not hold is not seen, as in `to_optax`.

    Raises:
        OptimizerStateError: As for `to_optax`.
        PlanError: Module and template do not fit.

    Warns:
        FrozenWarning: As for `to_optax`.

    Memory:
        Always copies.
    """
    kind, group = _class_of(optimizer)
    step = _checked(step)
    moves = moves_of(module, template, rules)
    names = names_of(optimizer, module)
    state = opt_state.opt_state if isinstance(opt_state, nnx.Optimizer) else opt_state
    faults = lost_ties(moves, names)
    check_found(state, kind, group, faults)
    check_hyperparameters(state, group, faults)
    _raise_all("hand the optax state over to torch", faults)
    count = count_in(state, opt_state)
    if step is not None and count not in (None, step):
        raise OptimizerStateError(f"step={step} was passed, but the optax state has counted {count}.")
    count = step if count is None else count
    _, apart = _unmoved_by_torch(
        optimizer, opt_state, module, template, moves, kind.slots_for(group), tx, faults
    )
    indices = {name: place for place, name in enumerate(names.values())}
    entries: dict[int, dict[str, Any]] = {place: {} for place in indices.values()}
    if kind.has_step:
        if count is None:
            raise OptimizerStateError(
                "cannot hand the optax state over to torch: it counts no steps, and torch's "
                f"{kind.torch_type.__name__} does. Pass step=, how many were taken."
            )
        for name, place in indices.items():
            if name not in apart:
                entries[place]["step"] = torch.tensor(float(count))
    for slot in kind.slots_for(group):
        arrays = moments_of(state, slot)
        for move in moves:
            for key, tensor in _moments_to_torch(arrays, slot, group, move, faults):
                if key in indices:
                    entries[indices[key]][slot.name] = tensor
    for name, place in indices.items():
        missing = [slot.name for slot in kind.slots_for(group) if slot.name not in entries[place]]
        if missing and name not in apart:
            faults.append(f"'{name}': optax has no {', '.join(missing)} for it")
    _raise_all("hand the optax state over to torch", faults)
    own = optimizer.state_dict()
    for name in _kept_in_torch(names, moves):
        entries[indices[name]] = own["state"].get(indices[name], {})
    return {
        "state": {place: entry for place, entry in entries.items() if entry},
        "param_groups": own["param_groups"],
    }


# --- what one side leaves alone ----------------------------------------------------------------------


def _unmoved_by_torch(
    optimizer: torch.optim.Optimizer,
    opt_state: Any,
    module: nn.Module,
    template: Any,
    moves: Iterable[Move],
    slots: Iterable[Slot],
    tx: Any,
    faults: list[str],
) -> tuple[Mapping[Path, UnmovedLeaf], frozenset[str]]:
    """The leaves that torch does not move, and the parameters that so take part in no count; or faults."""
    known = {path: move for move in moves for path in move.flax_paths}
    state = opt_state.opt_state if isinstance(opt_state, nnx.Optimizer) else opt_state
    unmoved = unmoved_leaves(optimizer, module, moves)
    places = places_of(state, slots, known)
    tried = try_transformation(opt_state, template, tx, unmoved, known)
    settled = check_unmoved(unmoved, tried, places, state, faults)
    places = places or {}
    faults += untrained_faults(
        tried, {path for path in known if path not in unmoved and not places.get(path)}
    )
    # What never had a gradient may have one yet, and then its moment follows the count of the others.
    apart = (path for path in settled if unmoved[path].frozen or not places.get(path))
    kept = _kept_in_torch(names_of(optimizer, module), moves)
    return unmoved, frozenset(key for path in apart for key in known[path].torch_keys) | kept


def _kept_in_torch(names: Mapping[int, str], moves: Iterable[Move]) -> frozenset[str]:
    """The parameters that a rule keeps in torch, and their moments with them."""
    return frozenset(names.values()) - {key for move in moves for key in move.torch_keys}


# --- the torch side ----------------------------------------------------------------------------------


def _class_of(optimizer: torch.optim.Optimizer) -> tuple[OptimizerClass, Mapping[str, Any]]:
    """The table's row for an optimizer, and its one set of hyperparameters."""
    for torch_type, why in REFUSED.items():
        if isinstance(optimizer, torch_type):
            raise OptimizerStateError(f"torch.optim.{torch_type.__name__} cannot be handed over: {why}.")
    for kind in OPTIMIZERS:
        if type(optimizer) is kind.torch_type:
            break
    else:
        known = ", ".join(kind.torch_type.__name__ for kind in OPTIMIZERS)
        raise OptimizerStateError(
            f"a {type(optimizer).__name__} cannot be handed over; these can: {known} of torch.optim."
        )
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    faults = [reason for group in groups for reason in refusals(group)]
    if not kind.is_linear and any(
        p.is_complex() for group in optimizer.param_groups for p in group["params"]
    ):
        faults.append(
            "it has complex parameters, of which torch squares the real and the imaginary part apart, and optax "
            "the absolute value"
        )
    # A decay that some parameters are spared, which optax says with a mask, is in no moment.
    decays = {group.pop("weight_decay", 0) for group in groups}
    if len(decays - {0}) > 1 or any(group != groups[0] for group in groups):
        faults.append(
            "its param_groups differ in their hyperparameters, and in more than whether weight_decay is 0; hand "
            "them over one by one into the inner states of optax.partition"
        )
    _raise_all(f"hand torch.optim.{kind.torch_type.__name__} over", list(dict.fromkeys(faults)))
    return kind, {**groups[0], "weight_decay": max(decays, default=0)}


def _checked(step: Any) -> int | None:
    """A number of steps, or None."""
    if step is None:
        return None
    try:
        count = index(step)
    except TypeError:
        count = -1
    if count < 0 or isinstance(step, bool):
        raise OptimizerStateError(f"step is how many steps have been taken, such as 100; got {step!r}.")
    return count


def _step_of(
    optimizer: torch.optim.Optimizer,
    kind: OptimizerClass,
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
            if (name := names.get(id(parameter))) is not None:
                taken = optimizer.state.get(parameter, {}).get("step", 0)
                steps.setdefault(int(taken), []).append(name)
    if len(steps) > 1:
        listed = "; ".join(
            f"{count} for {', '.join(sorted(who)[:3])}" for count, who in sorted(steps.items())
        )
        never = (
            "; what is never given a gradient is left out of both: of the torch optimizer, and in optax by "
            f"{FREEZE}"
        )
        faults.append(
            f"its parameters have taken different numbers of steps ({listed}), and optax has one number for all"
            + never * (0 in steps)
        )
    count = max(steps, default=0)
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
        laid_out.update(zip(move.flax_paths, fresh(move.layout.forward(tensors)), strict=True))
    arrays = to_jax({join_path(path): tensor for path, tensor in laid_out.items()})
    return {path: arrays[join_path(path)] for path in laid_out}


def _no_image(move: Move) -> str | None:
    if move.layout.is_linear and move.layout.lossless:
        return None
    return (
        f"{' + '.join(move.torch_keys)}: Flax has one weight for these ({move.layout}), and their moments do not "
        "give its moments; go on with a fresh optimizer state"
    )


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
    for key, tensor in zip(move.torch_keys, fresh(move.layout.inverse(tensors)), strict=True):
        yield key, tensor if factor == 1 else tensor / factor


def _raise_all(what: str, faults: list[str]) -> None:
    if faults:
        lines = "\n".join(f"  {fault}" for fault in dict.fromkeys(faults))
        raise OptimizerStateError(f"cannot {what}:\n{lines}")
