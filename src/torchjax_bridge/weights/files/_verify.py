"""`compare_checkpoints`: compares the weights of two checkpoints of any format and framework bit by bit."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import join_path

from .._plan import UserRule
from ..layouts import as_bytes
from ._boxes import pieces, whole
from ._convert import find_route, framework_of
from ._leaf import Checkpoint, Framework, Leaf
from ._load_save import AnyPath
from ._mapped import Window
from ._open import open_checkpoint
from ._pipeline import window_for
from ._route import by_model_name
from ._write import MEMORY

__all__ = ["Comparison", "TensorDifference", "compare_checkpoints"]

_BLOCK = 1 << 20  # elements that are compared at once
_PART_BYTES = 64 << 20  # of a leaf that is read in parts


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that differs.

    Attributes:
        name: Its name in the second checkpoint.
        what: What differs, as text.
        elements: The number of elements with other bits; 0 if the tensors cannot be compared.
        largest: The largest absolute difference; NaN if only one of two elements is NaN.
    """

    name: str
    what: str
    elements: int = 0
    largest: float = math.inf


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_checkpoints`.

    Attributes:
        same: The number of tensors that are equal to the bit.
        differences: All other tensors, the largest difference first.
    """

    same: int
    differences: tuple[TensorDifference, ...]

    @property
    def ok(self) -> bool:
        """Whether both checkpoints have the same tensors, equal to the bit."""
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
        other: Another. The first is compared in this one's framework.
        model: The torch side, if the two are of different frameworks. For two torch files it shows which tensors
            are tied: a file with such a tensor under one of its names equals a file with all of them.
        template: The Flax side, if the two are of different frameworks.
        rules: As for `to_flax`.
        key: Which entry of a torch file is the ``state_dict``.
        memory: Bytes to hold in addition to two leaves, or to parts of them where they can be read in parts.

    Raises:
        CheckpointError: One of them is damaged, or a side that the comparison needs was not given.
        PlanError: The two sides do not fit.
    """
    first, second = _open_both(one, other, window_for(memory), key)
    first_framework, to = _framework(first), _framework(second)
    ours, theirs = dict(first.leaves), dict(second.leaves)
    if first_framework is not None and to is not None and first_framework != to:
        route = find_route(first, to=to, model=model, template=template, rules=rules, memory=memory)
        if route.plan is not None:
            route.plan.report.raise_unless_ok(f"compare {one} with {other}", strict=True)
            flax_only = set(map(join_path, route.plan.flax_only))
            theirs = {name: leaf for name, leaf in theirs.items() if to == "torch" or name not in flax_only}
        ours = {leaf.name: leaf for leaf in route.leaves}
    elif model is not None and "flax" not in (first_framework, to):
        ours, theirs = by_model_name(first, model), by_model_name(second, model)
    if (to or first_framework) == "flax" and not set(ours) & set(
        theirs
    ):  # one may lack the params collection
        inside = {f"params.{name}": leaf for name, leaf in theirs.items()}
        if set(ours) & set(inside):
            theirs = inside
        else:
            ours = {f"params.{name}": leaf for name, leaf in ours.items()}
    differences = [TensorDifference(name, "is only in the first") for name in ours if name not in theirs]
    differences += [TensorDifference(name, "is only in the second") for name in theirs if name not in ours]
    same = 0
    for name, leaf in ours.items():
        if name in theirs:
            found = _compare(leaf, theirs[name])
            if found is None:
                same += 1
            else:
                differences.append(found)
    differences.sort(key=lambda one: (-math.inf if math.isnan(one.largest) else -one.largest, one.name))
    return Comparison(same, tuple(differences))


def _open_both(
    one: AnyPath, other: AnyPath, window: Window, key: str | None
) -> tuple[Checkpoint, Checkpoint]:
    """Open both; it is enough if one of them has the key."""
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
    """The framework of a checkpoint; None if unknown, when only equal names can be compared."""
    try:
        return framework_of(checkpoint)
    except CheckpointError:
        return None


def _compare(one: Leaf, other: Leaf) -> TensorDifference | None:
    if one.shape != other.shape:
        return TensorDifference(
            other.name, f"has shape {one.shape} in the first, {other.shape} in the second"
        )
    if one.dtype != other.dtype:
        return TensorDifference(other.name, f"is {one.dtype} in the first, {other.dtype} in the second")
    in_parts = one.nbytes > _PART_BYTES and (one.read_box or other.read_box)
    boxes = pieces(one.shape, _PART_BYTES // one.dtype.itemsize) if in_parts else (whole(one.shape),)
    count, largest = 0, 0.0
    for box in boxes:
        differing, difference = _compare_values(one.slice(box), other.slice(box))
        count += differing
        largest = math.nan if math.isnan(difference) else max(largest, difference)
    if not count:
        return None
    return TensorDifference(other.name, f"{count} of {math.prod(one.shape)} elements differ", count, largest)


def _compare_values(one: torch.Tensor, other: torch.Tensor) -> tuple[int, float]:
    """The number of elements with other bits, and the largest difference of any."""
    ours, theirs = (as_bytes(values.resolve_conj().resolve_neg().contiguous()) for values in (one, other))
    if torch.equal(ours, theirs):
        return 0, 0.0
    size, count, largest = one.dtype.itemsize, 0, 0.0
    for begin in range(0, len(ours), _BLOCK * size):
        block, other_block = (
            values[begin : begin + _BLOCK * size].view(-1, size) for values in (ours, theirs)
        )
        differ = (block != other_block).any(1)
        if differ.any():
            count += int(differ.sum())
            differing = (values[differ].view(-1).view(one.dtype) for values in (block, other_block))
            difference = _largest_difference(*differing)
            largest = math.nan if math.isnan(difference) else max(largest, difference)
    return count, largest


def _largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of elements whose bits differ: 0 for two NaNs, at least 1 for integers."""
    wide = torch.complex128 if ours.is_complex() else torch.float64
    one, other = ours.to(wide), theirs.to(wide)
    difference = (one - other).abs().masked_fill(one.isnan() & other.isnan(), 0.0)
    exact = not (ours.is_floating_point() or ours.is_complex())
    return max(float(difference.max()), 1.0) if exact else float(difference.max())
