"""A box of a laid-out tensor, read from boxes of its sources.

A layout that is a strided view of its source is run on the source's shape alone. From the strides of the result
follow the box of the source that it needs, and its strides in that box. A stack or a sum is made of boxes of its
parts. Any other layout reads its sources whole.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..layouts import Layout, Stack, Sum
from ._boxes import Box, box_shape
from ._leaf import Leaf

__all__ = ["forward_box", "inverse_box"]

# The bytes of a storage of the meta device in which all sources lie. No other storage is so large, so that a result
# in a storage of this size is a view of a source.
_ROOM = 1 << 60
_ALIGNMENT = 16  # the size of the largest element


def forward_box(layout: Layout, sources: Sequence[Leaf], index: int, box: Box) -> torch.Tensor:
    """A box of the result ``index`` of ``layout.forward``."""
    if 0 in box_shape(box):
        return layout.forward([leaf.meta for leaf in sources])[index][box].new_empty(
            box_shape(box), device="cpu"
        )
    if isinstance(layout, Stack):
        size = len(sources) // layout.count
        layers = range(box[0].start, box[0].stop)
        groups = [sources[place * size : (place + 1) * size] for place in layers]
        return torch.stack([forward_box(layout.layout, group, index, box[1:]) for group in groups])
    if isinstance(layout, Sum):
        return layout.forward([leaf.slice(box) for leaf in sources])[index]
    return _view_of_sources(layout.forward, sources, index, box)


def inverse_box(layout: Layout, sources: Sequence[Leaf], index: int, box: Box) -> torch.Tensor:
    """A box of the result ``index`` of ``layout.inverse``."""
    return _view_of_sources(layout.inverse, sources, index, box)


def _view_of_sources(
    run: Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]],
    sources: Sequence[Leaf],
    index: int,
    box: Box,
) -> torch.Tensor:
    room = torch.empty(_ROOM, dtype=torch.uint8, device="meta")
    starts, metas, end = [], [], 0
    for leaf in sources:
        starts.append(end)
        metas.append(room[end : end + leaf.nbytes].view(leaf.dtype).view(leaf.shape))
        end += -(-leaf.nbytes // _ALIGNMENT) * _ALIGNMENT
    view = run(metas)[index][box] if any(leaf.read_box for leaf in sources) else None
    if view is None or view.untyped_storage().nbytes() != _ROOM or 0 in view.shape:
        return run([leaf.read() for leaf in sources])[index][box]
    begin = view.storage_offset() * view.dtype.itemsize
    place = max(place for place, start in enumerate(starts) if start <= begin)
    source = sources[place]
    offset = (begin - starts[place]) // view.dtype.itemsize
    needed, strides, offset = _restrict(source.shape, view.shape, view.stride(), offset)
    values = source.slice(needed).contiguous()
    return values.as_strided(view.shape, strides, values.storage_offset() + offset)


def _restrict(
    shape: Sequence[int], sizes: Sequence[int], strides: Sequence[int], offset: int
) -> tuple[Box, list[int], int]:
    """The smallest box around a strided view of a row-major tensor, and the view's strides and offset in the box.

    Each axis of the view steps along one axis of the tensor. Where it steps over the end, the box has that axis
    whole, so that the next outer axis is stepped along at the same pace.
    """
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    along: list[int | None] = []
    reach = [0] * len(shape)
    for size, stride in zip(sizes, strides, strict=True):
        axis = next((axis for axis, step in enumerate(steps) if stride >= step and not stride % step), None)
        along.append(axis if size > 1 and stride else None)
        if axis is not None and along[-1] is not None:
            reach[axis] += (size - 1) * (stride // steps[axis])
    start = [offset // step % size for step, size in zip(steps, shape, strict=True)]
    box: list[Any] = [slice(0, 0)] * len(shape)
    carry = 0
    for axis in reversed(range(len(shape))):
        last = start[axis] + reach[axis] + carry
        carry = last // shape[axis]
        box[axis] = slice(0, shape[axis]) if carry else slice(start[axis], last + 1)
    inside = [math.prod(box_shape(tuple(box))[axis + 1 :]) for axis in range(len(shape))]
    moved = [
        0 if axis is None else stride // steps[axis] * inside[axis]
        for axis, stride in zip(along, strides, strict=True)
    ]
    begin = sum((place - part.start) * step for place, part, step in zip(start, box, inside, strict=True))
    return tuple(box), moved, begin
