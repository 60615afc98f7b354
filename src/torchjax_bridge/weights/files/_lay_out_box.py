"""A box of a laid-out tensor, read from boxes of its sources.

A layout that is a strided view of its source is run on the source's shape alone. From the strides of the result
follow the box of the source that it needs, and its strides in that box. A stack, a sum, rows by heads and a flip
are made of boxes of their parts; of one layout after another, each is asked by the next. Any other layout reads its
sources whole.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..layouts import Flip, Layout, Rows, Stack, Sum, Then
from ._boxes import Box, box_shape, whole
from ._leaf import Leaf

__all__ = ["forward_box", "inverse_box"]

# The bytes of a storage of the meta device in which all sources lie. No other storage is so large, so that a result
# in a storage of this size is a view of a source.
_ROOM = 1 << 60
_ALIGNMENT = 16  # the size of the largest element


def forward_box(layout: Layout, sources: Sequence[Leaf], index: int, box: Box) -> torch.Tensor:
    """A box of the result ``index`` of ``layout.forward``."""
    return _box(layout, sources, index, box, back=False)


def inverse_box(layout: Layout, sources: Sequence[Leaf], index: int, box: Box) -> torch.Tensor:
    """A box of the result ``index`` of ``layout.inverse``."""
    return _box(layout, sources, index, box, back=True)


def _box(layout: Layout, sources: Sequence[Leaf], index: int, box: Box, *, back: bool) -> torch.Tensor:
    run = layout.inverse if back else layout.forward
    if 0 in box_shape(box):
        return run([leaf.meta for leaf in sources])[index][box].new_empty(box_shape(box), device="cpu")
    if isinstance(layout, Stack) and not back:
        size = len(sources) // layout.count
        layers = range(box[0].start, box[0].stop)
        groups = [sources[place * size : (place + 1) * size] for place in layers]
        return torch.stack([forward_box(layout.layout, group, index, box[1:]) for group in groups])
    if isinstance(layout, Sum) and not back:
        return layout.forward([leaf.slice(box) for leaf in sources])[index]
    if not any(leaf.read_box for leaf in sources):
        return run([leaf.read() for leaf in sources])[index][box]
    if (view := _view_of_sources(run, sources, index, box)) is not None:
        return view
    if isinstance(layout, Then):
        near, far = (layout.second, layout.first) if back else (layout.first, layout.second)
        return _box(far, _results(near, sources, back=back), index, box, back=back)
    if isinstance(layout, Flip):
        axes = {axis % len(box) for axis in layout.axes}
        sizes = sources[0].shape
        mirrored = [
            slice(sizes[axis] - part.stop, sizes[axis] - part.start) if axis in axes else part
            for axis, part in enumerate(box)
        ]
        return sources[0].slice(mirrored).flip(layout.axes)
    if isinstance(layout, Rows):
        return _rows(layout, sources, index, box, back=back)
    return run([leaf.read() for leaf in sources])[index][box]


def _results(layout: Layout, sources: Sequence[Leaf], *, back: bool) -> list[Leaf]:
    """The results of a layout, as leaves that are read in parts."""
    run = layout.inverse if back else layout.forward

    def leaf(index: int, meta: torch.Tensor) -> Leaf:
        part = partial(_box, layout, sources, index, back=back)
        shape = tuple(meta.shape)
        return Leaf("", (), meta.dtype, shape, partial(part, whole(shape)), read_box=part)

    return [leaf(*result) for result in enumerate(run([source.meta for source in sources]))]


def _rows(layout: Rows, sources: Sequence[Leaf], index: int, box: Box, *, back: bool) -> torch.Tensor:
    """A box of a part of the rows; or back, of all rows."""
    along = len(box) - 1 if layout.columns and back else 0  # the axis of the rows in the result
    rest = box[:along] + box[along + 1 :]
    pieces = []
    for place, rows in _runs(layout, index, box[along], back=back):
        if not layout.columns:
            pieces.append(sources[place].slice((rows, *rest)))
        elif back:
            pieces.append(sources[place].slice((rows, *rest)).movedim(0, -1))
        else:
            pieces.append(sources[place].slice((*rest, rows)).movedim(-1, 0))
    return torch.cat(pieces, dim=along)


def _runs(layout: Rows, index: int, rows: slice, *, back: bool) -> Iterator[tuple[int, slice]]:
    """The source and its rows, run by run, of which some rows of a result consist."""
    turns = [size // layout.heads for size in layout.sizes]
    for head in range(layout.heads):
        for part, turn in enumerate(turns):
            joined, own = head * sum(turns) + sum(turns[:part]), head * turn
            if not back and part != index:
                continue
            begin, there = (joined, own) if back else (own, joined)
            start, stop = max(rows.start, begin), min(rows.stop, begin + turn)
            if start < stop:
                yield part if back else 0, slice(start - begin + there, stop - begin + there)


def _view_of_sources(
    run: Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]],
    sources: Sequence[Leaf],
    index: int,
    box: Box,
) -> torch.Tensor | None:
    """The box, where the result is a view of a source; else None."""
    room = torch.empty(_ROOM, dtype=torch.uint8, device="meta")
    starts, metas, end = [], [], 0
    for leaf in sources:
        starts.append(end)
        metas.append(room[end : end + leaf.nbytes].view(leaf.dtype).view(leaf.shape))
        end += -(-leaf.nbytes // _ALIGNMENT) * _ALIGNMENT
    view = run(metas)[index][box]
    if view.untyped_storage().nbytes() != _ROOM or 0 in view.shape:
        return None
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
