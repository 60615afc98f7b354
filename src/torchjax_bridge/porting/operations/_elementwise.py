"""Functions that work on each element. The layout stays; operands are brought to that of the largest."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Axes, Placed, RefusedError, torch_order
from ._table import Translation, operation

__all__ = ["aligned", "operands"]

_UNARY = {
    **{
        name: f"nnx.{name}({{}})"
        for name in ("relu", "silu", "sigmoid", "tanh", "relu6", "selu", "log_sigmoid")
    },
    **{
        name: f"jnp.{name}({{}})"
        for name in (
            *(
                "exp",
                "exp2",
                "expm1",
                "log",
                "log2",
                "log10",
                "log1p",
                "sqrt",
                "abs",
                "square",
                "sign",
                "sin",
                "cos",
            ),
            *(
                "tan",
                "sinh",
                "cosh",
                "floor",
                "ceil",
                "trunc",
                "round",
                "isnan",
                "isinf",
                "isfinite",
                "logical_not",
            ),
            *("arcsin", "arccos", "arctan", "deg2rad", "rad2deg", "nan_to_num", "real", "imag", "conj"),
        )
    },
    "logsigmoid": "nnx.log_sigmoid({})",
    "absolute": "jnp.abs({})",
    "asin": "jnp.arcsin({})",
    "acos": "jnp.arccos({})",
    "atan": "jnp.arctan({})",
    "hardswish": "nnx.hard_swish({})",
    "hardsigmoid": "nnx.hard_sigmoid({})",
    "mish": "jax.nn.mish({})",
    "softsign": "nnx.soft_sign({})",
    "tanhshrink": "({0} - jnp.tanh({0}))",
    "rsqrt": "jax.lax.rsqrt({})",
    "erf": "jax.lax.erf({})",
    "erfc": "jax.lax.erfc({})",
    "erfinv": "jax.lax.erf_inv({})",
    "neg": "(-{})",
    "negative": "(-{})",
    "invert": "(~{})",
    "bitwise_not": "(~{})",
    "reciprocal": "(1 / {})",
}


def _unary(template: str) -> Translation:
    def translate(at: Lowering, node: Node, input: Value, inplace: bool = False) -> Placed:
        placed = at.at(input)
        return placed.with_text(template.format(placed.text))

    return translate


for _name, _template in _UNARY.items():
    operation(_name)(_unary(_template))


def _with_settings(template: str, **defaults: Any) -> Translation:
    names = list(defaults)

    def translate(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
        kwargs.pop("inplace", None)
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if given.keys() - set(names) or len(args) > len(names) + 1:
            raise RefusedError(f"{node.function} is called with arguments that have no translation")
        placed = at.at(input)
        return placed.with_text(template.format(placed.text, **{n: at.number(given[n]) for n in names}))

    return translate


for _name, _template, _defaults in (
    ("elu", "nnx.elu({}, {alpha})", {"alpha": 1.0}),
    ("celu", "nnx.celu({}, {alpha})", {"alpha": 1.0}),
    ("leaky_relu", "nnx.leaky_relu({}, {negative_slope})", {"negative_slope": 0.01}),
    ("hardtanh", "jnp.clip({}, {min_val}, {max_val})", {"min_val": -1.0, "max_val": 1.0}),
    ("hardshrink", "jnp.where(jnp.abs({0}) > {lambd}, {0}, 0.0)", {"lambd": 0.5}),
    ("softshrink", "(jnp.sign({0}) * jnp.maximum(jnp.abs({0}) - {lambd}, 0.0))", {"lambd": 0.5}),
    ("threshold", "jnp.where({0} > {threshold}, {0}, {value})", {"threshold": 0.0, "value": 0.0}),
):
    operation(_name)(_with_settings(_template, **_defaults))


@operation("softplus")
def softplus(at: Lowering, node: Node, input: Value, beta: float = 1, threshold: float = 20) -> Placed:
    placed = at.at(input)
    if beta == 1:
        return placed.with_text(f"nnx.softplus({placed.text})")
    b = at.number(beta)
    return placed.with_text(f"(nnx.softplus({placed.text} * {b}) / {b})")


@operation("gelu")
def gelu(at: Lowering, node: Node, input: Value, approximate: str = "none") -> Placed:
    placed = at.at(input)
    return placed.with_text(f"nnx.gelu({placed.text}, approximate={approximate == 'tanh'})")


@operation("clamp", "clip", "clamp_min", "clamp_max")
def clamp(at: Lowering, node: Node, input: Value, min: Any = None, max: Any = None) -> Placed:
    if node.function.rstrip("_").endswith("clamp_max"):
        min, max = None, min
    if isinstance(min, Value) or isinstance(max, Value):
        texts, placed = operands(at, [input, *(bound for bound in (min, max) if bound is not None)])
        bounds = iter(texts[1:])
        low, high = (next(bounds) if bound is not None else "None" for bound in (min, max))
        return placed.with_text(f"jnp.clip({texts[0]}, {low}, {high})")
    placed = at.at(input)
    if max is None:
        return placed.with_text(f"jnp.maximum({placed.text}, {at.number(min)})")
    if min is None:
        return placed.with_text(f"jnp.minimum({placed.text}, {at.number(max)})")
    return placed.with_text(f"jnp.clip({placed.text}, {at.number(min)}, {at.number(max)})")


# --- several operands ---------------------------------------------------------------------------------------


def operands(at: Lowering, values: Sequence[Any]) -> tuple[list[str], Placed]:
    """The expressions of values that are broadcast against each other, and where the result stands."""
    tensors = [value for value in values if isinstance(value, Value)]
    rank = max(len(value.shape) for value in tensors)
    full = [value for value in tensors if len(value.shape) == rank]
    computed = [value for value in full if at.is_computed(value)]
    maps = {(at.at(v).map_axis, at.at(v).map_shape) for v in tensors if at.at(v).map_axis is not None}
    plain = [v for v in tensors if at.at(v).map_axis is None and math.prod(v.shape) > 1]
    if len(maps) > 1 or (maps and plain):
        for value in tensors:
            at.in_torch_map_order(value)
        maps = set()

    def weight(value: Value) -> tuple[int, bool]:
        return math.prod(value.shape), at.at(value).order != torch_order(rank)

    order = at.at(max(computed or full, key=weight)).order
    texts = [aligned(at, v, order) if isinstance(v, Value) else at.number(v) for v in values]
    map_axis, map_shape = next(iter(maps), (None, ()))
    return texts, Placed("", order, map_axis, map_shape)


def aligned(at: Lowering, value: Value, order: Axes) -> str:
    """The expression of a value, of the same or a lower rank, so that it broadcasts against one in this order."""
    placed, rank = at.at(value), len(value.shape)
    if math.prod(value.shape) == 1 and rank < len(order):
        return placed.text if rank == 0 else f"{placed.text}.reshape(())"
    missing = len(order) - rank
    own = tuple(axis - missing for axis in order if axis >= missing)
    text = placed.text if placed.map_axis is not None else at.read(value, own)
    present = [axis >= missing for axis in order]
    if all(present) or all(present[present.index(True) :]):
        return text  # trailing axes, as NumPy broadcasts
    items = ", ".join(":" if here else "None" for here in present[present.index(True) :])
    return f"{text}[{items}]"


def _binary(template: str, reflected: bool = False) -> Translation:
    def translate(
        at: Lowering, node: Node, input: Any, other: Any, *, alpha: Any = 1, out: None = None
    ) -> Placed:
        (x, y), placed = operands(at, (other, input) if reflected else (input, other))
        if alpha != 1:
            y = f"({at.number(alpha)} * {y})"
        return placed.with_text(template.format(x, y))

    return translate


_SYMBOLS = {
    "add": "+",
    "sub": "-",
    "subtract": "-",
    "mul": "*",
    "multiply": "*",
    "pow": "**",
    "floordiv": "//",
    "floor_divide": "//",
    "remainder": "%",
    "mod": "%",
    "eq": "==",
    "ne": "!=",
    "not_equal": "!=",
    "lt": "<",
    "less": "<",
    "gt": ">",
    "greater": ">",
    "le": "<=",
    "less_equal": "<=",
    "ge": ">=",
    "greater_equal": ">=",
    "and": "&",
    "or": "|",
    "xor": "^",
    "bitwise_and": "&",
    "bitwise_or": "|",
    "bitwise_xor": "^",
    "lshift": "<<",
    "rshift": ">>",
}
for _name, _symbol in _SYMBOLS.items():
    operation(_name, f"i{_name}")(_binary(f"({{}} {_symbol} {{}})"))
for _name in ("add", "sub", "mul", "pow", "floordiv", "mod", "and", "or", "xor"):
    operation(f"r{_name}", *(("rsub",) if _name == "sub" else ()))(
        _binary(f"({{}} {_SYMBOLS[_name]} {{}})", reflected=True)
    )
for _name in (
    "maximum",
    "minimum",
    "arctan2",
    "logical_and",
    "logical_or",
    "logical_xor",
    "hypot",
    "fmod",
    "logaddexp",
):
    operation(_name)(_binary(f"jnp.{_name}({{}}, {{}})"))
operation("atan2")(_binary("jnp.arctan2({}, {})"))


def _division(reflected: bool) -> Translation:
    def translate(
        at: Lowering,
        node: Node,
        input: Any,
        other: Any,
        *,
        rounding_mode: str | None = None,
        out: None = None,
    ) -> Placed:
        (x, y), placed = operands(at, (other, input) if reflected else (input, other))
        if rounding_mode == "trunc":
            return placed.with_text(f"jnp.trunc({x} / {y}).astype({at.number(node.result.dtype)})")
        return placed.with_text(f"({x} {'//' if rounding_mode else '/'} {y})")

    return translate


operation("div", "true_divide", "divide", "truediv", "itruediv", "idiv")(_division(reflected=False))
operation("rdiv", "rtruediv")(_division(reflected=True))


@operation("where")
def where(at: Lowering, node: Node, condition: Value, input: Any = None, other: Any = None) -> Placed:
    if input is None:
        raise RefusedError("torch.where with one argument gives an output whose shape depends on values")
    texts, placed = operands(at, [condition, input, other])
    return placed.with_text(f"jnp.where({', '.join(texts)})")


@operation("masked_fill")
def masked_fill(at: Lowering, node: Node, input: Value, mask: Value, value: Any) -> Placed:
    (x, m), placed = operands(at, [input, mask])
    return placed.with_text(f"jnp.where({m}, {at.read(value)}, {x})")


@operation("lerp")
def lerp(at: Lowering, node: Node, input: Value, end: Value, weight: Any) -> Placed:
    (x, y, w), placed = operands(at, [input, end, weight])
    return placed.with_text(f"({x} + {w} * ({y} - {x}))")


@operation("addcmul")
def addcmul(
    at: Lowering, node: Node, input: Value, tensor1: Value, tensor2: Value, *, value: Any = 1
) -> Placed:
    (x, y, z), placed = operands(at, [input, tensor1, tensor2])
    return placed.with_text(f"({x} + {at.number(value)} * {y} * {z})")


# --- the same value -----------------------------------------------------------------------------------------


@operation(
    "contiguous", "clone", "detach", "alias", "data", "pin_memory", "dequantize", "positive", "requires_grad"
)
def same(at: Lowering, node: Node, input: Value, *, memory_format: Any = None) -> Placed:
    return at.at(input)


@operation("identity")
def identity(at: Lowering, node: Node, input: Value) -> Placed:
    return at.at(input)


@operation(
    "to",
    "float",
    "half",
    "bfloat16",
    "double",
    "long",
    "int",
    "bool",
    "short",
    "char",
    "byte",
    "type",
    "type_as",
)
def cast(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
    placed = at.at(input)
    if node.result.dtype == input.dtype:
        return placed
    return placed.with_text(f"{placed.text}.astype({at.number(node.result.dtype)})")


@operation("cuda", "cpu")
def move(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
    return at.at(input)


@operation("copy", "set_data")
def copy_values(at: Lowering, node: Node, input: Value, other: Value, non_blocking: bool = False) -> Placed:
    order = at.at(input).order
    (_, y), placed = operands(at, [input, other])
    if input.shape == other.shape:
        return replace(placed, text=y)
    shape = ", ".join(str(input.shape[axis]) for axis in order)
    return replace(placed, text=f"jnp.broadcast_to({y}, ({shape}))")
