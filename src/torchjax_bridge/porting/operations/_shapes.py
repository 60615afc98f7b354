"""Functions that change shapes. Permutations emit nothing; a reshape keeps the emitted order where it can."""

from collections.abc import Sequence
from typing import Any

from torchjax_bridge.recording import Dim, Node, SizeOf, Value

from .._lowering import Lowering
from .._placed import Axes, Placed, RefusedError, torch_order
from ._reductions import axes_of, axis_text, remaining
from ._table import operation

__all__ = ["reshaped"]


def flat_arguments(sizes: tuple[Any, ...]) -> list[Any]:
    """``view(2, 3)`` and ``view((2, 3))`` alike."""
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else list(sizes)


# --- permutations -------------------------------------------------------------------------------------------


def permuted(at: Lowering, input: Value, axes: Sequence[int]) -> Placed:
    """The value whose axis ``i`` is the axis ``axes[i]`` of the input."""
    placed = at.in_torch_map_order(input)
    new = {old: axis for axis, old in enumerate(axes)}
    return Placed(placed.text, tuple(new[axis] for axis in placed.order))


@operation("permute")
def permute(at: Lowering, node: Node, input: Value, *dims: Any) -> Placed:
    return permuted(at, input, [int(axis) % len(input.shape) for axis in flat_arguments(dims)])


@operation("transpose", "swapaxes", "swapdims")
def transpose(at: Lowering, node: Node, input: Value, dim0: Any, dim1: Any) -> Placed:
    axes = list(range(len(input.shape)))
    a, b = int(dim0) % len(axes), int(dim1) % len(axes)
    axes[a], axes[b] = b, a
    return permuted(at, input, axes)


@operation("t", "mT", "adjoint")
def matrix_transpose(at: Lowering, node: Node, input: Value) -> Placed:
    rank = len(input.shape)
    return permuted(at, input, [*range(rank - 2), rank - 1, rank - 2] if rank > 1 else range(rank))


@operation("T")
def reverse(at: Lowering, node: Node, input: Value) -> Placed:
    return permuted(at, input, range(len(input.shape))[::-1])


@operation("movedim", "moveaxis")
def movedim(at: Lowering, node: Node, input: Value, source: Any, destination: Any) -> Placed:
    rank = len(input.shape)
    sources = [int(axis) % rank for axis in (source if isinstance(source, tuple | list) else (source,))]
    targets = [
        int(axis) % rank
        for axis in (destination if isinstance(destination, tuple | list) else (destination,))
    ]
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


