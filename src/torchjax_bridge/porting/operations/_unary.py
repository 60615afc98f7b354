"""Functions of one tensor that work on each element. The layout stays."""

from functools import cache
from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError
from ._operands import aligned, operands
from ._table import Translation, operation

__all__: list[str] = []


_UNARY: dict[str, str] = {}


def _add(template: str, names: str) -> None:
    """The template of names, in which a name stands for itself where it is ``{name}``."""
    _UNARY.update({name: template.replace("{name}", name) for name in names.split()})


_add("nnx.{name}({0})", "relu silu sigmoid tanh relu6 selu")
_add(
    "jnp.{name}({0})",
    "exp exp2 expm1 log log2 log10 log1p sqrt square sign sin cos tan sinh cosh floor ceil",
)
_add(
    "jnp.{name}({0})",
    "trunc isnan isinf isfinite isposinf isneginf isreal signbit logical_not deg2rad rad2deg",
)
_add("jnp.{name}({0})", "arcsin arccos arctan arcsinh arccosh arctanh real sinc i0 angle")
_add("jax.lax.{name}({0})", "erf erfc lgamma digamma rsqrt")
_add("nnx.log_sigmoid({0})", "logsigmoid")
_add("nnx.hard_swish({0})", "hardswish")
_add("nnx.hard_sigmoid({0})", "hardsigmoid")
_add("jax.nn.mish({0})", "mish")
_add("nnx.soft_sign({0})", "softsign")
_add("({0} - jnp.tanh({0}))", "tanhshrink")
_add("({0} - jnp.trunc({0}))", "frac")
_add("jax.lax.erf_inv({0})", "erfinv")
_add("(1 / {0})", "reciprocal")
_add("(-{0})", "neg negative")
_add("(~{0})", "invert bitwise_not")
_ALIASES = {
    "sgn": "sign",
    "fix": "trunc",
    "special.expit": "sigmoid",
    "special.gammaln": "lgamma",
}
_ALIASES |= {f"a{name}": f"arc{name}" for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")}
_ALIASES |= {f"special.{name}": name for name in ("exp2", "expm1", "log1p", "sinc", "i0")}
_ALIASES |= {f"special.{name}": name for name in ("erf", "erfc", "erfinv", "digamma")}
_UNARY |= {alias: _UNARY[name] for alias, name in _ALIASES.items()}
_UNARY["special.psi"] = _UNARY["digamma"]
for _name in ("entr", "i0e", "i1", "i1e", "ndtr", "ndtri", "log_ndtr"):
    _UNARY[f"special.{_name}"] = f"jax.scipy.special.{_name}({{0}})"


@cache
def _unary(template: str) -> Translation:
    def translate(at: Lowering, node: Node, input: Value) -> Placed:
        placed = at.at(input)
        return placed.with_text(template.format(_as_float(at, node, input, placed.text)))

    return translate


def _with_inplace(template: str) -> Translation:
    def translate(at: Lowering, node: Node, input: Value, inplace: bool = False) -> Placed:
        placed = at.at(input)
        return placed.with_text(template.format(_as_float(at, node, input, placed.text)))

    return translate


def _as_float(at: Lowering, node: Node, input: Value, text: str) -> str:
    """The input in the dtype of the result, where integers become floats."""
    if node.result.dtype.is_floating_point and not (input.dtype is None or input.dtype.is_floating_point):
        return text if input.dtype.is_complex else f"{text}.astype({at.number(node.result.dtype)})"
    return text


@operation("abs", "absolute")
def absolute(at: Lowering, node: Node, input: Value) -> Placed:
    placed = at.at(input)
    if input.dtype is None or not input.dtype.is_floating_point:
        return placed.with_text(f"jnp.abs({placed.text})")
    at.body.helpers.add("absolute")
    return placed.with_text(f"absolute({placed.text})")


_INPLACE = ("relu", "silu", "relu6", "selu", "hardswish", "hardsigmoid", "mish")
for _name, _template in _UNARY.items():
    operation(_name)((_with_inplace if _name in _INPLACE else _unary)(_template))


def _with_settings(template: str, helper: str = "", **defaults: Any) -> Translation:
    names = list(defaults)

    def translate(at: Lowering, node: Node, input: Value, *args: Any, **kwargs: Any) -> Placed:
        kwargs.pop("inplace", None)
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if given.keys() - set(names) or len(args) > len(names) + 1:
            raise RefusedError(f"{node.function} is called with arguments that have no translation")
        if any(isinstance(setting, Value) for setting in given.values()):
            raise RefusedError(f"{node.function} with a tensor as a setting; pass a number")
        placed = at.at(input)
        at.body.helpers |= {helper} if helper else set()
        return placed.with_text(template.format(placed.text, **{n: at.number(given[n]) for n in names}))

    return translate


for _name, _template, _defaults in (
    ("elu", "nnx.elu({}, {alpha})", {"alpha": 1.0}),
    ("celu", "nnx.celu({}, {alpha})", {"alpha": 1.0}),
    ("leaky_relu", "leaky_relu({}, {negative_slope})", {"helper": "leaky_relu", "negative_slope": 0.01}),
    ("hardtanh", "jax.lax.clamp({min_val}, {}, {max_val})", {"min_val": -1.0, "max_val": 1.0}),
    ("hardshrink", "jnp.where(jnp.abs({0}) <= {lambd}, 0, {0})", {"lambd": 0.5}),
    ("softshrink", "jnp.where(jnp.abs({0}) <= {lambd}, 0, {0} - {lambd} * jnp.sign({0}))", {"lambd": 0.5}),
    ("threshold", "jnp.where({0} <= {threshold}, {value}, {0})", {"threshold": 0.0, "value": 0.0}),
):
    operation(_name)(_with_settings(_template, **_defaults))


@operation("softplus")
def softplus(at: Lowering, node: Node, input: Value, beta: Any = 1, threshold: Any = 20) -> Placed:
    placed = at.at(input)
    x = placed.text if beta == 1 else f"({placed.text} * {at.number(beta)})"
    text = f"nnx.softplus({x})" if beta == 1 else f"(nnx.softplus({x}) / {at.number(beta)})"
    if threshold != 20:  # beyond 20, both are the input to the last bit
        text = f"jnp.where({x} > {at.number(threshold)}, {placed.text}, {text})"
    return placed.with_text(text)


@operation("gelu")
def gelu(at: Lowering, node: Node, input: Value, approximate: str = "none") -> Placed:
    placed = at.at(input)
    return placed.with_text(f"nnx.gelu({placed.text}, approximate={approximate == 'tanh'})")


@operation("round", "special.round")
def round_(at: Lowering, node: Node, input: Value, *, decimals: Any = 0) -> Placed:
    placed = at.at(input)
    return placed.with_text(f"jnp.round({placed.text}{'' if decimals == 0 else f', {at.number(decimals)}'})")


@operation("nan_to_num")
def nan_to_num(
    at: Lowering, node: Node, input: Value, nan: Any = None, posinf: Any = None, neginf: Any = None
) -> Placed:
    placed = at.at(input)
    settings = {"nan": nan, "posinf": posinf, "neginf": neginf}
    text = "".join(f", {name}={at.number(to)}" for name, to in settings.items() if to is not None)
    return placed.with_text(f"jnp.nan_to_num({placed.text}{text})")


@operation("logit", "special.logit")
def logit(at: Lowering, node: Node, input: Value, eps: Any = None) -> Placed:
    placed = at.at(input)
    x = placed.text if eps is None else f"jnp.clip({placed.text}, {at.number(eps)}, 1 - {at.number(eps)})"
    return placed.with_text(f"jax.scipy.special.logit({x})")


@operation("clamp", "clip", "clamp_min", "clamp_max")
def clamp(at: Lowering, node: Node, input: Value, min: Any = None, max: Any = None) -> Placed:
    if node.function.rstrip("_").endswith("clamp_max"):
        min, max = None, (min if max is None else max)
    texts, placed = operands(at, [input, *(bound for bound in (min, max) if bound is not None)])
    bounds = iter(texts[1:])
    low, high = (next(bounds) if bound is not None else "None" for bound in (min, max))
    at.body.helpers.add("clamp")
    both = f", {high}" if high != "None" else ""
    return placed.with_text(f"clamp({texts[0]}, {low}{both})")


@operation("prelu")
def prelu(at: Lowering, node: Node, input: Value, weight: Value) -> Placed:
    placed = at.at(input)
    scale = at.read(weight)
    if len(weight.shape) == 1 and weight.shape[0] > 1 and placed.rank > 1:
        placed = at.in_torch_map_order(input)
        behind = placed.rank - 1 - placed.place(1)
        scale += f"[:{', None' * behind}]" if behind else ""
    elif weight.shape:
        scale += ".reshape(())"
    return placed.with_text(f"jnp.where({placed.text} > 0, {placed.text}, {scale} * {placed.text})")


@operation("masked_fill")
def masked_fill(at: Lowering, node: Node, input: Value, mask: Value, value: Any) -> Placed:
    (x, m), placed = operands(at, [input, mask])
    fill = aligned(at, value, placed.order) if isinstance(value, Value) else at.number(value)
    return placed.with_text(f"jnp.where({m}, {fill}, {x})")
