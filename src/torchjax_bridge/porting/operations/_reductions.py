"""Functions that reduce axes: each axis is where it stands in the emitted array."""

import math
from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError
from ._operands import axes_of, axis_text, operands, remaining
from ._table import Translation, last_name, operation

__all__ = ["length"]


def reduced(at: Lowering, function: str, input: Value, dim: Any, keepdim: bool, extra: str = "") -> Placed:
    """``function(input, axis=...)``."""
    placed = at.in_torch_map_order(input)
    axes = axes_of(input, dim)
    every = len(axes) == placed.rank and not keepdim
    where = "" if every else f", axis={axis_text(placed, axes)}"
    keep = ", keepdims=True" if keepdim else ""
    return Placed(f"{function}({placed.text}{where}{keep}{extra})", remaining(placed.order, axes, keepdim))


def _reduction(function: str) -> Translation:
    def translate(at: Lowering, node: Node, input: Value, dim: Any = None, keepdim: bool = False) -> Placed:
        return reduced(at, function, input, dim, bool(keepdim))

    return translate


def _accumulation(function: str) -> Translation:
    def translate(
        at: Lowering, node: Node, input: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
    ) -> Placed:
        wanted = at.number(node.result.dtype)
        cast = "" if wanted == at.number(input.dtype) else f", dtype={wanted}"
        return reduced(at, function, input, dim, bool(keepdim), cast)

    return translate


for _name in ("mean", "sum", "prod", "nansum", "nanmean"):
    operation(_name)(_accumulation(f"jnp.{_name}"))
for _name in ("any", "all"):
    operation(_name)(_reduction(f"jnp.{_name}"))
operation("amax")(_reduction("jnp.max"))
operation("amin")(_reduction("jnp.min"))
operation("logsumexp", "special.logsumexp")(_reduction("jax.nn.logsumexp"))


@operation("count_nonzero")
def count_nonzero(at: Lowering, node: Node, input: Value, dim: Any = None) -> Placed:
    return reduced(at, "jnp.count_nonzero", input, dim, False)


def _position(function: str) -> Translation:
    def translate(at: Lowering, node: Node, input: Value, dim: Any = None, keepdim: bool = False) -> Placed:
        if dim is None:
            text = f"{function}({at.in_torch_order(input)})"
            order = tuple(range(len(node.result.shape)))
            return Placed(f"{text}.reshape({node.result.shape})" if order else text, order)
        return reduced(at, function, input, dim, bool(keepdim))

    return translate


operation("argmax")(_position("jnp.argmax"))
operation("argmin")(_position("jnp.argmin"))


def _extremum(kind: str) -> Translation:
    def translate(
        at: Lowering, node: Node, input: Value, dim: Any = None, keepdim: bool = False, *, other: Any = None
    ) -> Placed | list[Placed]:
        second = dim if isinstance(dim, Value) else other
        if second is not None:
            (x, y), placed = operands(at, [input, second])
            return placed.with_text(f"jnp.{kind}imum({x}, {y})")
        values = reduced(at, f"jnp.{kind}", input, dim, bool(keepdim))
        if dim is None:
            return values
        return [values, reduced(at, f"jnp.arg{kind}", input, dim, bool(keepdim))]

    return translate


operation("max")(_extremum("max"))
operation("min")(_extremum("min"))


@operation("aminmax")
def aminmax(
    at: Lowering, node: Node, input: Value, *, dim: Any = None, keepdim: bool = False
) -> list[Placed]:
    return [reduced(at, f"jnp.{kind}", input, dim, bool(keepdim)) for kind in ("min", "max")]


@operation("median", "nanmedian", "kthvalue")
def median(
    at: Lowering,
    node: Node,
    input: Value,
    *settings: Any,
    dim: Any = None,
    keepdim: bool = False,
    k: Any = None,
) -> list[Placed]:
    name = last_name(node)
    given = list(settings)
    if name == "kthvalue":
        k = given.pop(0) if given else k
        dim = -1 if dim is None and not given else dim
    if given:
        dim = given.pop(0)
    keepdim = bool(given.pop(0)) if given else bool(keepdim)
    if name == "nanmedian":
        raise RefusedError("torch.nanmedian takes the lower of two middle values, jnp.nanmedian their mean")
    x = at.in_torch_map_order(input)
    if dim is None:
        count = f"{x.text}.size"
        return [Placed(f"jnp.sort({x.text}.reshape(-1))[({count} - 1) // 2]", ())]
    axes = axes_of(input, dim)
    place = x.place(axes[0])
    rank = f"({x.text}.shape[{place}] - 1) // 2" if name == "median" else f"{at.number(k)} - 1"
    item = f"[{rank}]" if keepdim else rank
    found = f"[{', '.join([*[':'] * place, f'jnp.asarray({item})' if keepdim else item])}]"
    order = remaining(x.order, axes, keepdim)
    return [
        Placed(f"jnp.{function}({x.text}, axis={place}){found}", order) for function in ("sort", "argsort")
    ]


