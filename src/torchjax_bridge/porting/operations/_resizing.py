"""Interpolation, with channels last."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError, channels_last
from ._convolution import per_axis
from ._table import operation

__all__: list[str] = []


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
    steps = ""
    if size is None:
        factors = per_axis(scale_factor, rank - 2)
        sizes = [_scaled(f"{x}.shape[{place + 1}]", float(factor)) for place, factor in enumerate(factors)]
        if not recompute_scale_factor and not all(float(factor).is_integer() for factor in factors):
            steps = f"({', '.join(repr(1 / float(factor)) for factor in factors)},)"
    else:
        sizes = [at.number(number) for number in per_axis(size, rank - 2)]
    kinds = {"linear": 3, "bilinear": 4, "trilinear": 5}
    shape = f"({x}.shape[0], {', '.join(sizes)}, {x}.shape[{rank - 1}])"
    at_steps = f", {steps}" if steps else ""
    if mode == "nearest":
        if not steps and all(b % a == 0 for a, b in zip(before, after, strict=True)):
            return Placed(f"jax.image.resize({x}, {shape}, 'nearest')", order)
        return _helper(at, "resize_nearest", x, sizes, order, at_steps)
    if mode == "nearest-exact" and steps:
        return _helper(at, "resize_nearest", x, sizes, order, f"{at_steps}, 0.5")
    if mode == "nearest-exact":
        return Placed(f"jax.image.resize({x}, {shape}, 'nearest')", order)
    if mode == "area":
        return _helper(at, "adaptive_avg_pool", x, sizes, order)
    if mode in kinds and align_corners and not antialias:
        return _helper(at, "resize_corners", x, sizes, order)
    if mode == "bicubic" and not antialias:
        corners = ", align_corners=True" if align_corners else at_steps
        return _helper(at, "resize_cubic", x, sizes, order, corners)
    if mode in kinds and steps and not antialias and not align_corners:
        return _helper(at, "resize_linear", x, sizes, order, at_steps)
    if mode in kinds and not align_corners and not steps:
        return Placed(f"jax.image.resize({x}, {shape}, 'linear', antialias={antialias!r})", order)
    if mode == "bicubic" and not align_corners and not steps:
        return Placed(f"jax.image.resize({x}, {shape}, 'cubic')", order)
    raise RefusedError(
        f"F.interpolate(mode={mode!r}, align_corners={align_corners}, antialias={antialias}): JAX has another grid "
        "or kernel; use align_corners=False, and size= in the place of scale_factor="
    )


def _scaled(size: str, factor: float) -> str:
    if factor.is_integer():
        return size if factor == 1 else f"{size} * {int(factor)}"
    return f"{size} // {int(1 / factor)}" if (1 / factor).is_integer() else f"int({size} * {factor})"


def _helper(
    at: Lowering, name: str, x: str, sizes: list[str], order: tuple[int, ...], settings: str = ""
) -> Placed:
    at.body.helpers.add(name)
    return Placed(f"{name}({x}, ({', '.join(sizes)}{',' if len(sizes) == 1 else ''}){settings})", order)
