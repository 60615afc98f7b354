"""Copies a permuted tensor into row-major memory, in slabs that fit in the cache.

``Tensor.copy_`` between two orders of axes walks one of them with the stride of a whole row. Every element is then
in a cache line of its own, and at the usual widths (powers of two) the lines evict each other. Here a slab is read
in runs, transposed in the cache, and written in runs. `torch.channel_shuffle` transposes it: on a channels-last
image it is, by definition, a transposition of ``(groups, channels // groups)`` at every position, and torch does it
with vector instructions on all its threads. Bits are copied and never read as numbers.

A slab is cast while it is in the cache, so a cast costs no pass of its own. A tensor that is not a permuted dense
block, or whose runs are short, is left to ``copy_``; the result is the same.
"""

from math import prod

import torch

__all__ = ["copy_into"]

# Half of a small last-level cache, so that a slab is still in it when it is written out.
_SLAB_BYTES = 4 << 20
# Rows transposed at a time: the length of the runs in the other order. With fewer rows a run is shorter than a
# cache line; with more, the transposition does not fit in the innermost cache.
_MAX_ROWS, _MIN_ROWS = 128, 16
# Below this, one strided copy ends before the first slab is set up.
_SMALL_BYTES = 1 << 18
# The same limit if the source has short runs (the 3x3 of a kernel): up to here the cache holds source and copy.
_LARGE_BYTES = 4 << 20

# The dtype that a copy sees for each element size. torch transposes elements of four bytes and of one with vector
# instructions at any width, but elements of two bytes in a plain loop. A slab of those is first cut into tiles of
# this width. For eight bytes, ``copy_`` is as fast.
_SAME_WIDTH = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}
_TILE = 64


def copy_into(dst: torch.Tensor, src: torch.Tensor) -> torch.Tensor:
    """Write ``src``, of any strides, into ``dst``, which is row-major and of the same shape.

    If the dtypes differ, the values are cast, as by ``copy_``.

    Returns:
        ``dst``.

    Memory:
        Two slabs of a few MB beside the two tensors.
    """
    bits = _SAME_WIDTH.get(dst.element_size())
    # One thread gains little: ``copy_`` between two orders of axes is slow because it uses only one.
    if bits is None or not src.is_cpu or src.nbytes < _SMALL_BYTES or torch.get_num_threads() == 1:
        return dst.copy_(src)
    if src.is_neg() or src.is_conj():  # the bits are not the values
        return dst.copy_(src)
    target, source = dst.squeeze().view(bits), src.squeeze()
    if dst.dtype is src.dtype:
        source = source.view(bits)
    order = _order_in_memory(source)
    last = source.ndim - 1
    if order is None or order[-1] == last:
        return dst.copy_(src)
    write_run, read_run = source.shape[last], source.shape[order[-1]]
    if max(write_run, read_run) < _MIN_ROWS or (read_run < _MIN_ROWS and src.nbytes < _LARGE_BYTES):
        return dst.copy_(src)
    if write_run >= read_run:
        _read_in_order(target, source, order, dst.dtype)
    else:
        _write_in_order(target, source, order, dst.dtype)
    return dst


