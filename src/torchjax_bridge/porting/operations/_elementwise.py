"""Functions of several operands that work on each element. Operands are brought to the layout of the largest."""

from functools import cache
from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError
from ._operands import operands
from ._table import Translation, operation

__all__: list[str] = []


@cache
def _binary(template: str, reflected: bool = False) -> Translation:
    def translate(at: Lowering, node: Node, input: Any, other: Any) -> Placed:
        (x, y), placed = operands(at, (other, input) if reflected else (input, other))
        return placed.with_text(template.format(x, y))

    return translate


def _with_alpha(symbol: str, reflected: bool = False) -> Translation:
    def translate(at: Lowering, node: Node, input: Any, other: Any, *, alpha: Any = 1) -> Placed:
        if type(other) in (int, float) and other == 0 and not reflected and node.result.dtype == input.dtype:
            return at.at(input)  # the start of Python's own sum
        (x, y), placed = operands(at, (other, input) if reflected else (input, other))
        if not (isinstance(alpha, int) and int(alpha) == 1):
            y = f"({at.number(alpha)} * {y})"
        return placed.with_text(f"({x} {symbol} {y})")

    return translate


_SYMBOLS = {
    "mul": "*",
    "multiply": "*",
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
    "bitwise_left_shift": "<<",
    "bitwise_right_shift": ">>",
}
for _name, _symbol in _SYMBOLS.items():
    operation(_name, f"i{_name}")(_binary(f"({{}} {_symbol} {{}})"))
for _name in ("mul", "and", "or", "xor"):
    operation(f"r{_name}")(_binary(f"({{}} {_SYMBOLS[_name]} {{}})"))
for _name in ("floordiv", "mod", "lshift", "rshift"):
    operation(f"r{_name}")(_binary(f"({{}} {_SYMBOLS[_name]} {{}})", reflected=True))
operation("add", "iadd", "radd")(_with_alpha("+"))
operation("sub", "subtract", "isub")(_with_alpha("-"))
operation("rsub")(_with_alpha("-", reflected=True))
for _name in (
    *("maximum", "minimum", "arctan2", "logical_and", "logical_or", "logical_xor", "hypot"),
    *("fmod", "logaddexp", "logaddexp2", "copysign", "heaviside", "nextafter", "gcd", "lcm", "float_power"),
):
    operation(_name)(_binary(f"jnp.{_name}({{}}, {{}})"))
for _name in ("fmax", "fmin"):  # of equal numbers JAX differentiates the second, torch the first
    operation(_name)(_binary(f"jnp.{_name}({{1}}, {{0}})"))
operation("ldexp")(_binary("({} * 2.0 ** {})"))
operation("atan2")(_binary("jnp.arctan2({}, {})"))
operation("xlogy", "special.xlogy")(_binary("jax.scipy.special.xlogy({}, {})"))
operation("special.xlog1py")(_binary("jax.scipy.special.xlog1py({}, {})"))
operation("igamma", "special.gammainc")(_binary("jax.scipy.special.gammainc({}, {})"))
operation("igammac", "special.gammaincc")(_binary("jax.scipy.special.gammaincc({}, {})"))


def _power(reflected: bool) -> Translation:
    def translate(at: Lowering, node: Node, input: Any, other: Any) -> Placed:
        (x, y), placed = operands(at, (other, input) if reflected else (input, other))
        return placed.with_text(f"({f'({x})' if x.startswith('-') else x} ** {y})")

    return translate


operation("pow", "ipow")(_power(reflected=False))
operation("rpow")(_power(reflected=True))


def _division(reflected: bool) -> Translation:
    def translate(
        at: Lowering, node: Node, input: Any, other: Any, *, rounding_mode: str | None = None
    ) -> Placed:
        (x, y), placed = operands(at, (other, input) if reflected else (input, other))
        if rounding_mode != "trunc":
            return placed.with_text(f"({x} {'//' if rounding_mode else '/'} {y})")
        if node.result.dtype.is_floating_point:
            return placed.with_text(f"jnp.trunc({x} / {y})")
        return placed.with_text(f"(({x} - jnp.fmod({x}, {y})) // {y})")

    return translate


