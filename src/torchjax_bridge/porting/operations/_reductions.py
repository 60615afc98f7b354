"""Functions that reduce axes: each axis is where it stands in the emitted array."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError
from ._operands import axes_of, axis_text, operands, remaining
from ._table import Translation, last_name, operation

__all__: list[str] = []

_POSITIONS = "jnp.argmax", "jnp.argmin"


def reduced(at: Lowering, function: str, input: Value, dim: Any, keepdim: bool, extra: str = "") -> Placed:
    """``function(input, axis=...)``."""
    placed, axes = at.at(input), axes_of(input, dim)
    whole = placed.map_axis in [placed.place(axis) for axis in axes]
    if not whole or function in _POSITIONS:  # of all of a flattened map, the order does not matter
        placed = at.in_torch_map_order(input)
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


def _spread(deviation: bool, both: bool) -> Translation:
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
        spread = reduced(at, "jnp.var", input, dim, bool(keepdim), extra)
        if deviation:  # of equal numbers the derivative is 0 in torch, and NaN of jnp.std
            at.body.helpers.add("safe_sqrt")
            spread = spread.with_text(f"safe_sqrt({spread.text})")
        return [spread, reduced(at, "jnp.mean", input, dim, bool(keepdim))] if both else spread

    return translate


operation("var")(_spread(deviation=False, both=False))
operation("std")(_spread(deviation=True, both=False))
operation("var_mean")(_spread(deviation=False, both=True))
operation("std_mean")(_spread(deviation=True, both=True))
