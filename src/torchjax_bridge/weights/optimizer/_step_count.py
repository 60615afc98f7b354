"""How many steps have been taken: torch counts them for each parameter, optax once for all."""

from collections.abc import Mapping
from operator import index
from typing import Any

import torch

from torchjax_bridge.errors import OptimizerStateError

from ._classes import OptimizerClass
from ._frozen import FREEZE

__all__ = ["check_step", "step_of"]


def check_step(step: Any) -> int | None:
    """Return the number of steps that a caller passed; raise if it is none."""
    if step is None:
        return None
    try:
        count = index(step)
    except TypeError:
        count = -1
    if count < 0 or isinstance(step, bool):
        raise OptimizerStateError(f"step is how many steps have been taken, such as 100; got {step!r}.")
    return count


def step_of(
    optimizer: torch.optim.Optimizer,
    kind: OptimizerClass,
    names: Mapping[int, str],
    given: int | None,
    faults: list[str],
) -> int | None:
    """The one number of steps taken; None where neither torch nor the caller knows it."""
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
