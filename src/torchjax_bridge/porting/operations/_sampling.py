"""Images sampled at positions that are computed, and windows that are summed where they overlap."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError
from ._convolution import per_axis
from ._table import operation

__all__: list[str] = []

_MODES = ("bilinear", "nearest", "bicubic")
_PADDINGS = ("zeros", "border", "reflection")


@operation("F.grid_sample", "grid_sampler")
def grid_sample(
    at: Lowering,
    node: Node,
    input: Value,
    grid: Value,
    mode: Any = "bilinear",
    padding_mode: Any = "zeros",
    align_corners: Any = None,
) -> Placed:
    mode = _MODES[mode] if isinstance(mode, int) else mode
    padding = _PADDINGS[padding_mode] if isinstance(padding_mode, int) else padding_mode
    if len(input.shape) != 4 or mode == "bicubic":
        raise RefusedError(
            f"F.grid_sample of {len(input.shape)} axes with mode={mode!r}; images (N, C, H, W) are translated, "
            "with 'bilinear' and 'nearest'"
        )
    at.body.helpers.add("grid_sample")
    settings = f"mode={mode!r}, padding={padding!r}, align_corners={bool(align_corners)!r}"
    order = (0, 2, 3, 1)
    return Placed(f"grid_sample({at.read(input, order)}, {at.in_torch_order(grid)}, {settings})", order)


@operation("F.affine_grid", "affine_grid_generator")
def affine_grid(at: Lowering, node: Node, theta: Value, size: Any, align_corners: Any = None) -> Placed:
    if len(size) != 4:
        raise RefusedError("F.affine_grid of volumes; images (N, C, H, W) are translated")
    at.body.helpers.add("affine_grid")
    space = at.number(tuple(size[2:]))
    return Placed(
        f"affine_grid({at.in_torch_order(theta)}, {space}, align_corners={bool(align_corners)!r})",
        (0, 1, 2, 3),
    )


@operation("fold", "col2im")
def fold(
    at: Lowering,
    node: Node,
    input: Value,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Placed:
    if len(input.shape) != 3:
        raise RefusedError("F.fold of an input without a batch; add the axis with x[None]")
    at.body.helpers.add("fold")
    settings = (output_size, kernel_size, stride, padding, dilation)
    texts = [at.number(per_axis(setting, 2)) for setting in settings]
    return Placed(f"fold({at.read(input, (0, 2, 1))}, {', '.join(texts)})", (0, 2, 3, 1))
