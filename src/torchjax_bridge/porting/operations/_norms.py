"""Norms and distances over axes, wherever these stand."""

import math
from typing import Any

from torchjax_bridge.recording import Node, SourceLine, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError
from ._operands import axes_of, axis_text, operands, remaining
from ._table import last_name, operation

__all__ = ["length"]


def length(at: Lowering, placed: Placed, axes: tuple[int, ...], p: Any, keepdim: bool) -> Placed:
    """The p-norm over axes. At a zero vector its derivative is 0, as torch's."""
    where = f", axis={axis_text(placed, axes)}" if axes else ""
    keep = ", keepdims=True" if keepdim else ""
    order = remaining(placed.order, axes, keepdim)
    x = placed.text
    if isinstance(p, float | int) and p in (2, 0):
        at.body.helpers |= {"safe_sqrt"} if p == 2 else set()
        if p == 0:
            return Placed(f"jnp.sum({x} != 0{where}{keep})", order)
        return Placed(f"safe_sqrt(jnp.sum(jnp.square({x}){where}{keep}))", order)
    at.body.helpers.add("absolute")
    x = f"absolute({x})"
    if isinstance(p, float | int) and p in (1, math.inf, -math.inf):
        function = {1: "sum", math.inf: "max", -math.inf: "min"}[p]
        return Placed(f"jnp.{function}({x}{where}{keep})", order)
    power = at.number(p)
    total = at.variable(f"jnp.sum({x} ** {power}{where}{keep})", SourceLine())
    text = f"jnp.where({total} == 0, 0, jnp.where({total} == 0, 1, {total}) ** (1 / {power}))"
    return Placed(text, order)


@operation("norm")
def norm(
    at: Lowering,
    node: Node,
    input: Value,
    p: Any = "fro",
    dim: Any = None,
    keepdim: bool = False,
    dtype: Any = None,
) -> Placed:
    if isinstance(p, str) and p != "fro":
        raise RefusedError(f"{node.function}(p={p!r}); only vector norms are translated")
    placed = at.in_torch_map_order(input)
    return length(at, placed, axes_of(input, dim), 2 if p in ("fro", None) else p, bool(keepdim))


@operation("linalg.vector_norm")
def vector_norm(
    at: Lowering,
    node: Node,
    input: Value,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Placed:
    return length(at, at.in_torch_map_order(input), axes_of(input, dim), ord, bool(keepdim))


@operation("linalg.norm", "linalg.matrix_norm")
def matrix_norm(
    at: Lowering,
    node: Node,
    input: Value,
    ord: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Placed:
    if last_name(node) == "matrix_norm":
        ord, dim = "fro" if ord is None else ord, (-2, -1) if dim is None else dim
    axes = axes_of(input, dim)
    if ord not in (None, "fro") and len(axes) > 1:
        raise RefusedError(
            f"{node.function} of order {ord!r} over two axes is a norm of matrices; use torch.linalg.vector_norm, "
            "or the Frobenius norm"
        )
    if isinstance(ord, str) and len(axes) == 1:
        raise RefusedError(f"{node.function} of order {ord!r} over one axis; use torch.linalg.vector_norm")
    return length(at, at.in_torch_map_order(input), axes, 2 if ord in (None, "fro") else ord, bool(keepdim))


@operation("dist")
def dist(at: Lowering, node: Node, input: Value, other: Value, p: Any = 2) -> Placed:
    (x, y), placed = operands(at, [input, other])
    return length(at, Placed(f"({x} - {y})", placed.order), tuple(range(placed.rank)), p, keepdim=False)


@operation("pairwise_distance")
def pairwise_distance(
    at: Lowering, node: Node, x1: Value, x2: Value, p: Any = 2.0, eps: Any = 1e-6, keepdim: bool = False
) -> Placed:
    (x, y), placed = operands(at, [x1, x2])
    apart = Placed(f"({x} - {y} + {at.number(eps)})", placed.order)
    return length(at, apart, (placed.rank - 1,), p, bool(keepdim))


@operation("cosine_similarity")
def cosine_similarity(
    at: Lowering, node: Node, x1: Value, x2: Value, dim: Any = 1, eps: Any = 1e-8
) -> Placed:
    rank = max(len(x1.shape), len(x2.shape))
    for value in (x1, x2):
        at.in_torch_map_order(value)
    (x, y), placed = operands(at, [x1, x2])
    axes = (int(dim) % rank,)
    if len(x1.shape) != len(x2.shape):
        raise RefusedError(f"{node.function} of tensors with other numbers of axes; add them with x[None]")
    where = f"axis={axis_text(placed, axes)}"
    floor = at.number(eps)
    at.body.helpers.add("safe_sqrt")
    lengths = (f"jnp.maximum(safe_sqrt(jnp.sum(jnp.square({t}), {where})), {floor})" for t in (x, y))
    text = f"(jnp.sum({x} * {y}, {where}) / ({' * '.join(lengths)}))"
    return Placed(text, remaining(placed.order, axes, keepdim=False))


@operation("F.normalize")
def normalize(at: Lowering, node: Node, input: Value, p: Any = 2.0, dim: Any = 1, eps: Any = 1e-12) -> Placed:
    placed = at.in_torch_map_order(input)
    if p == 2 and type(eps) is float:  # at zero the derivative of a norm is NaN in JAX, and 0 in torch
        axes = axis_text(placed, axes_of(input, dim))
        square = f"jnp.sum(jnp.square({placed.text}), axis={axes}, keepdims=True)"
        return placed.with_text(f"({placed.text} * jax.lax.rsqrt(jnp.maximum({square}, {eps!r} ** 2)))")
    size = length(at, placed, axes_of(input, dim), p, keepdim=True).text
    return placed.with_text(f"({placed.text} / jnp.maximum({size}, {at.number(eps)}))")


@operation("cdist")
def cdist(at: Lowering, node: Node, x1: Value, x2: Value, p: Any = 2.0, compute_mode: Any = None) -> Placed:
    apart = f"({at.in_torch_order(x1)}[..., :, None, :] - {at.in_torch_order(x2)}[..., None, :, :])"
    rank = len(node.result.shape)
    return length(at, Placed(apart, tuple(range(rank + 1))), (rank,), p, keepdim=False)
