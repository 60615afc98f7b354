"""How one step of training changes the running statistics of both models.

The outputs of a step show neither the momentum nor which variance is kept; the statistics after it show both.
torch keeps the unbiased variance of a batch (divided by ``n - 1``), Flax the biased one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from torchjax_bridge.exchange import Path, join_path

from .._audit_report import SettingFault
from ..pairing import Move
from ._compare import Bounds
from ._evidence import Cause
from ._record import Record
from ._steps import Step
from ._values import Gap, gap, values_in

__all__ = ["Statistic", "statistics"]


_KEEPS_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Statistic:
    """One running statistic of one layer after a step of training.

    Attributes:
        step: The call that updated it.
        name: ``"running_mean"`` or ``"running_var"``.
        gap: How far the two sides are apart.
        ok: Whether that is rounding.
        shape: Its shape.
        cause: Why it differs.
    """

    step: Step
    name: str
    gap: Gap
    ok: bool
    shape: tuple[int, ...]
    cause: Cause | None


def statistics(
    steps: Sequence[Step],
    moves: Mapping[Path, Sequence[Move]],
    ours: Record,
    theirs: Record,
    settings: Sequence[SettingFault],
    flavour: str,
    bounds: Bounds,
) -> Iterator[Statistic]:
    """Compare the running statistics of every layer that was trained."""
    seen: set[nn.Module] = set()
    for step in steps:
        module: Any = step.module
        if not (isinstance(module, _KEEPS_STATISTICS) and module.training) or module in seen:
            continue
        seen.add(module)
        for move in moves.get(step.torch.path, ()):
            name = move.torch_keys[0].rpartition(".")[2] if len(move.torch_keys) == 1 else ""
            after, have = ours.state.get((module, name)), theirs.state.get(move.flax_paths[0])
            if name not in ("running_mean", "running_var") or after is None or have is None:
                continue
            (value,) = values_in(have)
            if value.array.shape != after.array.shape:
                continue  # stacked in a scan
            apart = gap(after.array, value.array)
            if name == "running_mean" and (variance := ours.state.get((module, "running_var"))) is not None:
                # A mean near zero may be rounding alone. The norm divides it by the deviation: the scale here.
                scale = max(
                    float(np.abs(after.array).max(initial=0.0)), float(variance.array.max(initial=0.0)) ** 0.5
                )
                apart = replace(apart, relative=apart.difference / scale) if scale else apart
            ok = bounds.allow(apart, after.dtype, value.dtype)
            before = values_in(getattr(module, name))[0].array
            cause = None if ok else _cause(step, name, before, after.array, value.array, settings, flavour)
            yield Statistic(step, name, apart, ok, after.array.shape, cause)


def _cause(
    step: Step,
    name: str,
    before: np.ndarray,
    ours: np.ndarray,
    theirs: np.ndarray,
    settings: Sequence[SettingFault],
    flavour: str,
) -> Cause:
    path = join_path(step.torch.path)
    place = f"'{path}' ({type(step.module).__name__})"
    momentum = next((f for f in settings if f.torch_path == path and f.setting == "momentum"), None)
    moved, other = ours - before, theirs - before
    if momentum is not None and momentum.wanted is not None:
        factor = (1 - momentum.flax_value) / (1 - momentum.wanted)
        message = (
            f"{place} has {momentum.in_torch} in torch and {momentum.in_flax} in Flax, so '{name}' moves by "
        )
        message += f"{factor:.3g} times torch's step"
        proved = name == "running_mean" and _near(moved * factor, other, ours)
        return Cause("momentum", message, f"type {momentum.to_type}", proved)
    count = step.torch.inputs[0].array.size // ours.size if step.torch.inputs else 0
    if name == "running_var" and count > 1:
        momentum_of = getattr(step.module, "momentum", None) or 0.0
        batch = (ours - (1 - momentum_of) * before) * (count - 1) / count
        proved = _near((1 - momentum_of) * before + batch, theirs, ours)
        message = f"{place} keeps the unbiased variance of {count} values in torch, the biased one in Flax"
        fix = f"to train on as torch does, use torchjax_bridge.weights.layers.{flavour}.BatchNorm"
        return Cause("running variance", message, fix, proved)
    return Cause("unknown", f"'{name}' of {place} is another after a step of training", "", proved=False)


def _near(one: np.ndarray, other: np.ndarray, scale: np.ndarray) -> bool:
    return bool(np.allclose(one, other, rtol=0, atol=1e-5 * np.abs(scale).max(initial=0.0)))
