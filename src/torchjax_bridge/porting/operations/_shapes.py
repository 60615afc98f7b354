"""Functions that repeat, reorder, shift or pad: the emitted order stays."""

from typing import Any

from torchjax_bridge.recording import Dim, Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError, torch_order
from ._operands import axes_of, axis_text, is_fixed, listed, sizes_of
from ._table import last_name, operation

__all__: list[str] = []


@operation("expand", "broadcast_to")
def expand(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
    shape = listed(args, kwargs, "size", "shape")
    placed = at.in_torch_map_order(input)
    new, own = len(shape) - placed.rank, sizes_of(input)
    wanted = [
        own[axis - new] if isinstance(size, int) and int(size) == -1 else size
        for axis, size in enumerate(shape)
    ]
    if new == 0 and all(
        int(a) == int(b) and (is_fixed(a) or _same(a, b)) for a, b in zip(wanted, own, strict=True)
    ):
        return placed
    result = (*range(new), *(axis + new for axis in placed.order))
    text = ", ".join(at.number(wanted[axis]) for axis in result)
    return Placed(f"jnp.broadcast_to({placed.text}, ({text}{',' if len(result) == 1 else ''}))", result)


def _same(size: Any, own: Dim) -> bool:
    return isinstance(size, Dim) and size.expression == own.expression


@operation("expand_as")
def expand_as(at: Lowering, node: Node, input: Value, other: Value) -> Placed:
    return expand(at, node, input, *sizes_of(other))


@operation("repeat", "tile")
def repeat(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
    counts = listed(args, kwargs, "repeats", "dims")
    placed = at.in_torch_map_order(input)
    counts = [*[1] * (placed.rank - len(counts)), *counts]
    new = len(counts) - placed.rank
    if new == 0 and all(is_fixed(count) and int(count) == 1 for count in counts):
        return placed
    result = (*range(new), *(axis + new for axis in placed.order))
    text = ", ".join(at.number(counts[axis]) for axis in result)
    return Placed(f"jnp.tile({placed.text}, ({text}{',' if len(counts) == 1 else ''}))", result)


@operation("repeat_interleave")
def repeat_interleave(
    at: Lowering, node: Node, input: Value, repeats: Any = None, dim: Any = None, *, output_size: Any = None
) -> Placed:
    if isinstance(repeats, Value) or repeats is None:
        raise RefusedError(
            f"{node.function} with a tensor of repeats gives an output whose shape depends on values; pass one "
            "number"
        )
    if dim is None:
        return Placed(f"jnp.repeat({at.in_torch_order(input)}.reshape(-1), {at.number(repeats)})", (0,))
    placed = at.in_torch_map_order(input)
    where = axis_text(placed, axes_of(input, dim))
    return placed.with_text(f"jnp.repeat({placed.text}, {at.number(repeats)}, axis={where})")


@operation("roll")
def roll(at: Lowering, node: Node, input: Value, shifts: Any, dims: Any = None) -> Placed:
    steps = tuple(shifts) if isinstance(shifts, tuple | list) else (shifts,)
    if dims is None or dims == ():
        text = f"jnp.roll({at.in_torch_order(input)}, {at.number(steps[0])})"
        return Placed(text, torch_order(len(input.shape)))
    placed = at.in_torch_map_order(input)
    axes = dims if isinstance(dims, tuple | list) else (dims,)
    places = tuple(placed.place(int(axis)) for axis in axes)
    if len(places) == 1:
        return placed.with_text(f"jnp.roll({placed.text}, {at.number(steps[0])}, axis={places[0]})")
    return placed.with_text(f"jnp.roll({placed.text}, {at.number(steps)}, axis={places})")


@operation("flip", "fliplr", "flipud", "reversed")
def flip(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
    fixed = {"fliplr": (1,), "flipud": (0,), "reversed": (0,)}.get(last_name(node))
    placed = at.in_torch_map_order(input)
    axes = axes_of(input, fixed or tuple(listed(args, kwargs, "dims")))
    return placed.with_text(f"jnp.flip({placed.text}, axis={axis_text(placed, axes)})")


@operation("rot90")
def rot90(at: Lowering, node: Node, input: Value, k: Any = 1, dims: Any = (0, 1)) -> Placed:
    placed = at.in_torch_map_order(input)
    axes = [int(axis) % placed.rank for axis in dims]
    made = f"jnp.rot90({placed.text}, {at.number(k)}, {tuple(placed.place(axis) for axis in axes)})"
    return placed.with_text(made)


@operation("diagonal", "linalg.diagonal")
def diagonal(
    at: Lowering, node: Node, input: Value, offset: Any = 0, dim1: Any = None, dim2: Any = None
) -> Placed:
    default = (0, 1) if node.function != "torch.linalg.diagonal" else (-2, -1)
    first, second = default[0] if dim1 is None else dim1, default[1] if dim2 is None else dim2
    placed = at.in_torch_map_order(input)
    a, b = int(first) % placed.rank, int(second) % placed.rank
    text = f"jnp.diagonal({placed.text}, {at.number(offset)}, {placed.place(a)}, {placed.place(b)})"
    left = [axis for axis in placed.order if axis not in (a, b)]
    return Placed(text, (*(sorted(left).index(axis) for axis in left), placed.rank - 2))


@operation("diag")
def diag(at: Lowering, node: Node, input: Value, diagonal: Any = 0) -> Placed:
    text = f"jnp.diag({at.in_torch_order(input)}, {at.number(diagonal)})"
    return Placed(text, torch_order(len(node.result.shape)))


@operation("diag_embed")
def diag_embed(
    at: Lowering, node: Node, input: Value, offset: Any = 0, dim1: Any = -2, dim2: Any = -1
) -> Placed:
    rank = len(input.shape)
    if offset != 0 or (int(dim1) % (rank + 1), int(dim2) % (rank + 1)) != (rank - 1, rank):
        raise RefusedError(f"{node.function} is translated for the main diagonal of the last two axes")
    x = at.in_torch_order(input)
    return Placed(f"({x}[..., None] * jnp.eye({x}.shape[-1], dtype={x}.dtype))", torch_order(rank + 1))


@operation("trace")
def trace(at: Lowering, node: Node, input: Value) -> Placed:
    return Placed(f"jnp.trace({at.at(input).text})", ())


@operation("tril", "triu")
def triangle(at: Lowering, node: Node, input: Value, diagonal: Any = 0) -> Placed:
    placed, rank = at.in_torch_map_order(input), len(input.shape)
    last = placed.order[-2:] == (rank - 2, rank - 1)
    order = placed.order if last else torch_order(rank)
    shift = "" if is_fixed(diagonal) and int(diagonal) == 0 else f", {at.number(diagonal)}"
    return Placed(f"jnp.{last_name(node)}({at.read(input, order)}{shift})", order)


@operation("Tensor.unfold")
def windows(at: Lowering, node: Node, input: Value, dimension: Any, size: Any, step: Any) -> Placed:
    placed = at.in_torch_map_order(input)
    axis = int(dimension) % placed.rank
    place = placed.place(axis)
    length = at.number(size)
    starts = f"jnp.arange(0, {placed.text}.shape[{place}] - {length} + 1, {at.number(step)})"
    text = f"jnp.take({placed.text}, {starts}[:, None] + jnp.arange({length}), axis={place})"
    return Placed(text, (*placed.order[: place + 1], placed.rank, *placed.order[place + 1 :]))


# --- padding ------------------------------------------------------------------------------------------------

_MODES = {
    "constant": "",
    "reflect": ", mode='reflect'",
    "replicate": ", mode='edge'",
    "circular": ", mode='wrap'",
}


@operation("F.pad", "constant_pad_nd")
def pad(
    at: Lowering, node: Node, input: Value, pad: Any, mode: Any = "constant", value: Any = None
) -> Placed:
    if not isinstance(mode, str):  # torch.constant_pad_nd(input, pad, value)
        mode, value = "constant", mode
    placed, rank = at.in_torch_map_order(input), len(input.shape)
    pad = listed((pad,), {})
    if any(isinstance(width, Value) for width in pad):
        raise RefusedError("F.pad by widths that a tensor's value decides; JAX needs them in advance")
    widths = {rank - 1 - place: (pad[2 * place], pad[2 * place + 1]) for place in range(len(pad) // 2)}
    every = [width for pair in widths.values() for width in pair]
    if all(is_fixed(width) and int(width) == 0 for width in every):
        return placed
    fill = at.number(value) if value else "0"
    if any(int(width) < 0 for width in every):
        if mode != "constant":
            raise RefusedError(f"F.pad(mode={mode!r}) with negative widths; cut with slices first")
        if all(is_fixed(width) and int(width) <= 0 for width in every):
            items = [_cut(widths.get(axis, (0, 0))) for axis in placed.order]
            return placed.with_text(f"{placed.text}[{', '.join(items)}]")
        text = ", ".join(
            f"({', '.join(map(at.number, (*widths.get(axis, (0, 0)), 0)))})" for axis in placed.order
        )
        return placed.with_text(
            f"jax.lax.pad({placed.text}, jnp.asarray({fill}, {placed.text}.dtype), [{text}])"
        )
    text = ", ".join(at.number(widths.get(axis, (0, 0))) for axis in placed.order)
    inner = text if rank > 1 else f"{text},"
    constant = f", constant_values={fill}" if value else ""
    return placed.with_text(f"jnp.pad({placed.text}, ({inner}){_MODES[mode]}{constant})")


def _cut(widths: tuple[Any, Any]) -> str:
    low, high = (int(width) for width in widths)
    return f"{-low or ''}:{high or ''}"


# --- channels and space -------------------------------------------------------------------------------------


@operation("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(at: Lowering, node: Node, input: Value, groups: Any) -> Placed:
    placed = at.in_torch_map_order(input)
    at.body.helpers.add("channel_shuffle")
    return placed.with_text(f"channel_shuffle({placed.text}, {at.number(groups)}, axis={placed.place(1)})")


@operation("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
    name = last_name(node)
    if len(input.shape) != 4:
        raise RefusedError(f"{name} of a tensor that is not (N, C, H, W); add a batch axis with x[None]")
    order = (0, 2, 3, 1)
    (factor,) = listed(args, kwargs, "upscale_factor", "downscale_factor")
    at.body.helpers.add(name)
    return Placed(f"{name}({at.read(input, order)}, {at.number(factor)})", order)