def _order_in_memory(tensor: torch.Tensor) -> list[int] | None:
    """The axes from the slowest to the fastest (none has length 1); None if the elements fill no dense block."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    stride = 1
    for axis in reversed(order):
        if tensor.stride(axis) != stride:
            return None
        stride *= tensor.shape[axis]
    return order


def _read_in_order(target: torch.Tensor, source: torch.Tensor, order: list[int], dtype: torch.dtype) -> None:
    """Copy slabs that are dense in the source, in runs along the target's last axis."""
    slowest, last = order[0], source.ndim - 1
    size = source.shape[slowest]
    row = source.nbytes // size
    if slowest == last:
        height = source.numel() // size
        rest = sorted(range(last), key=order.index)  # in the order of the source
        inverse = [1 + rest.index(axis) for axis in range(last)]
        for start, count, rows in _slabs(size, row):
            block = _cast(source.narrow(last, start, count * rows), target, dtype)
            transposed = _transposed(block, count, rows, height)
            transposed = transposed.view(count, *(source.shape[axis] for axis in rest), rows)
            part = target.narrow(last, start, count * rows).unflatten(last, (count, rows))
            part.copy_(transposed.permute(*inverse, 0, last + 1))
        return
    step = _SLAB_BYTES // row
    if not step:  # one index of the slowest axis is larger than a slab
        inner_order = [axis - (axis > slowest) for axis in order[1:]]
        for index in range(size):
            _read_in_order(target.select(slowest, index), source.select(slowest, index), inner_order, dtype)
        return
    position = order.index(last)
    outer, inner = order[:position], order[position + 1 :]
    axes = [*outer, *inner, last]
    for start in range(0, size, step):
        block = _cast(source.narrow(slowest, start, min(step, size - start)), target, dtype)
        count, height = (prod(block.shape[axis] for axis in group) for group in (outer, inner))
        transposed = _transposed(block, count, block.shape[last], height)
        transposed = transposed.view([block.shape[axis] for axis in axes])
        target.narrow(slowest, start, block.shape[slowest]).copy_(transposed.permute(_inverse(axes)))


def _write_in_order(target: torch.Tensor, source: torch.Tensor, order: list[int], dtype: torch.dtype) -> None:
    """Copy slabs that are dense in the target, in runs along the source's fastest axis."""
    fastest = order[-1]
    size = target.shape[0]
    row = target.nbytes // size
    if fastest == 0:
        width = target.numel() // size
        for start, count, rows in _slabs(size, row):
            block = source.narrow(0, start, count * rows).unflatten(0, (count, rows))
            packed = block.movedim(1, -1).contiguous()  # (count, the other axes as in the target, rows)
            packed = _cast(packed, target, dtype)
            transposed = _transposed(packed, count, width, rows)
            target.narrow(0, start, count * rows).view(count, rows, width).copy_(transposed)
        return
    step = _SLAB_BYTES // row
    if not step:
        inner_order = [axis - 1 for axis in order if axis]
        for index in range(size):
            _write_in_order(target[index], source[index], inner_order, dtype)
        return
    for start in range(0, size, step):
        part, block = (side.narrow(0, start, min(step, size - start)) for side in (target, source))
        packed = _cast(block.movedim(fastest, -1).contiguous(), target, dtype)
        count, width = prod(part.shape[:fastest]), prod(part.shape[fastest + 1 :])
        transposed = _transposed(packed, count, width, part.shape[fastest])
        part.copy_(transposed.view(part.shape))


def _cast(block: torch.Tensor, target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A dense block with the bits of ``dtype``, in the same order in memory; as it is, if it has them."""
    return block if block.dtype is target.dtype else block.to(dtype).view(target.dtype)


def _slabs(size: int, row: int) -> list[tuple[int, int, int]]:
    """``size`` rows of ``row`` bytes as slabs ``(start, count, rows)``: ``count`` matrices of ``rows`` rows."""
    threads = torch.get_num_threads()  # each of them takes its own matrices
    rows = _MAX_ROWS
    while rows > _MIN_ROWS and threads * rows * row > _SLAB_BYTES:
        rows //= 2
    max_count = max(threads, _SLAB_BYTES // (rows * row))
    slabs = []
    start = 0
    while (left := size - start) >= rows:
        slabs.append((start, min(max_count, left // rows), rows))
        start += slabs[-1][1] * rows
    if left:
        slabs.append((start, 1, left))
    return slabs


def _transposed(block: torch.Tensor, count: int, rows: int, columns: int) -> torch.Tensor:
    """Each of the ``count`` matrices of ``rows`` x ``columns`` in a dense block, transposed."""
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
