"""Copying a permuted tensor into row-major memory, slab by slab, each small enough for the cache.

``Tensor.copy_`` between two orders of axes walks one of them with the stride of a whole row: every element is a
cache line of its own, and at the usual widths (powers of two) the lines push each other out. Here a slab is read
in runs, transposed in the cache, and written in runs. What transposes it is `torch.channel_shuffle`: on a
channels-last image it is, by definition, a transposition of ``(groups, channels // groups)`` at every position,
and torch does it with vector instructions on all its threads. Bits are moved and never read as numbers.

Owns how bytes move, and knows nothing of what they mean. What is no permutation of a dense block, or has no
runs worth the name, is left to ``copy_``; the result is the same.
"""

from math import prod

import torch

__all__ = ["copy_into"]

# What a slab takes: half of a small last-level cache, so that it is still there when it is written out.
_SLAB_BYTES = 4 << 20
# Rows transposed at a time: the runs on the far side are that long. Fewer make a run shorter than a cache line,
# more make the transposition itself leave the innermost cache.
_MOST_ROWS, _FEWEST_ROWS = 128, 16
# Below this one strided copy is done before the first slab is set up.
_SMALL_BYTES = 1 << 18
# Likewise where neighbours in the source are far apart anyway (the 3x3 of a kernel), while the cache holds both.
_LARGE_BYTES = 4 << 20

# Types of one size are all the same to a copy. Of four bytes and of one, torch transposes with vector instructions
# whatever the width; of two it does so in a plain loop, for which a slab is first cut into tiles of this width.
# Of eight, neither wins against ``copy_``.
_STANDS_FOR = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}
_TILE = 64


def copy_into(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Write ``source``, of any strides, into ``target``, which is row-major and of the same shape and dtype.

    Returns:
        ``target``.

    Memory:
        Two slabs of a few MB beside the two tensors.
    """
    kind = _STANDS_FOR.get(source.element_size())
    # One thread alone gains little: what makes ``copy_`` slow between two axes is that it uses but one.
    if kind is None or not source.is_cpu or source.nbytes < _SMALL_BYTES or torch.get_num_threads() == 1:
        return target.copy_(source)
    if source.is_neg() or source.is_conj():  # these bits are not the values
        return target.copy_(source)
    to, of = target.squeeze().view(kind), source.squeeze().view(kind)
    order = _order_in_memory(of)
    last = of.ndim - 1
    if order is None or order[-1] == last:
        return target.copy_(source)
    written, read = of.shape[last], of.shape[order[-1]]
    if max(written, read) < _FEWEST_ROWS or (read < _FEWEST_ROWS and source.nbytes < _LARGE_BYTES):
        return target.copy_(source)
    if written >= read:
        _read_in_order(to, of, order)
    else:
        _write_in_order(to, of, order)
    return target


def _order_in_memory(tensor: torch.Tensor) -> list[int] | None:
    """The axes, none of length 1, from the slowest to the fastest; None if the elements do not fill one block."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    stride = 1
    for axis in reversed(order):
        if tensor.stride(axis) != stride:
            return None
        stride *= tensor.shape[axis]
    return order


def _read_in_order(target: torch.Tensor, source: torch.Tensor, order: list[int]) -> None:
    """Slabs that are dense in the source; runs along the target's last axis."""
    slowest, last = order[0], source.ndim - 1
    size = source.shape[slowest]
    row = source.nbytes // size
    if slowest == last:
        height = source.numel() // size
        rest = sorted(range(last), key=order.index)  # as they follow each other in the source
        back = [1 + rest.index(axis) for axis in range(last)]
        for start, count, rows in _slabs(size, row):
            block = source.narrow(last, start, count * rows)
            turned = _transposed(block, count, rows, height)
            turned = turned.view(count, *(source.shape[axis] for axis in rest), rows)
            place = target.narrow(last, start, count * rows).unflatten(last, (count, rows))
            place.copy_(turned.permute(*back, 0, last + 1))
        return
    step = _SLAB_BYTES // row
    if not step:  # one position of the slowest axis is more than a slab
        inner = [axis - (axis > slowest) for axis in order[1:]]
        for index in range(size):
            _read_in_order(target.select(slowest, index), source.select(slowest, index), inner)
        return
    place = order.index(last)
    outer, below = order[:place], order[place + 1 :]
    axes = [*outer, *below, last]
    for start in range(0, size, step):
        block = source.narrow(slowest, start, min(step, size - start))
        count, height = (prod(block.shape[axis] for axis in group) for group in (outer, below))
        turned = _transposed(block, count, block.shape[last], height)
        turned = turned.view([block.shape[axis] for axis in axes])
        target.narrow(slowest, start, block.shape[slowest]).copy_(turned.permute(_inverse(axes)))


def _write_in_order(target: torch.Tensor, source: torch.Tensor, order: list[int]) -> None:
    """Slabs that are dense in the target; runs along the source's fastest axis."""
    fastest = order[-1]
    size = target.shape[0]
    row = target.nbytes // size
    if fastest == 0:
        width = target.numel() // size
        for start, count, rows in _slabs(size, row):
            block = source.narrow(0, start, count * rows).unflatten(0, (count, rows))
            packed = block.movedim(1, -1).contiguous()  # count, the rest as in the target, rows
            turned = _transposed(packed, count, width, rows)
            target.narrow(0, start, count * rows).view(count, rows, width).copy_(turned)
        return
    step = _SLAB_BYTES // row
    if not step:
        inner = [axis - 1 for axis in order if axis]
        for index in range(size):
            _write_in_order(target[index], source[index], inner)
        return
    for start in range(0, size, step):
        place, block = (side.narrow(0, start, min(step, size - start)) for side in (target, source))
        packed = block.movedim(fastest, -1).contiguous()
        count, width = prod(place.shape[:fastest]), prod(place.shape[fastest + 1 :])
        turned = _transposed(packed, count, width, place.shape[fastest])
        place.copy_(turned.view(place.shape))


def _slabs(size: int, row: int) -> list[tuple[int, int, int]]:
    """``size`` rows of ``row`` bytes as ``(start, count, rows)``: ``count`` matrices of ``rows`` rows at a time."""
    threads = torch.get_num_threads()  # torch gives each of them matrices of its own
    rows = _MOST_ROWS
    while rows > _FEWEST_ROWS and threads * rows * row > _SLAB_BYTES:
        rows //= 2
    most = max(threads, _SLAB_BYTES // (rows * row))
    found = []
    start = 0
    while (left := size - start) >= rows:
        found.append((start, min(most, left // rows), rows))
        start += found[-1][1] * rows
    if left:
        found.append((start, 1, left))
    return found


def _transposed(block: torch.Tensor, count: int, rows: int, columns: int) -> torch.Tensor:
    """``count`` matrices of ``rows`` x ``columns`` that fill one block, each transposed."""
    shape, images = (count, columns, rows), block
    if block.element_size() == 2 and columns % _TILE == 0:
        tiles = columns // _TILE
        cut = block.as_strided((count, tiles, rows, _TILE), (rows * columns, _TILE, columns, 1))
        images, count, columns = cut.contiguous(), count * tiles, _TILE
    size = rows * columns
    images = images.as_strided((1, size, count, 1), (count * size, 1, size, size))
    return torch.channel_shuffle(images, rows).as_strided(shape, (shape[1] * rows, rows, 1))


def _inverse(axes: list[int]) -> list[int]:
    return sorted(range(len(axes)), key=axes.__getitem__)
