"""`compare_checkpoints`: are two checkpoints the same weights, whatever their formats and frameworks?"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import join_path

from .._plan import UserRule
from ._convert import find_route, framework_of
from ._leaf import Checkpoint, Framework, Leaf
from ._load_save import AnyPath
from ._mapped import Window
from ._open import open_checkpoint
from ._pipeline import raw, window_of
from ._route import under_model
from ._write import MEMORY

__all__ = ["Comparison", "Difference", "compare_checkpoints"]

_STEP = 1 << 20  # elements that are compared in double precision at once


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
        model: The torch side, when the two are of different frameworks. With two torch files it says which names
            are one tensor, so that a file that holds such a tensor under one of its names is the same as one that
            holds it under all.
        template: The Flax side, when the two are of different frameworks.
        rules: As for `to_flax`.
        key: Which entry of a torch file is the ``state_dict``.
        memory: Bytes to hold beside two leaves.

    Raises:
        CheckpointError: One of them is not sound, or the sides that tell how to compare were not given.
        PlanError: The two sides do not fit.
    """
    first, second = _open_both(one, other, window_of(memory), key)
    since, to = _framework(first), _framework(second)
    ours, theirs = dict(first.leaves), dict(second.leaves)
    if since is not None and to is not None and since != to:
        route = find_route(first, to=to, model=model, template=template, rules=rules, memory=memory)
        if route.plan is not None:
            route.plan.report.raise_unless_ok(f"compare {one} with {other}", strict=True)
            alone = set(map(join_path, route.plan.flax_only))
            theirs = {name: leaf for name, leaf in theirs.items() if to == "torch" or name not in alone}
        ours = {leaf.name: leaf for leaf in route.leaves}
    elif model is not None and "flax" not in (since, to):
        ours, theirs = under_model(first, model), under_model(second, model)
    if (to or since) == "flax" and not set(ours) & set(theirs):  # one of them may be a bare parameter tree
        inside = {f"params.{name}": leaf for name, leaf in theirs.items()}
        if set(ours) & set(inside):
            theirs = inside
        else:
            ours = {f"params.{name}": leaf for name, leaf in ours.items()}
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


def _open_both(
    one: AnyPath, other: AnyPath, window: Window, key: str | None
) -> tuple[Checkpoint, Checkpoint]:
    """Both sides; a key need only be an entry of one of them."""
    if key is None:
        return open_checkpoint(one, window=window), open_checkpoint(other, window=window)
    found: list[Checkpoint] = []
    refused: list[CheckpointError] = []
    for path in (one, other):
        try:
            found.append(open_checkpoint(path, window=window, key=key))
        except CheckpointError as err:
            refused.append(err)
            found.append(open_checkpoint(path, window=window))
    if len(refused) > 1:
        raise refused[0]
    return found[0], found[1]


def _framework(checkpoint: Checkpoint) -> Framework | None:
    """Whose names these are; None where nothing tells, so that only equal names can be compared."""
    try:
        return framework_of(checkpoint)
    except CheckpointError:
        return None


def _difference(one: Leaf, other: Leaf) -> Difference | None:
    if one.shape != other.shape:
        return Difference(other.name, f"has shape {one.shape} in the first, {other.shape} in the second")
    if one.dtype != other.dtype:
        return Difference(other.name, f"is {one.dtype} in the first, {other.dtype} in the second")
    ours, theirs = (raw(leaf.read().resolve_conj().resolve_neg().contiguous()) for leaf in (one, other))
    if torch.equal(ours, theirs):
        return None
    size, count, largest = one.dtype.itemsize, 0, 0.0
    for begin in range(0, len(ours), _STEP * size):
        part, twin = (values[begin : begin + _STEP * size].view(-1, size) for values in (ours, theirs))
        differ = (part != twin).any(1)
        if differ.any():
            count += int(differ.sum())
            gap = _largest_gap(*(values[differ].view(-1).view(one.dtype) for values in (part, twin)))
            largest = math.nan if math.isnan(gap) else max(largest, gap)
    return Difference(other.name, f"{count} of {math.prod(one.shape)} elements differ", count, largest)


def _largest_gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of elements whose bits differ: NaNs of two kinds are 0 apart, integers at least 1."""
    wide = torch.complex128 if ours.is_complex() else torch.float64
    one, other = ours.to(wide), theirs.to(wide)
    gap = (one - other).abs().masked_fill(one.isnan() & other.isnan(), 0.0)
    exact = not (ours.is_floating_point() or ours.is_complex())
    return max(float(gap.max()), 1.0) if exact else float(gap.max())
