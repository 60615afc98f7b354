"""Which axes of what a torch function gives are axes of what it is given.

Knows functions by their names in the table of translations. Of one that it does not know it says nothing.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torchjax_bridge.recording import Node, Value, tensors_of

from .operations import is_elementwise, table_name

__all__ = ["MAPS", "Axis", "merged_axes", "related_axes"]

Axis = tuple[Value, int]

MAPS = re.compile(
    r"(conv(_transpose)?|\w*_pool|batch_norm|instance_norm)(\d?)d?|group_norm|interpolate|upsample"
)
"""Functions of maps, ``(N, C, *space)``."""

# Each axis of the result is an axis of the arguments, or of another size.
_KEEPS = frozenset(
    re.findall(
        r"\w+",
        """
        alpha_dropout batch_norm broadcast_to channel_shuffle chunk constant_pad_nd cumprod cumsum dropout dropout1d
        dropout2d dropout3d empty_like expand expand_as feature_alpha_dropout flip full_like group_norm index_select
        instance_norm interpolate layer_norm local_response_norm log_softmax narrow normalize ones_like pad
        rand_like randn_like rms_norm roll setitem softmax softmin split tensor_split tril triu upsample zeros_like
        """,
    )
)
_JOINS = frozenset(("cat", "concat", "concatenate"))
_REDUCES = frozenset(
    re.findall(r"\w+", "all amax amin any argmax argmin logsumexp max mean min prod std sum var")
)
_RESHAPES = frozenset(
    ("flatten", "ravel", "reshape", "reshape_as", "squeeze", "unflatten", "view", "view_as")
)


def related_axes(node: Node) -> Iterator[tuple[Axis, Axis]]:
    """Pairs of axes that are one, of the arguments and the results of a call of a function."""
    name = table_name(node.function)
    given = list(tensors_of((node.args, node.kwargs)))
    made = list(tensors_of(node.result))
    if not given or not made:
        return
    first, result = given[0], made[0]
    if name in _RESHAPES:
        for one, two in _groups(first.shape, result.shape):
            if len(one) == len(two) == 1:
                yield (first, one[0]), (result, two[0])
    elif (order := _order(name, node, len(first.shape))) is not None:
        for one in made:
            if len(one.shape) == len(order):
                yield from (((first, axis), (one, at)) for at, axis in enumerate(order) if axis is not None)
    elif name in ("matmul", "bmm") and [len(one.shape) >= 2 for one in given] == [True, True]:
        other = given[1]
        yield (first, len(first.shape) - 2), (result, len(result.shape) - 2)
        yield (other, len(other.shape) - 1), (result, len(result.shape) - 1)
        for one in given[:2]:
            yield from _aligned(one, result, last=2)
    elif name == "linear":
        yield from (((first, axis), (result, axis)) for axis in range(len(first.shape) - 1))
    elif name == "scaled_dot_product_attention" and len(given) > 2:
        yield from (((first, axis), (result, axis)) for axis in range(len(result.shape) - 1))
        yield (given[2], len(result.shape) - 1), (result, len(result.shape) - 1)
    elif name == "embedding" and node.function.startswith("torch.nn.functional."):
        yield from (((first, axis), (result, axis)) for axis in range(len(first.shape)))
    elif name in _JOINS or (MAPS.fullmatch(name) and "conv" not in name):
        for one in given if name in _JOINS else [first]:
            if len(one.shape) == len(result.shape):
                yield from (((one, axis), (result, axis)) for axis in range(len(one.shape)))
    elif is_elementwise(name) or name in _KEEPS:
        for one, two in itertools.product(given, made):
            yield from _aligned(one, two)


def merged_axes(node: Node) -> Iterator[tuple[list[Axis], Axis]]:
    """Axes that a call makes one axis."""
    if table_name(node.function) in _RESHAPES and isinstance(node.result, Value):
        [first, *_] = tensors_of((node.args, node.kwargs))
        for one, two in _groups(first.shape, node.result.shape):
            if len(one) > 1 and len(two) == 1:
                yield [(first, axis) for axis in one], (node.result, two[0])


def _aligned(one: Value, two: Value, last: int = 0) -> Iterator[tuple[Axis, Axis]]:
    """The axes of equal size of two values whose last axes stand side by side, but for the ``last`` ones."""
    for back in range(last + 1, min(len(one.shape), len(two.shape)) + 1):
        if one.shape[-back] == two.shape[-back]:
            yield (one, len(one.shape) - back), (two, len(two.shape) - back)


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest groups of neighbouring axes that a reshape keeps apart; axes of one element are left out."""
    left = [(axis, size) for axis, size in enumerate(before) if size != 1]
    right = [(axis, size) for axis, size in enumerate(after) if size != 1]
    if 0 in before or 0 in after:
        return
    while left and right:
        one, two = [left.pop(0)], [right.pop(0)]
        a, b = one[0][1], two[0][1]
        while a != b:
            side, rest = (one, left) if a < b else (two, right)
            if not rest:
                return
            side.append(rest.pop(0))
            a, b = (a * side[-1][1], b) if side is one else (a, b * side[-1][1])
        yield [axis for axis, _ in one], [axis for axis, _ in two]


