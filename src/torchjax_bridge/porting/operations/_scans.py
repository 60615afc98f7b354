"""Functions that run along one axis: softmax, sums that accumulate, orders."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError, Several
from ._operands import axes_of, axis_text
from ._table import Translation, last_name, operation

__all__: list[str] = []


def _default_axis(node: Node, input: Value, dim: Any) -> Any:
    """The axis that torch takes, with a warning, where the author names none."""
    if dim is not None:
        return dim
    return 0 if len(input.shape) in (0, 1, 3) else 1


def _softmax(function: str, sign: str = "") -> Translation:
    def translate(at: Lowering, node: Node, input: Value, dim: Any = None, dtype: Any = None) -> Placed:
        placed = at.in_torch_map_order(input)
        text = placed.text
        if dtype is not None and at.number(dtype) != at.number(input.dtype):
            text = f"{text}.astype({at.number(dtype)})"
        axis = axis_text(placed, axes_of(input, _default_axis(node, input, dim)))
        return placed.with_text(f"{function}({sign}{text}, axis={axis})")

    return translate


def _functional(translation: Translation) -> Translation:
    def translate(
        at: Lowering, node: Node, input: Value, dim: Any = None, _stacklevel: int = 3, dtype: Any = None
    ) -> Any:
        return translation(at, node, input, dim, dtype)

    return translate


for _name, _function, _sign in (
    ("softmax", "nnx.softmax", ""),
    ("log_softmax", "nnx.log_softmax", ""),
    ("softmin", "nnx.softmax", "-"),
):
    _translation = _softmax(_function, _sign)
    if _name != "softmin":
        operation(_name, f"special.{_name}")(_translation)
    operation(f"F.{_name}")(_functional(_translation))


@operation("glu")
def glu(at: Lowering, node: Node, input: Value, dim: Any = -1) -> Placed:
    placed = at.in_torch_map_order(input)
    return placed.with_text(f"nnx.glu({placed.text}, axis={axis_text(placed, axes_of(input, dim))})")


@operation("cumsum", "cumprod")
def cumulate(at: Lowering, node: Node, input: Value, dim: Any, *, dtype: Any = None) -> Placed:
    placed = at.in_torch_map_order(input)
    wanted = at.number(node.result.dtype)
    cast = "" if wanted == at.number(input.dtype) else f", dtype={wanted}"
    if not input.shape:
        return placed.with_text(f"{placed.text}.astype({wanted})")
    axis = axis_text(placed, axes_of(input, dim))
    return placed.with_text(f"jnp.{last_name(node)}({placed.text}, axis={axis}{cast})")


@operation("logcumsumexp")
def logcumsumexp(at: Lowering, node: Node, input: Value, dim: Any) -> Placed:
    placed = at.in_torch_map_order(input)
    return placed.with_text(f"jax.lax.cumlogsumexp({placed.text}, axis={placed.place(int(dim))})")


@operation("cummax", "cummin")
def running_extremum(at: Lowering, node: Node, input: Value, dim: Any) -> list[Placed]:
    if node.result[1].uses:
        raise RefusedError(f"the indices that {node.function} gives are read; only its values are translated")
    placed = at.in_torch_map_order(input)
    return [placed.with_text(f"jax.lax.{last_name(node)}({placed.text}, axis={placed.place(int(dim))})")]


@operation("sort")
def sort(
    at: Lowering, node: Node, input: Value, dim: Any = -1, descending: bool = False, stable: bool = False
) -> list[Placed]:
    placed = at.in_torch_map_order(input)
    how = f"axis={axis_text(placed, axes_of(input, dim))}" + (", descending=True" if descending else "")
    return [placed.with_text(f"jnp.{function}({placed.text}, {how})") for function in ("sort", "argsort")]


@operation("argsort")
def argsort(
    at: Lowering, node: Node, input: Value, dim: Any = -1, descending: bool = False, stable: bool = False
) -> Placed:
    return sort(at, node, input, dim, descending)[1]


@operation("msort")
def msort(at: Lowering, node: Node, input: Value) -> Placed:
    return sort(at, node, input, 0)[0]


@operation("topk")
def topk(
    at: Lowering, node: Node, input: Value, k: Any, dim: Any = -1, largest: bool = True, sorted: bool = True
) -> Several | list[Placed]:
    placed = at.in_torch_map_order(input)
    place = placed.place(int(dim))
    along = "" if place == placed.rank - 1 else f", axis={place}"
    if largest:
        return Several(f"jax.lax.top_k({placed.text}, {at.number(k)}{along})", (placed.order,) * 2)
    first = ", ".join([*[":"] * place, f":{at.number(k)}"])
    return [
        placed.with_text(f"jnp.{function}({placed.text}, axis={place})[{first}]")
        for function in ("sort", "argsort")
    ]


@operation("diff")
def diff(
    at: Lowering, node: Node, input: Value, n: Any = 1, dim: Any = -1, prepend: Any = None, append: Any = None
) -> Placed:
    placed = at.in_torch_map_order(input)
    ends = "".join(
        f", {name}={at.read(end, placed.order)}"
        for name, end in (("prepend", prepend), ("append", append))
        if end is not None
    )
    times = "" if n == 1 else f", n={at.number(n)}"
    return placed.with_text(f"jnp.diff({placed.text}{times}, axis={placed.place(int(dim))}{ends})")


@operation("bucketize", "searchsorted")
def bucketize(
    at: Lowering,
    node: Node,
    input: Value,
    boundaries: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: None = None,
) -> Placed:
    values, edges = input, boundaries
    if last_name(node) == "searchsorted":
        values, edges = boundaries, input
    if not isinstance(values, Value) or not isinstance(edges, Value) or len(edges.shape) != 1:
        raise RefusedError(f"{node.function} is translated for a tensor and boundaries of one axis")
    placed = at.in_torch_map_order(values)
    where = side or ("right" if right else "left")
    return placed.with_text(f"jnp.searchsorted({at.read(edges)}, {placed.text}, side={where!r})")


@operation("isin")
def isin(
    at: Lowering,
    node: Node,
    elements: Any,
    test_elements: Any,
    *,
    assume_unique: bool = False,
    invert: bool = False,
) -> Placed:
    is_value = isinstance(elements, Value)
    placed = at.in_torch_map_order(elements) if is_value else Placed(at.number(elements), ())
    turned = ", invert=True" if invert else ""
    return placed.with_text(f"jnp.isin({placed.text}, {at.number(test_elements)}{turned})")
