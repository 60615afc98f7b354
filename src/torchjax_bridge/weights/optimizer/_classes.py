"""Which moment of a torch optimizer is which field of an optax state, and which optimizers are refused.

A table and nothing else. Two optimizers are here only if their update formulas are the same, so that training
goes on along the same trajectory. Where they differ (dampening, amsgrad, Nesterov-Adam) the table says why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optax
import torch

__all__ = ["COUNTED", "OPTIMIZERS", "REFUSED", "OptimizerClass", "Slot", "refusals"]

_Group = Mapping[str, Any]


def _one(group: _Group) -> float:
    return 1.0


def _minus_learning_rate(group: _Group) -> float:
    # torch: buf = m * buf + g; w -= lr * buf. optax.rmsprop scales by -lr first and traces afterwards.
    return -float(group["lr"])


@dataclass(frozen=True)
class Slot:
    """One moment of every parameter.

    Attributes:
        name: The name in torch's per-parameter state.
        state: The optax state that holds it.
        field: Its field there.
        factor: Gives the number by which torch's value is multiplied for optax.
        when: Tells whether an optimizer with these hyperparameters has the moment.
    """

    name: str
    state: type
    field: str
    factor: Callable[[_Group], float] = _one
    when: Callable[[_Group], bool] = lambda group: True


@dataclass(frozen=True)
class OptimizerClass:
    """One class of torch optimizers, and where its state lies in optax.

    Attributes:
        torch_type: Its class.
        slots: Its moments.
        has_step: Whether torch counts steps for every parameter.
        optax: The call that builds the counterpart, for messages.
        is_linear: Whether its moments are sums of gradients; then complex gradients are no special case.
    """

    torch_type: type
    slots: tuple[Slot, ...]
    has_step: bool
    optax: str
    is_linear: bool = False

    def slots_for(self, group: _Group) -> list[Slot]:
        """The moments that an optimizer with these hyperparameters has."""
        return [slot for slot in self.slots if slot.when(group)]


def _has_momentum(group: _Group) -> bool:
    return group["momentum"] != 0


def _is_centered(group: _Group) -> bool:
    return bool(group["centered"])


def _is_plain(group: _Group) -> bool:
    return not group["centered"]


_ADAM = (
    Slot("exp_avg", optax.ScaleByAdamState, "mu"),
    Slot("exp_avg_sq", optax.ScaleByAdamState, "nu"),
)

OPTIMIZERS = (
    OptimizerClass(torch.optim.AdamW, _ADAM, True, "optax.adamw(lr, b1, b2, eps, weight_decay=...)"),
    OptimizerClass(
        torch.optim.Adam,
        _ADAM,
        True,
        "optax.adam(lr, b1, b2, eps), behind optax.add_decayed_weights where weight_decay is not 0",
    ),
    OptimizerClass(
        torch.optim.SGD,
        (Slot("momentum_buffer", optax.TraceState, "trace", when=_has_momentum),),
        False,
        "optax.sgd(lr, momentum, nesterov), behind optax.add_decayed_weights where weight_decay is not 0",
        is_linear=True,
    ),
    OptimizerClass(
        torch.optim.RMSprop,
        (
            Slot("square_avg", optax.ScaleByRmsState, "nu", when=_is_plain),
            Slot("square_avg", optax.ScaleByRStdDevState, "nu", when=_is_centered),
            Slot("grad_avg", optax.ScaleByRStdDevState, "mu", when=_is_centered),
            Slot("momentum_buffer", optax.TraceState, "trace", _minus_learning_rate, _has_momentum),
        ),
        True,
        "optax.rmsprop(lr, decay=alpha, eps=eps, eps_in_sqrt=False, centered=..., momentum=...)",
    ),
    OptimizerClass(
        torch.optim.Adagrad,
        (Slot("sum", optax.ScaleByRssState, "sum_of_squares"),),
        True,
        "optax.adagrad(lr, initial_accumulator_value, eps)",
    ),
)

# Optimizers of torch whose optax namesakes follow another formula.
REFUSED = {
    torch.optim.NAdam: "optax.nadam has no momentum_decay schedule, so the two part from the first step",
    torch.optim.SparseAdam: "optax has no lazy Adam for sparse gradients",
    torch.optim.LBFGS: "optax.lbfgs keeps another history",
}

# States of optax that count steps, and the fields that do.
COUNTED: tuple[tuple[type, tuple[str, ...]], ...] = (
    (optax.ScaleByAdamState, ("count",)),
    (optax.ScaleByScheduleState, ("count",)),
    (optax.InjectStatefulHyperparamsState, ("count",)),
    (optax.MultiStepsState, ("gradient_step",)),
)


def refusals(group: _Group) -> list[str]:
    """The reasons why hyperparameters of a torch optimizer have no counterpart in optax."""
    found = []
    if group.get("centered") is not None and group.get("momentum") and not group["lr"]:
        found.append("lr=0: optax.rmsprop keeps its momentum times the learning rate; set the lr first")
    if group.get("amsgrad"):
        found.append(
            "amsgrad=True: optax.amsgrad takes the maximum of the bias-corrected moment, torch of the raw one"
        )
    if group.get("dampening"):
        found.append(
            f"dampening={group['dampening']:g}: optax.trace has none, and torch leaves it out of the first step"
        )
    if group.get("maximize"):
        found.append("maximize=True: negate the loss instead")
    if group.get("lr_decay"):
        found.append(f"lr_decay={group['lr_decay']:g}: give optax.adagrad a schedule and set lr_decay=0")
    return found
