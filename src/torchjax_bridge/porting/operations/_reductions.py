"""Functions that reduce axes, or that run along one: each axis is where it stands in the emitted array."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Axes, Placed, RefusedError, torch_order
from ._elementwise import operands
from ._table import Translation, operation

__all__ = ["axes_of", "axis_text", "remaining"]


def axes_of(value: Value, dim: Any) -> tuple[int, ...]:
    """The torch axes that ``dim`` names; all of them for None or an empty tuple."""
    rank = len(value.shape)
    if dim is None or (isinstance(dim, tuple | list) and not dim):
        return tuple(range(rank))
    return tuple(
        sorted(int(d) % rank if rank else 0 for d in (dim if isinstance(dim, tuple | list) else (dim,)))
    )


def axis_text(placed: Placed, axes: tuple[int, ...]) -> str:
    """Where axes stand, as an argument."""
    places = sorted(placed.place(axis) for axis in axes)
    if len(places) == 1:
        return "-1" if places[0] == placed.rank - 1 and placed.rank > 1 else str(places[0])
    return str(tuple(places))


def remaining(order: Axes, gone: tuple[int, ...], keepdim: bool) -> Axes:
    """The order of the axes that are left."""
    if keepdim:
        return order
    left = [axis for axis in order if axis not in gone]
    return tuple(sorted(left).index(axis) for axis in left)


def reduced(at: Lowering, function: str, input: Value, dim: Any, keepdim: bool, extra: str = "") -> Placed:
    """``function(input, axis=...)``."""
    placed = at.in_torch_map_order(input)
    axes = axes_of(input, dim)
    every = len(axes) == placed.rank and not keepdim
    where = "" if every else f", axis={axis_text(placed, axes)}"
    keep = ", keepdims=True" if keepdim else ""
    return Placed(f"{function}({placed.text}{where}{keep}{extra})", remaining(placed.order, axes, keepdim))


def _reduction(function: str) -> Translation:
    def translate(
        at: Lowering, node: Node, input: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
    ) -> Placed:
        cast = "" if dtype is None else f", dtype={at.number(dtype)}"
        return reduced(at, function, input, dim, bool(keepdim), cast)

    return translate


for _name in ("mean", "sum", "prod", "any", "all", "nansum", "nanmean", "count_nonzero"):
    operation(_name)(_reduction(f"jnp.{_name}"))
operation("amax")(_reduction("jnp.max"))
operation("amin")(_reduction("jnp.min"))
operation("logsumexp")(_reduction("jax.nn.logsumexp"))


def _position(function: str) -> Translation:
    def translate(at: Lowering, node: Node, input: Value, dim: Any = None, keepdim: bool = False) -> Placed:
        if dim is None:
            return Placed(f"{function}({at.in_torch_order(input)})", ())
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


def _spread(function: str, both: bool) -> Translation:
    def translate(
        at: Lowering,
        node: Node,
        input: Value,
        dim: Any = None,
        unbiased: bool = True,
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


@operation("norm", "linalg.vector_norm", "linalg.norm")
def norm(
    at: Lowering,
    node: Node,
    input: Value,
    p: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    ord: Any = None,
) -> Placed:
    order = p if ord is None else ord
    if order not in (None, 2, 2.0, "fro"):
        raise RefusedError(f"{node.function} of order {order!r}: only the Euclidean norm is translated")
    if node.function.endswith("linalg.norm") and dim is None and len(input.shape) == 2 and order == 2:
        raise RefusedError("torch.linalg.norm(ord=2) of a matrix is its largest singular value")
    placed = at.in_torch_map_order(input)
    axes = axes_of(input, dim)
    keep = ", keepdims=True" if keepdim else ""
    if len(axes) == 1:
        text = f"jnp.linalg.norm({placed.text}, axis={axis_text(placed, axes)}{keep})"
    else:
        text = f"jnp.sqrt(jnp.sum(jnp.square({placed.text}), axis={axis_text(placed, axes)}{keep}))"
    return Placed(text, remaining(placed.order, axes, bool(keepdim)))


# --- along an axis ------------------------------------------------------------------------------------------


def _along(function: str) -> Translation:
    def translate(
        at: Lowering, node: Node, input: Value, dim: Any = -1, _stacklevel: int = 3, dtype: Any = None
    ) -> Placed:
        if dim is None:
            raise RefusedError(f"{node.function} without dim")
        placed = at.in_torch_map_order(input)
        text = placed.text
        if dtype is not None and dtype != input.dtype:
            text = f"{text}.astype({at.number(dtype)})"
        return placed.with_text(f"{function}({text}, axis={axis_text(placed, axes_of(input, dim))})")

    return translate


operation("softmax", "special.softmax")(_along("nnx.softmax"))
operation("log_softmax")(_along("nnx.log_softmax"))
operation("glu")(_along("nnx.glu"))


@operation("softmin")
def softmin(at: Lowering, node: Node, input: Value, dim: Any = None, _stacklevel: int = 3) -> Placed:
    placed = at.in_torch_map_order(input)
    return placed.with_text(f"nnx.softmax(-{placed.text}, axis={axis_text(placed, axes_of(input, dim))})")


@operation("cumsum", "cumprod")
def cumulate(at: Lowering, node: Node, input: Value, dim: Any, *, dtype: Any = None) -> Placed:
    placed = at.in_torch_map_order(input)
    function = node.function.rpartition(".")[2].strip("_")
    cast = "" if node.result.dtype == input.dtype else f", dtype={at.number(node.result.dtype)}"
    return placed.with_text(
        f"jnp.{function}({placed.text}, axis={axis_text(placed, axes_of(input, dim))}{cast})"
    )


@operation("sort")
def sort(
    at: Lowering, node: Node, input: Value, dim: Any = -1, descending: bool = False, stable: bool = False
) -> list[Placed]:
    placed = at.in_torch_map_order(input)
    how = f"axis={axis_text(placed, axes_of(input, dim))}" + (", descending=True" if descending else "")
    return [
        placed.with_text(f"jnp.sort({placed.text}, {how})"),
        placed.with_text(f"jnp.argsort({placed.text}, {how})"),
    ]


@operation("topk")
def topk(
    at: Lowering, node: Node, input: Value, k: Any, dim: Any = -1, largest: bool = True, sorted: bool = True
) -> list[Placed]:
    if not largest or axes_of(input, dim) != (len(input.shape) - 1,):
        raise RefusedError("torch.topk is translated for the largest elements of the last axis")
    text = f"jax.lax.top_k({at.in_torch_order(input)}, {at.number(k)})"
    order = torch_order(len(input.shape))
    return [Placed(f"{text}[0]", order), Placed(f"{text}[1]", order)]


@operation("diff")
def diff(at: Lowering, node: Node, input: Value, n: int = 1, dim: Any = -1, prepend: Any = None) -> Placed:
    before = "" if prepend is None else f", prepend={at.in_torch_order(prepend)}"
    axis = axes_of(input, dim)[0]
    return Placed(
        f"jnp.diff({at.in_torch_order(input)}, n={n}, axis={axis}{before})", torch_order(len(input.shape))
    )


@operation("normalize")
def normalize(
    at: Lowering, node: Node, input: Value, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: None = None
) -> Placed:
    if p != 2.0:
        raise RefusedError("F.normalize is translated for p=2")
    placed = at.in_torch_map_order(input)
    axis = axis_text(placed, axes_of(input, dim))
    length = f"jnp.linalg.norm({placed.text}, axis={axis}, keepdims=True)"
    return placed.with_text(f"({placed.text} / jnp.maximum({length}, {at.number(eps)}))")
