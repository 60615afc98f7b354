"""Permutations emit nothing; a reshape keeps the emitted order where it can."""

from collections.abc import Sequence
from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Axes, Placed, RefusedError, torch_order
from ._operands import axes_of, axis_text, listed, remaining, sizes_of
from ._table import operation

__all__ = ["permuted", "reshaped"]


# --- permutations -------------------------------------------------------------------------------------------


def permuted(at: Lowering, input: Value, axes: Sequence[int]) -> Placed:
    """The value whose axis ``i`` is the axis ``axes[i]`` of the input."""
    placed = at.in_torch_map_order(input)
    new = {old: axis for axis, old in enumerate(axes)}
    return Placed(placed.text, tuple(new[axis] for axis in placed.order))


@operation("permute")
def permute(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
    return permuted(at, input, [int(axis) % len(input.shape) for axis in listed(args, kwargs, "dims")])


@operation("transpose", "swapaxes", "swapdims")
def transpose(at: Lowering, node: Node, input: Value, dim0: Any, dim1: Any) -> Placed:
    axes = list(range(len(input.shape)))
    if not axes:
        return at.at(input)
    a, b = int(dim0) % len(axes), int(dim1) % len(axes)
    axes[a], axes[b] = b, a
    return permuted(at, input, axes)


@operation("t", "mT", "H", "mH", "adjoint")
def matrix_transpose(at: Lowering, node: Node, input: Value) -> Placed:
    rank = len(input.shape)
    if input.dtype is not None and input.dtype.is_complex and not node.function.endswith(("t", "mT.__get__")):
        raise RefusedError(f"{node.function} of a complex tensor; use .mT and .conj()")
    return permuted(at, input, [*range(rank - 2), rank - 1, rank - 2] if rank > 1 else range(rank))


@operation("T")
def reverse(at: Lowering, node: Node, input: Value) -> Placed:
    return permuted(at, input, range(len(input.shape))[::-1])


@operation("movedim", "moveaxis")
def movedim(at: Lowering, node: Node, input: Value, source: Any, destination: Any) -> Placed:
    rank = len(input.shape)
    sources, targets = (
        [int(axis) % rank for axis in (axes if isinstance(axes, tuple | list) else (axes,))]
        for axes in (source, destination)
    )
    axes = [axis for axis in range(rank) if axis not in sources]
    for target, axis in sorted(zip(targets, sources, strict=True)):
        axes.insert(target, axis)
    return permuted(at, input, axes)


# --- reshapes -----------------------------------------------------------------------------------------------

Groups = list[tuple[list[int], list[int]]]


def groups(before: Sequence[int], after: Sequence[int]) -> Groups:
    """Which axes become which: each pair holds axes of equal product. Axes of one element come and go."""
    found: Groups = []
    i = j = 0
    while i < len(before) or j < len(after):
        if i < len(before) and j < len(after) and before[i] == after[j]:
            found.append(([i], [j]))
            i, j = i + 1, j + 1
        elif i < len(before) and before[i] == 1:
            found.append(([i], []))
            i += 1
        elif j < len(after) and after[j] == 1:
            found.append(([], [j]))
            j += 1
        else:
            mine, theirs = [i], [j]
            left, right = before[i], after[j]
            i, j = i + 1, j + 1
            while left != right:
                if left < right:
                    left *= before[i]
                    mine.append(i)
                    i += 1
                else:
                    right *= after[j]
                    theirs.append(j)
                    j += 1
            found.append((mine, theirs))
    return found


def reshaped(at: Lowering, input: Value, sizes: Sequence[Any], output: Value) -> Placed:
    """The input with another shape.

    Args:
        at: The translation of the frame.
        input: The input.
        sizes: The new shape as the author wrote it: numbers, sizes with an origin, one ``-1``.
        output: The result.
    """
    placed = at.at(input)
    before, after = input.shape, output.shape
    if before == after:
        return placed
    placed = at.in_torch_map_order(input)
    if 0 in before:
        raise RefusedError("a reshape of a tensor without elements; port with inputs that are not empty")
    parts = groups(before, after)
    order = placed.order
    as_map = None
    if not _keeps_groups(order, before, parts):
        as_map = _flattened_map(order, before, after, parts)
        if as_map is None:
            order = _least_transposition(order, before, parts)
    text = at.read(input, order)

    def first(part: tuple[list[int], list[int]]) -> int:
        return min(order.index(axis) for axis in (_large(part[0], before) or part[0]))

    new = [axis for part in sorted((p for p in parts if p[0] and p[1]), key=first) for axis in part[1]]
    for mine, theirs in parts:
        if not mine:  # a new axis of one element stands behind the axis that it follows
            (axis,) = theirs
            new.insert(new.index(axis - 1) + 1 if axis - 1 in new else 0, axis)
    shape = ", ".join(at.number(sizes[axis]) for axis in new)
    map_axis, map_shape = as_map or (None, ())
    return Placed(f"{text}.reshape({shape or '()'})", tuple(new), map_axis, map_shape)


def _large(axes: Sequence[int], shape: Sequence[int]) -> list[int]:
    return [axis for axis in axes if shape[axis] != 1]


def _follow(axes: Sequence[int], order: Sequence[int]) -> bool:
    """Whether the axes stand side by side, in torch's order."""
    where = [order.index(axis) for axis in axes]
    return where == list(range(where[0], where[0] + len(where)))


def _keeps_groups(order: Axes, shape: Sequence[int], parts: Groups) -> bool:
    large = _large(order, shape)
    return all(_follow(_large(mine, shape), large) for mine, _ in parts if len(_large(mine, shape)) > 1)


def _flattened_map(
    order: Axes, before: Sequence[int], after: Sequence[int], parts: Groups
) -> tuple[int, tuple[int, ...]] | None:
    """The axis and the ``(C, *space)``, if the reshape flattens a map with channels last to features."""
    large = _large(order, before)
    wrong = [
        part
        for part in parts
        if len(_large(part[0], before)) > 1 and not _follow(_large(part[0], before), large)
    ]
    if len(wrong) != 1 or len(wrong[0][1]) != 1 or len(after) != 2 or len(before) < 4:
        return None
    axes = _large(wrong[0][0], before)
    if not _follow([*axes[1:], axes[0]], large):
        return None
    return wrong[0][1][0], tuple(before[axis] for axis in axes)


def _least_transposition(order: Axes, shape: Sequence[int], parts: Groups) -> Axes:
    """An order in which each group stands together, as near to the present one as it goes."""
    keyed = []
    for mine, _ in parts:
        if mine:
            places = [order.index(axis) for axis in mine]
            keyed.append((max(places) if len(mine) == 1 else min(places), mine))
    found = tuple(axis for _, mine in sorted(keyed) for axis in mine)
    return found if _keeps_groups(found, shape, parts) else torch_order(len(order))


@operation("reshape", "view", "view_copy")
def reshape(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
    sizes = listed(args, kwargs, "shape", "size")
    if any(isinstance(size, Value) for size in sizes):
        raise RefusedError(
            f"{node.function} to a size that a tensor's value decides; JAX needs it in advance"
        )
    if kwargs.keys() - {"shape", "size"} or any(not isinstance(size, int) for size in sizes):
        raise RefusedError(f"{node.function} to another dtype reinterprets bits; use .to(dtype)")
    return reshaped(at, input, sizes, node.result)


@operation("view_as", "reshape_as")
def reshape_as(at: Lowering, node: Node, input: Value, other: Value) -> Placed:
    return reshaped(at, input, sizes_of(other), node.result)


@operation("flatten", "ravel")
def flatten(at: Lowering, node: Node, input: Value, start_dim: Any = 0, end_dim: Any = -1) -> Placed:
    rank = len(input.shape)
    if rank == 0:
        return Placed(f"{at.read(input)}.reshape(1)", (0,))
    start, end = int(start_dim) % rank, int(end_dim) % rank
    sizes = sizes_of(input)
    return reshaped(at, input, [*sizes[:start], -1, *sizes[end + 1 :]], node.result)


@operation("unflatten")
def unflatten(at: Lowering, node: Node, input: Value, dim: Any, sizes: Any) -> Placed:
    axis, own = int(dim) % len(input.shape), sizes_of(input)
    return reshaped(at, input, [*own[:axis], *sizes, *own[axis + 1 :]], node.result)


@operation("squeeze")
def squeeze(at: Lowering, node: Node, input: Value, dim: Any = None) -> Placed:
    axes = tuple(axis for axis in axes_of(input, dim) if input.shape[axis] == 1)
    placed = at.in_torch_map_order(input)
    if not axes:
        return placed
    return Placed(
        f"{placed.text}.squeeze({axis_text(placed, axes)})", remaining(placed.order, axes, keepdim=False)
    )


@operation("unsqueeze")
def unsqueeze(at: Lowering, node: Node, input: Value, dim: Any) -> Placed:
    placed = at.in_torch_map_order(input)
    axis = int(dim) % (placed.rank + 1)
    order = [old + (old >= axis) for old in placed.order]
    if placed.order == torch_order(placed.rank):
        place = axis
    else:
        place = order.index(axis - 1) + 1 if axis - 1 in order else 0
    order.insert(place, axis)
    return Placed(f"jnp.expand_dims({placed.text}, {place})", tuple(order))


@operation("atleast_1d", "atleast_2d", "atleast_3d")
def at_least(at: Lowering, node: Node, *tensors: Any) -> Placed:
    if len(tensors) != 1 or not isinstance(tensors[0], Value):
        raise RefusedError(f"{node.function} of several tensors; call it for each")
    (input,) = tensors
    if node.result.shape == input.shape:
        return at.at(input)
    wanted = [1 if size == 1 else -1 for size in node.result.shape]
    own = iter(sizes_of(input))
    sizes = [next(own) if size == -1 else size for size in wanted]
    return reshaped(at, input, sizes, node.result)