operation("div", "true_divide", "divide", "truediv", "itruediv", "idiv")(_division(reflected=False))
operation("rdiv", "rtruediv")(_division(reflected=True))


@operation("where")
def where(at: Lowering, node: Node, condition: Value, input: Any = None, other: Any = None) -> Placed:
    if input is None:
        raise RefusedError(
            "torch.where with one argument gives an output whose shape depends on values; use its three arguments"
        )
    texts, placed = operands(at, [condition, input, other])
    return placed.with_text(f"jnp.where({', '.join(texts)})")


@operation("Tensor.where")
def where_method(at: Lowering, node: Node, input: Value, condition: Value, other: Any) -> Placed:
    return where(at, node, condition, input, other)


@operation("lerp")
def lerp(at: Lowering, node: Node, input: Value, end: Value, weight: Any) -> Placed:
    (x, y, w), placed = operands(at, [input, end, weight])
    return placed.with_text(f"({x} + {w} * ({y} - {x}))")


@operation("addcmul")
def addcmul(
    at: Lowering, node: Node, input: Value, tensor1: Value, tensor2: Value, *, value: Any = 1
) -> Placed:
    (x, y, z), placed = operands(at, [input, tensor1, tensor2])
    return placed.with_text(f"({x} + {'' if value == 1 else f'{at.number(value)} * '}{y} * {z})")


@operation("addcdiv")
def addcdiv(
    at: Lowering, node: Node, input: Value, tensor1: Value, tensor2: Value, *, value: Any = 1
) -> Placed:
    (x, y, z), placed = operands(at, [input, tensor1, tensor2])
    return placed.with_text(f"({x} + {'' if value == 1 else f'{at.number(value)} * '}{y} / {z})")


@operation("isclose")
def isclose(
    at: Lowering,
    node: Node,
    input: Value,
    other: Value,
    rtol: float = 1e-5,
    atol: float = 1e-8,
    equal_nan: bool = False,
) -> Placed:
    (x, y), placed = operands(at, [input, other])
    return placed.with_text(f"jnp.isclose({x}, {y}, {rtol!r}, {atol!r}, {equal_nan!r})")


# --- the same value -----------------------------------------------------------------------------------------


@operation("contiguous", "clone", "alias", "positive", "pos", "resolve_conj", "resolve_neg")
def same(at: Lowering, node: Node, input: Value, *, memory_format: Any = None) -> Placed:
    return at.at(input)


@operation("detach", "data")
def detached(at: Lowering, node: Node, input: Value) -> Placed:
    placed = at.at(input)
    if not input.varies or input.dtype is None or not input.dtype.is_floating_point:
        return placed
    return placed.with_text(f"jax.lax.stop_gradient({placed.text})")


@operation("pin_memory", "requires_grad", "cuda", "cpu", "identity")
def moved(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
    return at.at(input)


@operation("to", "float", "half", "bfloat16", "double", "long", "int", "bool", "short", "char", "byte")
@operation("type", "type_as")
def cast(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
    placed = at.at(input)
    if node.result.dtype == input.dtype:
        return placed
    if input.dtype is not None and input.dtype.is_complex and not node.result.dtype.is_complex:
        raise RefusedError(f"{node.function} of a complex tensor; use .real")
    wanted = at.number(node.result.dtype)
    if wanted == at.number(input.dtype):  # 64 bits are 32
        return placed
    return placed.with_text(f"{placed.text}.astype({wanted})")


@operation("copy")
def copy_values(at: Lowering, node: Node, input: Value, other: Value, non_blocking: bool = False) -> Placed:
    (x, y), placed = operands(at, [input, other])
    if input.shape == other.shape:
        return placed.with_text(y)
    return placed.with_text(f"jnp.broadcast_to({y}, {x}.shape)")