@operation("quantile", "nanquantile")
def quantile(
    at: Lowering,
    node: Node,
    input: Value,
    q: Any,
    dim: Any = None,
    keepdim: bool = False,
    *,
    interpolation: str = "linear",
) -> Placed:
    placed, axes = at.in_torch_map_order(input), axes_of(input, dim)
    where = "" if dim is None and not keepdim else f", axis={axis_text(placed, axes)}"
    how = (", keepdims=True" if keepdim else "") + (
        "" if interpolation == "linear" else f", method={interpolation!r}"
    )
    order = remaining(placed.order, axes, bool(keepdim))
    if isinstance(q, Value) and len(q.shape) == 1:
        order = (0, *(axis + 1 for axis in order))
    return Placed(f"jnp.{last_name(node)}({placed.text}, {at.read(q)}{where}{how})", order)


def _spread(function: str, both: bool) -> Translation:
    def translate(
        at: Lowering,
        node: Node,
        input: Value,
        dim: Any = None,
        unbiased: Any = True,
        keepdim: bool = False,
        *,
        correction: Any = None,
    ) -> Placed | list[Placed]:
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        freedom = (1 if unbiased else 0) if correction is None else correction
        extra = f", ddof={at.number(freedom)}" if freedom else ""
        spread = reduced(at, function, input, dim, bool(keepdim), extra)
        return [spread, reduced(at, "jnp.mean", input, dim, bool(keepdim))] if both else spread

    return translate


operation("var")(_spread("jnp.var", both=False))
operation("std")(_spread("jnp.std", both=False))
operation("var_mean")(_spread("jnp.var", both=True))
operation("std_mean")(_spread("jnp.std", both=True))


# --- norms --------------------------------------------------------------------------------------------------


def length(at: Lowering, placed: Placed, axes: tuple[int, ...], p: Any, keepdim: bool) -> Placed:
    """The p-norm over axes."""
    where = f", axis={axis_text(placed, axes)}" if axes else ""
    keep = ", keepdims=True" if keepdim else ""
    order = remaining(placed.order, axes, keepdim)
    x = placed.text
    if isinstance(p, float | int) and p in (1, 2, math.inf, -math.inf, 0):
        if len(axes) == 1:
            by = "" if p == 2 else f", ord={at.number(p)}"
            return Placed(f"jnp.linalg.norm({x}{by}{where}{keep})", order)
        made = {
            2: f"jnp.sqrt(jnp.sum(jnp.square({x}){where}{keep}))",
            1: f"jnp.sum(jnp.abs({x}){where}{keep})",
            0: f"jnp.sum({x} != 0{where}{keep})",
            math.inf: f"jnp.max(jnp.abs({x}){where}{keep})",
            -math.inf: f"jnp.min(jnp.abs({x}){where}{keep})",
        }
        return Placed(made[p], order)
    power = at.number(p)
    return Placed(f"(jnp.sum(jnp.abs({x}) ** {power}{where}{keep}) ** (1 / {power}))", order)


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
    if x1.shape != x2.shape:
        raise RefusedError(f"{node.function} of tensors that are broadcast; expand them first")
    where = f"axis={axis_text(placed, axes)}"
    floor = at.number(eps)
    lengths = (f"jnp.maximum(jnp.linalg.norm({t}, {where}), {floor})" for t in (x, y))
    text = f"(jnp.sum({x} * {y}, {where}) / ({' * '.join(lengths)}))"
    return Placed(text, remaining(placed.order, axes, keepdim=False))


@operation("F.normalize")
def normalize(at: Lowering, node: Node, input: Value, p: Any = 2.0, dim: Any = 1, eps: Any = 1e-12) -> Placed:
    placed = at.in_torch_map_order(input)
    size = length(at, placed, axes_of(input, dim), p, keepdim=True).text
    return placed.with_text(f"({placed.text} / jnp.maximum({size}, {at.number(eps)}))")


@operation("cdist")
def cdist(at: Lowering, node: Node, x1: Value, x2: Value, p: Any = 2.0, compute_mode: Any = None) -> Placed:
    apart = f"({at.in_torch_order(x1)}[..., :, None, :] - {at.in_torch_order(x2)}[..., None, :, :])"
    rank = len(node.result.shape)
    return length(at, Placed(apart, tuple(range(rank + 1))), (rank,), p, keepdim=False)