def reshaped(at: Lowering, node: Node, input: Value, sizes: Sequence[Any], output: Value) -> Placed:
    """The input with another shape.

    Args:
        at: The translation of the frame.
        node: The call.
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
        raise RefusedError("a reshape of a tensor without elements")
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
    return Placed(f"{text}.reshape({shape})", tuple(new), map_axis, map_shape)


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


@operation("reshape", "view")
def reshape(at: Lowering, node: Node, input: Value, *shape: Any, **kwargs: Any) -> Placed:
    if kwargs.keys() - {"shape", "size"}:
        raise RefusedError(f"{node.function} with {', '.join(kwargs)}")
    sizes = flat_arguments(shape) if shape else list(next(iter(kwargs.values())))
    if len(sizes) == 1 and not isinstance(sizes[0], int):
        raise RefusedError("Tensor.view(dtype) reinterprets bits; use .to(dtype)")
    return reshaped(at, node, input, sizes, node.result)


@operation("view_as", "reshape_as")
def reshape_as(at: Lowering, node: Node, input: Value, other: Value) -> Placed:
    return reshaped(at, node, input, _sizes(other), node.result)


def _sizes(value: Value) -> list[Any]:
    """The sizes of a value, with their origin."""
    return [Dim(size, SizeOf(value, axis)) for axis, size in enumerate(value.shape)]


@operation("flatten", "ravel")
def flatten(at: Lowering, node: Node, input: Value, start_dim: Any = 0, end_dim: Any = -1) -> Placed:
    rank = len(input.shape)
    if rank == 0:
        return Placed(f"{at.read(input)}.reshape(1)", (0,))
    start, end = int(start_dim) % rank, int(end_dim) % rank
    sizes = _sizes(input)
    return reshaped(at, node, input, [*sizes[:start], -1, *sizes[end + 1 :]], node.result)


@operation("unflatten")
def unflatten(at: Lowering, node: Node, input: Value, dim: Any, sizes: Any) -> Placed:
    axis, own = int(dim) % len(input.shape), _sizes(input)
    return reshaped(at, node, input, [*own[:axis], *sizes, *own[axis + 1 :]], node.result)


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


@operation("expand", "broadcast_to")
def expand(at: Lowering, node: Node, input: Value, *sizes: Any, **kwargs: Any) -> Placed:
    shape = flat_arguments(sizes) if sizes else list(kwargs["size"])
    if node.result.shape == input.shape:
        return at.at(input)
    new = len(shape) - len(input.shape)
    own = _sizes(input)
    wanted = [own[axis - new] if size == -1 else size for axis, size in enumerate(shape)]
    order = at.at(input).order if new == 0 else torch_order(len(input.shape))
    result = order if new == 0 else torch_order(len(shape))
    text = ", ".join(at.number(wanted[axis]) for axis in result)
    return Placed(
        f"jnp.broadcast_to({at.read(input, order)}, ({text}{',' if len(result) == 1 else ''}))", result
    )


@operation("expand_as")
def expand_as(at: Lowering, node: Node, input: Value, other: Value) -> Placed:
    return expand(at, node, input, *_sizes(other))


@operation("repeat", "tile")
def repeat(at: Lowering, node: Node, input: Value, *repeats: Any, **kwargs: Any) -> Placed:
    counts = flat_arguments(repeats) if repeats else list(next(iter(kwargs.values())))
    if node.result.shape == input.shape:
        return at.at(input)
    rank = len(node.result.shape)
    text = ", ".join(map(at.number, counts))
    return Placed(
        f"jnp.tile({at.in_torch_order(input)}, ({text}{',' if len(counts) == 1 else ''}))", torch_order(rank)
    )


@operation("repeat_interleave")
def repeat_interleave(
    at: Lowering, node: Node, input: Value, repeats: Any, dim: Any = None, *, output_size: Any = None
) -> Placed:
    if isinstance(repeats, Value) or dim is None:
        raise RefusedError("torch.repeat_interleave is translated for one number of repeats along one axis")
    placed = at.in_torch_map_order(input)
    where = axis_text(placed, axes_of(input, dim))
    return placed.with_text(f"jnp.repeat({placed.text}, {at.number(repeats)}, axis={where})")


@operation("roll")
def roll(at: Lowering, node: Node, input: Value, shifts: Any, dims: Any = None) -> Placed:
    if dims is None or dims == ():
        raise RefusedError("torch.roll without dims rolls the flattened tensor")
    placed = at.in_torch_map_order(input)
    listed = dims if isinstance(dims, tuple | list) else (dims,)
    places = tuple(placed.place(int(axis)) for axis in listed)
    steps = shifts if isinstance(shifts, tuple | list) else (shifts,)
    if len(places) == 1:
        return placed.with_text(f"jnp.roll({placed.text}, {at.number(steps[0])}, axis={places[0]})")
    return placed.with_text(f"jnp.roll({placed.text}, {at.number(tuple(steps))}, axis={places})")


@operation("flip", "fliplr", "flipud")
def flip(at: Lowering, node: Node, input: Value, *dims: Any) -> Placed:
    name = node.function.rpartition(".")[2]
    axes = {"fliplr": (1,), "flipud": (0,)}.get(name) or axes_of(input, tuple(flat_arguments(dims)))
    placed = at.in_torch_map_order(input)
    return placed.with_text(f"jnp.flip({placed.text}, axis={axis_text(placed, axes)})")


@operation("pad")
def pad(
    at: Lowering, node: Node, input: Value, pad: Any, mode: str = "constant", value: Any = None
) -> Placed:
    placed, rank = at.in_torch_map_order(input), len(input.shape)
    widths = {rank - 1 - place: (pad[2 * place], pad[2 * place + 1]) for place in range(len(pad) // 2)}
    if all(int(width) == 0 for pair in widths.values() for width in pair):
        return placed
    if any(int(width) < 0 for pair in widths.values() for width in pair):
        if mode != "constant" or any(int(width) > 0 for pair in widths.values() for width in pair):
            raise RefusedError("F.pad with negative and positive widths")
        ends = {axis: (-int(low), input.shape[axis] + int(high)) for axis, (low, high) in widths.items()}
        items = (f"{ends[axis][0]}:{ends[axis][1]}" if axis in ends else ":" for axis in placed.order)
        return placed.with_text(f"{placed.text}[{', '.join(items)}]")
    text = ", ".join(at.number(widths.get(axis, (0, 0))) for axis in placed.order)
    how = {
        "constant": "",
        "reflect": ", mode='reflect'",
        "replicate": ", mode='edge'",
        "circular": ", mode='wrap'",
    }[mode]
    fill = f", constant_values={at.number(value)}" if value else ""
    return placed.with_text(f"jnp.pad({placed.text}, ({text}){how}{fill})")


@operation("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(at: Lowering, node: Node, input: Value, groups: Any) -> Placed:
    placed = at.in_torch_map_order(input)
    at.body.helpers.add("channel_shuffle")
    return placed.with_text(f"channel_shuffle({placed.text}, {at.number(groups)}, axis={placed.place(1)})")


@operation("pixel_shuffle")
def pixel_shuffle(at: Lowering, node: Node, input: Value, upscale_factor: Any) -> Placed:
    if len(input.shape) != 4:
        raise RefusedError("pixel_shuffle of a tensor that is not (N, C, H, W)")
    order = (0, 2, 3, 1)
    at.body.helpers.add("pixel_shuffle")
    return Placed(f"pixel_shuffle({at.read(input, order)}, {at.number(upscale_factor)})", order)


@operation("pixel_unshuffle")
def pixel_unshuffle(at: Lowering, node: Node, input: Value, downscale_factor: Any) -> Placed:
    if len(input.shape) != 4:
        raise RefusedError("pixel_unshuffle of a tensor that is not (N, C, H, W)")
    order = (0, 2, 3, 1)
    at.body.helpers.add("pixel_unshuffle")
    return Placed(f"pixel_unshuffle({at.read(input, order)}, {at.number(downscale_factor)})", order)
