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


def frozen_keys(
    frozen: Frozen, plan: Plan, state: Mapping[str, Any], ties: Mapping[str, str]
) -> dict[str, None]:
    """The keys among the moves of a plan that are frozen, in the order of the plan.

    Args:
        frozen: What the caller passed.
        plan: The plan.
        state: The module's own tensors by key.
        ties: The first name of every tensor that has several, by its other names.

    Raises:
        PlanError: A name matches nothing, only some names of a tied tensor or some tensors of a fused leaf are
            frozen, or everything is.
        TypeError: ``frozen`` holds something else than names.
    """
    crossing = [key for move in plan.moves for key in move.torch_keys]
    tensors = {ties.get(key, key) for key in crossing}
    names = [
        *dict.fromkeys((*crossing, *(key for pair in ties.items() if pair[1] in tensors for key in pair)))
    ]
    found = {key for key in names if frozen(key, state[key])} if callable(frozen) else _named(frozen, names)
    for one in (name for name in names if name in ties):
        _refuse_part(found, (ties[one], one), "they are one tensor")
    for move in plan.moves:
        _refuse_part(found, move.torch_keys, "they are one leaf in Flax")
    if crossing and found.issuperset(crossing):
        raise PlanError("frozen= names every tensor that crosses, so the link would move nothing.")
    return dict.fromkeys(key for key in crossing if key in found)


def _named(frozen: str | Iterable[str], names: list[str]) -> set[str]:
    """The names that a pattern matches, or whose module it matches."""
    patterns = (
        [frozen] if isinstance(frozen, str) else list(frozen) if isinstance(frozen, Iterable) else [frozen]
    )
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"frozen={pattern!r} is no name: pass names, patterns, or one function of a key and its tensor."
            )
        depth = len(split_path(pattern))
        matched = {key for key in names if matches_path(pattern, split_path(key)[:depth])}
        if not matched:
            raise PlanError(
                f"frozen='{pattern}' matches no tensor that crosses{did_you_mean(pattern, names)}"
            )
        found |= matched
    return found


def _refuse_part(found: set[str], keys: Iterable[str], why: str) -> None:
    """Raise if some of these keys are frozen and others are not."""
    part = [key for key in keys if key in found]
    rest = [key for key in keys if key not in found]
    if part and rest:
        others = "', '".join(rest)
        raise PlanError(
            f"'{part[0]}' is frozen and '{others}' is not, but {why}: freeze all of them, or none."
        )
