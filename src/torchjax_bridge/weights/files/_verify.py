"""`compare_checkpoints`: are two checkpoints the same weights, whatever their formats and frameworks?"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchjax_bridge.errors import CheckpointError

from .._plan import UserRule
from ._convert import find_route, framework_of
from ._doors import AnyPath
from ._leaf import Checkpoint, Leaf
from ._mapped import Window
from ._open import open_checkpoint
from ._pump import raw, window_of
from ._write import MEMORY

__all__ = ["Comparison", "Difference", "compare_checkpoints"]


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same.

    Attributes:
        name: In the second checkpoint's names.
        what: What differs, in words.
        elements: How many elements have other bits; 0 where the tensors cannot be compared.
        largest: The largest absolute difference; NaN where only one of the two is NaN.
    """

    name: str
    what: str
    elements: int = 0
    largest: float = math.inf


@dataclass(frozen=True)
class Comparison:
    """What comparing came to.

    Attributes:
        same: How many tensors are equal to the bit.
        differences: Every other, the worst first.
    """

    same: int
    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        """Whether all tensors are there on both sides and equal to the bit."""
        return not self.differences


def compare_checkpoints(
    one: AnyPath,
    other: AnyPath,
    *,
    model: nn.Module | None = None,
    template: Any = None,
    rules: Iterable[UserRule] = (),
    key: str | None = None,
    memory: int = MEMORY,
) -> Comparison:
    """Compare two checkpoints bit by bit, one tensor at a time.

    Args:
        one: A file or folder.
        other: Another; the first is laid out as this one is.
        model: The torch side, when the two are of different frameworks.
        template: The Flax side, when the two are of different frameworks.
        rules: As for `to_flax`.
        key: Which entry of a torch file is the ``state_dict``.
        memory: Bytes to hold beside two leaves.

    Raises:
        CheckpointError: One of them is not sound, or the sides that tell how to compare were not given.
        PlanError: The two sides do not fit.
    """
    first, second = (_open(path, window_of(memory), key) for path in (one, other))
    to = framework_of(second)
    route = find_route(first, to=to, model=model, template=template, rules=rules, memory=memory)
    if route.plan is not None:
        route.plan.report.raise_unless_ok(f"compare {one} with {other}", strict=True)
    ours = {leaf.name: leaf for leaf in route.leaves}
    theirs = dict(second.leaves)
    if to == "flax" and not set(ours) & set(theirs):
        theirs = {f"params.{name}": leaf for name, leaf in theirs.items()}
    differences = [Difference(name, "is only in the first") for name in ours if name not in theirs]
    differences += [Difference(name, "is only in the second") for name in theirs if name not in ours]
    same = 0
    for name, leaf in ours.items():
        if name in theirs:
            found = _difference(leaf, theirs[name])
            if found is None:
                same += 1
            else:
                differences.append(found)
    differences.sort(key=lambda one: (-math.inf if math.isnan(one.largest) else -one.largest, one.name))
    return Comparison(same, tuple(differences))


def _open(path: AnyPath, window: Window, key: str | None) -> Checkpoint:
    try:
        return open_checkpoint(path, window=window, key=key)
    except CheckpointError:
        if key is None:
            raise
        return open_checkpoint(path, window=window)  # the key is the other one's


def _difference(one: Leaf, other: Leaf) -> Difference | None:
    if one.shape != other.shape:
        return Difference(other.name, f"has shape {one.shape} in the first, {other.shape} in the second")
    if one.dtype != other.dtype:
        return Difference(other.name, f"is {one.dtype} in the first, {other.dtype} in the second")
    ours, theirs = one.read().contiguous(), other.read().contiguous()
    if torch.equal(raw(ours), raw(theirs)):
        return None
    bits = raw(ours).view(-1, one.dtype.itemsize) != raw(theirs).view(-1, one.dtype.itemsize)
    count = int(bits.any(1).sum())
    wide = torch.complex128 if one.dtype.is_complex else torch.float64
    gap = (ours.to(wide) - theirs.to(wide)).abs()
    both = ours.isnan() & theirs.isnan() if _has_nan(one.dtype) else torch.zeros_like(gap, dtype=torch.bool)
    largest = float(gap.masked_fill(both, 0.0).max())
    return Difference(other.name, f"{count} of {ours.numel()} elements differ", count, largest)


def _has_nan(dtype: torch.dtype) -> bool:
    return (dtype.is_floating_point and dtype.itemsize > 1) or dtype.is_complex
