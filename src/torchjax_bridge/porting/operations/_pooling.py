"""Pooling of arrays whose channels are last: windows, ceilings and adaptive sizes as torch has them."""

import math
from dataclasses import dataclass, replace
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
            "the positions of the largest elements (return_indices=True) are read, which no pooling of JAX gives"
        )
    return node.result[0]


@dataclass(frozen=True)
class _Windows:
    """Windows over the axes of space.

    Attributes:
        kernel: Their sizes.
        steps: The strides.
        pads: What is added at both ends.
        ceil: Whether a window may hang over the end.
    """

    kernel: tuple[Any, ...]
    steps: tuple[Any, ...]
    pads: tuple[Any, ...]
    ceil: bool

    def padding(self, x: str, at: Lowering) -> str:
        """The padding as an argument; with a ceiling it depends on the sizes of ``x``."""
        if not self.ceil:
            pairs = tuple((pad, pad) for pad in self.pads)
            return at.number(pairs) if any(map(any, pairs)) else ""
        at.body.helpers.add("ceil_padding")
        return f"ceil_padding({x}.shape[1:-1], {', '.join(map(at.number, (self.kernel, self.steps, self.pads)))})"


def _windows(input: Value, kernel: Any, stride: Any, padding: Any, ceil_mode: bool) -> _Windows:
    space = len(input.shape) - 2
    sizes = _plain(kernel, space)
    steps = _plain(stride, space) if stride not in (None, [], ()) else sizes
    return _Windows(
        sizes, steps, _plain(padding, space), bool(ceil_mode) and any(step != 1 for step in steps)
    )


def _plain(setting: Any, space: int) -> tuple[Any, ...]:
    """A setting for each axis; what depends on sizes stays an expression."""
    return tuple(int(size) if is_fixed(size) else size for size in per_axis(setting, space))


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
    _first(node)
    windows = _windows(input, kernel_size, stride, padding, ceil_mode)
    order = channels_last(len(input.shape))
    x = at.read(input, order)
    gaps = _plain(dilation, space)
    if any(gap != 1 for gap in gaps):  # JAX has no derivative of windows with gaps
        at.body.helpers.add("dilated_max_pool")
        x = _named(at, node, x) if windows.ceil else x
        covered = tuple(gap * (size - 1) + 1 for size, gap in zip(windows.kernel, gaps, strict=True))
        pads = replace(windows, kernel=covered).padding(x, at) or at.number(((0, 0),) * space)
        settings = f"{at.number(windows.kernel)}, {at.number(windows.steps)}, {pads}, {at.number(gaps)}"
        return Placed(f"dilated_max_pool({x}, {settings})", order)
    x = _named(at, node, x) if windows.ceil else x
    return Placed(f"nnx.max_pool({x}, {at.number(windows.kernel)}{_settings(at, windows, x)})", order)


def _named(at: Lowering, node: Node, text: str) -> str:
    """A name for an expression that is used twice."""
    return text if text.isidentifier() else at.variable(text, node.source)


def _settings(at: Lowering, windows: _Windows, x: str) -> str:
    steps = f", strides={at.number(windows.steps)}" if any(step != 1 for step in windows.steps) else ""
    padding = windows.padding(x, at)
    return steps + (f", padding={padding}" if padding else "")


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
    windows = _windows(input, kernel_size, stride, padding, ceil_mode)
    padded = any(pad != 0 for pad in windows.pads)
    order = channels_last(len(input.shape))
    x, count, scale = at.read(input, order), "", ""
    own = [size.expression for size in sizes_of(input)[2:]]
    whole = [None if is_fixed(size) else size.expression for size in windows.kernel] == own
    if whole and not padded and divisor_override is None:
        axes = tuple(range(1, len(order) - 1))
        return Placed(f"{x}.mean({at.number(axes if len(axes) > 1 else axes[0])}, keepdims=True)", order)
    if divisor_override is not None:
        product = " * ".join(map(at.number, windows.kernel))
        fixed = all(map(is_fixed, windows.kernel))
        size = (
            repr(math.prod(windows.kernel) / int(divisor_override))
            if fixed
            else f"({product} / {divisor_override})"
        )
        scale = f" * {size}"
    x = _named(at, node, x) if windows.ceil else x
    settings = _settings(at, windows, x)
    if windows.ceil and padded and count_include_pad and divisor_override is None:
        # torch counts the padding, but not what hangs over its end
        over = f"[(0, high - low) for low, high in {windows.padding(x, at)}]"
        settings = f", strides={at.number(windows.steps)}, padding={over}"
        x = f"jnp.pad({x}, {at.number(((0, 0), *((pad, pad) for pad in windows.pads), (0, 0)))})"
        count = ", count_include_pad=False"
    elif (windows.ceil or (padded and not count_include_pad)) and divisor_override is None:
        count = ", count_include_pad=False"
    text = f"nnx.avg_pool({x}, {at.number(windows.kernel)}{settings}{count})"
    return Placed(f"({text}{scale})" if scale else text, order)


@operation("F.lp_pool1d", "F.lp_pool2d", "F.lp_pool3d")
def lp_pool(
    at: Lowering,
    node: Node,
    input: Value,
    norm_type: Any,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
) -> Placed:
    _space(node, input)
    windows = _windows(input, kernel_size, stride, 0, ceil_mode)
    order = channels_last(len(input.shape))
    x = at.read(input, order)
    x = _named(at, node, x) if windows.ceil else x
    count = ", count_include_pad=False" if windows.ceil else ""
    powers = f"{x} ** {at.number(norm_type)}"
    text = f"nnx.avg_pool({powers}, {at.number(windows.kernel)}{_settings(at, windows, x)}{count})"
    mean = at.variable(text, node.source)
    size = " * ".join(map(at.number, windows.kernel))
    # The sign and the relu change no value, but the derivative where all is zero.
    whole = f"(jnp.sign({mean}) * nnx.relu(jnp.abs({mean})) * {size})"
    return Placed(f"{whole} ** (1 / {at.number(norm_type)})", order)


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