def _order(name: str, node: Node, rank: int) -> list[int | None] | None:
    """The axis of the first argument at each place of the result, None for a new one; None for other functions."""
    args, axes = node.args[1:], list[int | None](range(rank))
    dims = _dims(node)
    if name == "permute" and dims is not None:
        return [dim % rank for dim in dims]
    if name in ("transpose", "swapaxes", "swapdims") and len(args) == 2 and dims is not None:
        one, two = (dim % rank for dim in dims)
        axes[one], axes[two] = axes[two], axes[one]
        return axes
    if name in ("t", "T", "mT") and rank == 2:
        return [1, 0]
    if name == "unsqueeze" and dims is not None and len(dims) == 1:
        axes.insert(dims[0] % (rank + 1), None)
        return axes
    if name in ("unbind", "select", "iter") and (dims or name != "select"):
        dim = (dims or [0])[0] % rank
        return axes[:dim] + axes[dim + 1 :]
    if name == "getitem":
        return _indexed(args[0], rank)
    if name in _REDUCES:
        return _reduced(node, dims, rank)
    return None


def _dims(node: Node) -> list[int] | None:
    """The axes among the arguments, where they are all that a function takes."""
    given = [
        *node.args[1:],
        *(node.kwargs[name] for name in ("dim", "dims", "dim0", "dim1") if name in node.kwargs),
    ]
    flat = [item for one in given for item in (one if isinstance(one, tuple | list) else [one])]
    numbers = [item for item in flat if isinstance(item, int) and not isinstance(item, bool)]
    return [int(number) for number in numbers] if len(numbers) == len(flat) else None


def _reduced(node: Node, dims: list[int] | None, rank: int) -> list[int | None] | None:
    first = next(iter(tensors_of(node.result)))
    if not dims or not isinstance(node.args[0], Value):
        return None
    gone = {dim % rank for dim in dims}
    if len(first.shape) == rank:
        return list(range(rank))
    return (
        [axis for axis in range(rank) if axis not in gone] if len(first.shape) == rank - len(gone) else None
    )


def _indexed(index: Any, rank: int) -> list[int | None] | None:
    """The axes that an index of numbers, slices, None and ``...`` leaves."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (item is None or item is ... or isinstance(item, int | slice)) for item in items):
        return None
    if any(isinstance(item, bool) for item in items):
        return None
    taken = sum(item is not None and item is not ... for item in items)
    if ... not in items:
        items.append(...)
    found: list[int | None] = []
    axis = 0
    for item in items:
        if item is None:
            found.append(None)
        elif item is ...:
            found += range(axis, axis + rank - taken)
            axis += rank - taken
        else:
            found += [axis] if isinstance(item, slice) else []
            axis += 1
    return found
