"""Pooling of arrays whose channels are last: windows, ceilings and adaptive sizes as torch has them."""

import math
from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError, channels_last
from ._convolution import per_axis
from ._operands import is_fixed, sizes_of
from ._table import operation

__all__: list[str] = []


def _space(node: Node, input: Value) -> int:
    """How many axes of space; the input must have a batch."""
    name = node.function.rpartition(".")[2]
    digits = [character for character in name if character.isdigit()]
    space = int(digits[0]) if digits else len(input.shape) - 2
    if len(input.shape) != space + 2:
        raise RefusedError(f"{name} of an input without a batch; add the axis with x[None]")
    return space


def _first(node: Node) -> Value:
    """The pooled values; the positions of the largest come second."""
    if isinstance(node.result, Value):
        return node.result
    if node.result[1].uses:
        raise RefusedError(
            "the positions of the largest elements (return_indices=True) are read, which no pooling of JAX gives; "
            "keep this part in torch with as_jax_module"
        )
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
    "max_pool1d_with_indices",
    "max_pool2d_with_indices",
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
    kernel, steps, pads, hangs = _windows(at, input, node.result, kernel_size, stride, padding, 1, ceil_mode)
    padded = any(low for low, _ in pads)
    order = channels_last(len(input.shape))
    x, count, scale = at.read(input, order), "", ""
    if divisor_override is not None:
        scale = f" * {math.prod(kernel) / int(divisor_override)!r}"
    elif hangs and padded and count_include_pad:
        # torch counts the padding, but not what hangs over its end
        own = per_axis(padding, len(pads))
        x = f"jnp.pad({x}, {((0, 0), *((int(p), int(p)) for p in own), (0, 0))})"
        pads = tuple((0, high - int(p)) for (_, high), p in zip(pads, own, strict=True))
        count = ", count_include_pad=False"
    elif hangs or (padded and not count_include_pad):
        count = ", count_include_pad=False"
    text = f"nnx.avg_pool({x}, {kernel}{_strides(steps)}{_padding(pads)}{count})"
    return Placed(f"({text}{scale})" if scale else text, order)


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
    _first(node)
    kind = "avg" if "avg" in node.function else "max"
    order = channels_last(len(input.shape))
    own = sizes_of(input)[2:]
    sizes = [own[axis] if size is None else size for axis, size in enumerate(per_axis(output_size, len(own)))]
    x = at.read(input, order)
    space = tuple(range(1, len(order) - 1))
    axes = space if len(space) > 1 else space[0]
    if all(is_fixed(size) and int(size) == 1 for size in sizes):
        return Placed(f"{x}.{'mean' if kind == 'avg' else 'max'}({axes}, keepdims=True)", order)
    if all(
        not is_fixed(size) and size.expression == mine.expression
        for size, mine in zip(sizes, own, strict=True)
    ):
        return Placed(x, order)
    helper = f"adaptive_{kind}_pool"
    at.body.helpers.add(helper)
    return Placed(f"{helper}({x}, {at.number(tuple(sizes))})", order)
