"""Optimizer state crosses, so that training handed over in mid-run goes on along the same trajectory.

Owns the two verbs, and which parameters either side leaves alone. ``_classes`` is the table of optimizers,
``_moments`` lays moments out as their weights are, ``_step_count`` finds the one number of steps, and
``_optax_state`` reads and fills optax states.

Refuses optimizers whose formulas differ, parameters that have taken different numbers of steps, weights whose
layout no moment can take (a sum of two biases), tied weights that Flax keeps apart, and parameters that only
one side trains (``_frozen`` finds them).

Hyperparameters live in optax's closures and not in its state, so only those that ``inject_hyperparams`` shows
are compared. Formulas that keep the same state cannot be told apart.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from flax import nnx
from torch import nn

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import OptimizerStateError
from torchjax_bridge.exchange import Path

from .._plan import UserRule
from ..pairing import Move
from ._classes import OPTIMIZERS, REFUSED, OptimizerClass, Slot, refusals
from ._frozen import (
    UnmovedLeaf,
    check_unmoved,
    try_transformation,
    unmoved_leaves,
    untrained_faults,
    warn_of_late_gradients,
)
from ._moments import moments_to_jax, moments_to_torch
from ._optax_state import check_found, check_hyperparameters, count_in, moments_of, places_of, rewrite
from ._step_count import check_step, step_of
from ._trained import lost_ties, moves_of, names_of

__all__ = ["to_optax", "to_optimizer_state"]


def to_optax(
    optimizer: torch.optim.Optimizer,
    opt_state: Any,
    *,
    module: nn.Module,
    template: Any,
    rules: Iterable[UserRule] = (),
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
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
        inputs: What ``module`` takes, as for `to_flax`.
        kwargs: Keyword arguments that it takes.
        step: How many steps have been taken. Only needed where the optax state counts them (a schedule) and the
            torch optimizer does not (SGD).
        tx: The transformation of a bare ``opt_state``; an ``nnx.Optimizer`` has its own. It is tried on small
            stand-ins, to find what only one side trains.

    Returns:
        A state of the same structure, or a new ``nnx.Optimizer``, with moments in the layouts of the
        weights.

    An optax state does not hold the learning rate, the decay, the betas or eps, so these are not compared
    unless they are injected. Nor does it show its formula where several keep the same state: ``optax.nadam``,
    ``adamax``, ``radam``, ``yogi``, ``lamb`` and ``adamw(nesterov=True)`` all pass for Adam. ``optax.rmsprop``
    needs ``eps_in_sqrt=False``, which is not its default. Take one step on both sides to see that they agree.

    Parameters that torch does not train (``requires_grad`` is off, the optimizer does not have them, no
    gradient ever came) must not be trained by optax either. Give them a label of ``optax.partition`` that
    stands for ``optax.set_to_zero()``, or leave them out of the ``wrt`` of an ``nnx.Optimizer``.
    ``optax.masked`` does not freeze them: it passes their raw gradients on as updates.

    Raises:
        OptimizerStateError: The optimizer has no counterpart, its state has no place in this ``opt_state``, or only
            one side trains a parameter. The message lists every reason.
        PlanError: Module and template do not fit.

    Warns:
        FrozenWarning: torch does not train some parameters, and a bare ``opt_state`` does not show whether optax
            does.

    Memory:
        Always copies.
    """
    kind, group = _class_of(optimizer)
    step = check_step(step)
    moves = moves_of(module, template, rules, inputs, kwargs)
    names = names_of(optimizer, module)
    faults = lost_ties(moves, names)
    state = opt_state.opt_state if isinstance(opt_state, nnx.Optimizer) else opt_state
    unmoved, uncounted = _unmoved_by_torch(
        optimizer, opt_state, module, template, moves, kind.slots_for(group), tx, faults, counts=kind.has_step
    )
    count = step_of(
        optimizer, kind, {k: name for k, name in names.items() if name not in uncounted}, step, faults
    )
    filled: dict[tuple[str, str], dict[Path, jax.Array | None]] = {}
    for slot in kind.slots_for(group):
        filled[slot.state.__name__, slot.field] = moments_to_jax(optimizer, slot, group, moves, names, faults)
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
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
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
        inputs: What ``module`` takes, as for `to_flax`.
        kwargs: Keyword arguments that it takes.
        step: How many steps have been taken, where torch counts them and the optax state does not (RMSprop
            and Adagrad without a schedule, outside an ``nnx.Optimizer``).
        tx: The transformation of a bare ``opt_state``, as for `to_optax`.

    Returns:
        What ``optimizer.load_state_dict`` takes. Moments that came from torch come back to the bit, except
        RMSprop's momentum, which optax keeps times the learning rate.

    What an optax state does not hold is not compared, as in `to_optax`.

    Raises:
        OptimizerStateError: As for `to_optax`.
        PlanError: Module and template do not fit.

    Warns:
        FrozenWarning: As for `to_optax`.

    Memory:
        Always copies.
    """
    kind, group = _class_of(optimizer)
    step = check_step(step)
    moves = moves_of(module, template, rules, inputs, kwargs)
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
    _, uncounted = _unmoved_by_torch(
        optimizer, opt_state, module, template, moves, kind.slots_for(group), tx, faults, counts=False
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
            if name not in uncounted:
                entries[place]["step"] = torch.tensor(float(count))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for slot in kind.slots_for(group):
        arrays = moments_of(state, slot)
        for move in moves:
            for key, tensor in moments_to_torch(arrays, slot, group, move, parameters, faults):
                if key in indices:
                    entries[indices[key]][slot.name] = tensor
    for name, place in indices.items():
        missing = [slot.name for slot in kind.slots_for(group) if slot.name not in entries[place]]
        if missing and name not in uncounted:
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
    *,
    counts: bool,
) -> tuple[Mapping[Path, UnmovedLeaf], frozenset[str]]:
    """The leaves that torch does not move, and the parameters whose steps are not counted; adds faults.

    With ``counts``, torch counts the steps of each parameter.
    """
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
    if counts:
        warn_of_late_gradients([path for path in settled if not unmoved[path].frozen and places.get(path)])
    kept = _kept_in_torch(names_of(optimizer, module), moves)
    return unmoved, frozenset(key for path in settled for key in known[path].torch_keys) | kept


def _kept_in_torch(names: Mapping[int, str], moves: Iterable[Move]) -> frozenset[str]:
    """The parameters that a rule keeps in torch; their moments stay there too."""
    return frozenset(names.values()) - {key for move in moves for key in move.torch_keys}


# --- the table's entry ---------------------------------------------------------------------------------


def _class_of(optimizer: torch.optim.Optimizer) -> tuple[OptimizerClass, Mapping[str, Any]]:
    """The table's entry for an optimizer, and its one set of hyperparameters."""
    for torch_type, why in REFUSED.items():
        if isinstance(optimizer, torch_type):
            raise OptimizerStateError(f"torch.optim.{torch_type.__name__} cannot be handed over: {why}.")
    for kind in OPTIMIZERS:
        if type(optimizer) is kind.torch_type:
            break
    else:
        known = ", ".join(kind.torch_type.__name__ for kind in OPTIMIZERS)
        raise OptimizerStateError(
            f"{what_kind(optimizer)} cannot be handed over; these can: {known} of torch.optim."
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
            "it has complex parameters: torch squares their real and imaginary parts apart, optax their absolute "
            "value"
        )
    # Some parameters may be spared the decay (a mask in optax): no moment depends on it.
    decays = {group.pop("weight_decay", 0) for group in groups}
    if len(decays - {0}) > 1 or any(group != groups[0] for group in groups):
        faults.append(
            "its param_groups differ in their hyperparameters, and in more than whether weight_decay is 0; hand "
            "them over one by one into the inner states of optax.partition"
        )
    _raise_all(f"hand torch.optim.{kind.torch_type.__name__} over", list(dict.fromkeys(faults)))
    return kind, {**groups[0], "weight_decay": max(decays, default=0)}


def _raise_all(what: str, faults: list[str]) -> None:
    if faults:
        lines = "\n".join(f"  {fault}" for fault in dict.fromkeys(faults))
        raise OptimizerStateError(f"cannot {what}:\n{lines}")
