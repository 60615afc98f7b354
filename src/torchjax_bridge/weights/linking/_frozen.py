"""Which keys the caller calls frozen: by name, by pattern, or by a function."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import split_path

from .._nearest import did_you_mean
from .._plan import Plan
from ..rules import matches_path

__all__ = ["frozen_keys"]

Frozen = str | Iterable[str] | Callable[[str, torch.Tensor], bool]


def frozen_keys(frozen: Frozen, plan: Plan, state: Mapping[str, Any]) -> frozenset[str]:
    """The keys among the moves of a plan that are frozen.

    Raises:
        PlanError: A name matches nothing, or only some of the tensors of a fused leaf are frozen.
    """
    keys = [key for move in plan.moves for key in move.torch_keys]
    if callable(frozen):
        found = {key for key in keys if frozen(key, state[key])}
    else:
        found = set()
        for pattern in (frozen,) if isinstance(frozen, str) else frozen:
            depth = len(split_path(pattern))
            matched = {key for key in keys if matches_path(pattern, split_path(key)[:depth])}
            if not matched:
                raise PlanError(
                    f"frozen='{pattern}' matches no tensor that crosses{did_you_mean(pattern, keys)}."
                )
            found |= matched
    for move in plan.moves:
        part = found.intersection(move.torch_keys)
        if part and len(part) < len(move.torch_keys):
            rest = "', '".join(key for key in move.torch_keys if key not in part)
            raise PlanError(
                f"'{sorted(part)[0]}' is frozen and '{rest}' is not, but they are one leaf in Flax: freeze all of "
                "them, or none."
            )
    return frozenset(found)
