"""Pooling and interpolation, with channels last."""

from typing import Any

from torchjax_bridge.recording import Dim, Node, Operation, SizeOf, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError, channels_last
from ._convolution import per_axis
from ._table import operation

__all__: list[str] = []


def _space(node: Node, input: Value) -> int:
    """How many axes of space; the input must have a batch."""
    name = node.function.rpartition(".")[2]
    digits = [character for character in name if character.isdigit()]
    space = int(digits[0]) if digits else len(input.shape) - 2
    if len(input.shape) != space + 2:
        raise RefusedError(f"{name} of an input without a batch")
    return space


def _first(node: Node) -> Value:
    """The pooled values; the positions of the largest come second."""
    if isinstance(node.result, Value):
        return node.result
    if node.result[1].uses:
        raise RefusedError("the positions of the largest elements (return_indices=True) are read")
    return node.result[0]


def _windows(
    at: Lowering,
    input: Value,
    output: Value,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...], bool]:
    """Kernel, strides and padding; whether a window hangs over the end."""
    space = len(input.shape) - 2
    sizes = per_axis(kernel, space)
    steps = per_axis(stride, space) if stride not in (None, [], ()) else sizes
    pads, gaps = per_axis(padding, space), per_axis(dilation, space)
    found, hangs = [], False
    for axis in range(space):
        needed = (output.shape[2 + axis] - 1) * steps[axis] + gaps[axis] * (sizes[axis] - 1) + 1
        over = max(0, needed - input.shape[2 + axis] - 2 * pads[axis]) if ceil_mode else 0
        hangs |= over > 0
        found.append((int(pads[axis]), int(pads[axis] + over)))
    return tuple(map(int, sizes)), tuple(map(int, steps)), tuple(found), hangs


@operation(
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool2d_with_indices",
    "boolean_dispatch",
    "fn",
    "max_pool1d_with_indices",
    "max_pool3d_with_indices",
)
def max_pool(
    at: Lowering,
    node: Node,
    input: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Placed:
    space = _space(node, input)
    output = _first(node)
    kernel, steps, pads, _ = _windows(at, input, output, kernel_size, stride, padding, dilation, ceil_mode)
    order = channels_last(len(input.shape))
    x = at.read(input, order)
    gaps = per_axis(dilation, space)
    if any(gap != 1 for gap in gaps):
        window, stepping, holes = ((1, *map(int, setting), 1) for setting in (kernel, steps, gaps))
        widths = ((0, 0), *pads, (0, 0))
        settings = f"{window}, {stepping}, {widths}, window_dilation={holes}"
        return Placed(f"jax.lax.reduce_window({x}, -jnp.inf, jax.lax.max, {settings})", order)
    return Placed(f"nnx.max_pool({x}, {kernel}{_strides(steps)}{_padding(pads)})", order)


@operation("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(
    at: Lowering,
    node: Node,
    input: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> Placed:
    _space(node, input)
    if divisor_override is not None:
        raise RefusedError("avg_pool2d with divisor_override")
    kernel, steps, pads, hangs = _windows(at, input, node.result, kernel_size, stride, padding, 1, ceil_mode)
    padded = any(low for low, _ in pads)
    if hangs and padded and count_include_pad:
        raise RefusedError("avg_pool with padding whose last window hangs over the end (ceil_mode=True)")
    order = channels_last(len(input.shape))
    count = ", count_include_pad=False" if (padded or hangs) and (hangs or not count_include_pad) else ""
    text = f"nnx.avg_pool({at.read(input, order)}, {kernel}{_strides(steps)}{_padding(pads)}{count})"
    return Placed(text, order)


def _strides(steps: tuple[int, ...]) -> str:
    return f", strides={steps}" if any(step != 1 for step in steps) else ""


def _padding(pads: tuple[tuple[int, int], ...]) -> str:
    return f", padding={pads}" if any(map(any, pads)) else ""


@operation(
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool1d_with_indices",
)
def adaptive_pool(
    at: Lowering, node: Node, input: Value, output_size: Any, return_indices: bool = False
) -> Placed:
    _space(node, input)
    output = _first(node)
    kind = "avg" if "avg" in node.function else "max"
    order = channels_last(len(input.shape))
    before, after = input.shape[2:], output.shape[2:]
    sizes = per_axis(output_size, len(before))
    if before == after and not all(size == 1 for size in after):
        if any(size is not None for size in sizes) and kind == "avg":
            at.body.helpers.add("adaptive_avg_pool")
            return Placed(f"adaptive_avg_pool({at.read(input, order)}, {after})", order)
        return at.in_torch_map_order(input)
    x = at.read(input, order)
    space = tuple(range(1, len(order) - 1))
    axes = space if len(space) > 1 else space[0]
    if all(size == 1 for size in after):
        return Placed(f"{x}.{'mean' if kind == 'avg' else 'max'}({axes}, keepdims=True)", order)
    if kind == "avg" and len(before) == 2:
        at.body.helpers.add("adaptive_avg_pool")
        return Placed(f"adaptive_avg_pool({x}, {after})", order)
    if all(a % b == 0 for a, b in zip(before, after, strict=True)):
        window = tuple(a // b for a, b in zip(before, after, strict=True))
        return Placed(f"nnx.{kind}_pool({x}, {window}, strides={window})", order)
    raise RefusedError(f"adaptive {kind} pooling from {before} to {after}")


@operation("interpolate", "upsample")
def interpolate(
    at: Lowering,
    node: Node,
    input: Value,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: Any = None,
    recompute_scale_factor: Any = None,
    antialias: bool = False,
) -> Placed:
    rank = len(input.shape)
    order = channels_last(rank)
    x = at.read(input, order)
    before, after = input.shape[2:], node.result.shape[2:]
    if size is None:
        factors = per_axis(scale_factor, rank - 2)
        if any(float(factor) * a != b for factor, a, b in zip(factors, before, after, strict=True)):
            raise RefusedError(
                "F.interpolate whose scale_factor gives no whole size: torch then samples at another scale"
            )
        sizes: tuple[Any, ...] = tuple(
            Dim(b, Operation("*", SizeOf(input, 2 + place), int(factor))) if float(factor).is_integer() else b
            for place, (b, factor) in enumerate(zip(after, factors, strict=True))
        )
    else:
        sizes = per_axis(size, rank - 2)
    shape = f"({x}.shape[0], {', '.join(map(at.number, sizes))}, {x}.shape[{rank - 1}])"
    if mode == "nearest":
        if any(b % a for a, b in zip(before, after, strict=True)):
            raise RefusedError(
                "nearest interpolation by a factor that is no whole number: jax.image rounds in another way"
            )
        return Placed(f"jax.image.resize({x}, {shape}, 'nearest')", order)
    if mode in ("bilinear", "linear") and not align_corners and not antialias:
        return Placed(f"jax.image.resize({x}, {shape}, 'linear', antialias=False)", order)
    if mode in ("bilinear", "linear") and align_corners and rank == 4:
        at.body.helpers.add("resize_corners")
        return Placed(f"resize_corners({x}, {at.number(sizes)})", order)
    raise RefusedError(
        f"F.interpolate(mode={mode!r}, align_corners={align_corners}, antialias={antialias}): "
        "jax.image.resize has another grid or kernel"
    )
