"""Boxes: rectangular parts of a tensor, one slice for each axis, and how a tensor is cut into them."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["Box", "as_box", "box_shape", "grid", "overlap", "pieces", "whole"]

Box = tuple[slice, ...]
"""Slices with a start and a stop, and without a step."""


def as_box(index: Sequence[Any], shape: Sequence[int]) -> Box:
    """Any slices without a step, as a box of a tensor of this shape.

    >>> as_box((slice(None), slice(2, 99)), (4, 6))
    (slice(0, 4, None), slice(2, 6, None))
    """
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def whole(shape: Sequence[int]) -> Box:
    """The box of all elements."""
    return tuple(slice(0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(max(part.stop - part.start, 0) for part in box)


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None if they share no element."""
    common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return common if all(part.start < part.stop for part in common) else None


def pieces(shape: Sequence[int], count: int) -> Iterator[Box]:
    """Boxes of at most ``count`` elements whose elements follow each other in row-major order.

    >>> list(pieces((2, 3), 4))
    [(slice(0, 1, None), slice(0, 3, None)), (slice(1, 2, None), slice(0, 3, None))]
    """
    if not math.prod(shape):
        return
    axis = next((axis for axis in range(len(shape)) if math.prod(shape[axis + 1 :]) <= count), len(shape))
    cell = [1] * len(shape)
    if axis < len(shape):
        cell[axis:] = [max(count // math.prod(shape[axis + 1 :]), 1), *shape[axis + 1 :]]
    yield from grid(shape, cell)


def grid(shape: Sequence[int], cell: Sequence[int]) -> Iterator[Box]:
    """The boxes of a regular grid, in row-major order; the last along an axis may be smaller."""
    axes = [
        [slice(start, min(start + step, size)) for start in range(0, size, step)]
        for size, step in zip(shape, cell, strict=True)
    ]
    yield from itertools.product(*axes)
