"""Functions that work on each element give what torch gives, in every layout and for every dtype."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from .driver import Case, as_jax, check, check_all, lowered, reasons, run, tensor

X = tensor(3, 3, 3)
Y = tensor(3, 3, 3) * 1.5 + 0.25
HALF = tensor(3, 3, 3, dtype=torch.bfloat16)
INTS = tensor(3, 3, 3, dtype=torch.int64)
NATURALS = tensor(3, 3, 3, dtype=torch.int64, low=1)
SMALL = tensor(3, 3, 3, dtype=torch.int8)
BYTES = tensor(3, 3, 3, dtype=torch.uint8, high=255)
BOOLS = tensor(3, 3, 3, dtype=torch.bool)
DTYPES = {"float": X, "half": HALF, "ints": INTS, "small": SMALL, "bytes": BYTES, "bools": BOOLS}


def _function(name: str) -> Callable[..., Any]:
    space, _, last = name.rpartition(".")
    if space:
        return getattr({"special": torch.special, "Tensor": torch.Tensor, "F": F}[space], last)
    return next(getattr(module, name) for module in (torch, F, torch.Tensor) if hasattr(module, name))


_UNARY = """
    relu silu sigmoid tanh relu6 selu exp exp2 expm1 square sign sin cos tan sinh cosh floor ceil trunc isnan isinf
    isfinite isposinf isneginf isreal signbit arctan arcsinh deg2rad rad2deg real sinc i0 erf erfc sgn logsigmoid abs
    absolute fix atan asinh hardswish hardsigmoid mish softsign tanhshrink frac neg negative round positive contiguous
    clone detach nan_to_num elu celu leaky_relu hardtanh hardshrink softshrink softplus gelu angle resolve_conj
    resolve_neg logical_not special.exp2 special.expm1 special.sinc special.i0 special.erf special.erfc special.i0e
    special.i1 special.i1e special.ndtr special.log_ndtr special.expit special.round
"""
_POSITIVE = """
    log log2 log10 log1p sqrt rsqrt lgamma digamma reciprocal special.log1p special.gammaln special.psi special.entr
    special.digamma
"""
_WITHIN = "arcsin arccos arctanh asin acos atanh erfinv logit special.logit special.erfinv special.ndtri"
_BINARY = """
    add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow eq ne not_equal lt less gt
    greater le less_equal ge greater_equal maximum minimum fmax fmin arctan2 atan2 logical_and logical_or logical_xor
    hypot logaddexp logaddexp2 copysign heaviside xlogy special.xlogy special.xlog1py float_power rsub isclose
    max min nextafter
"""
_OF_INTS = "bitwise_and bitwise_or bitwise_xor gcd lcm add mul sub eq maximum true_divide floor_divide remainder fmod"
_OPERATORS = "add sub mul truediv floordiv mod pow eq ne lt gt le ge"
_BIT_OPERATORS = "and_ or_ xor lshift rshift add sub mul floordiv mod"


def _refl(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: getattr(operator, name)(3, x)


def _scalar(name: str, number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: getattr(operator, name)(x, number)


def _written(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda x, y: getattr(operator, f"i{name.rstrip('_')}")(x.clone(), y)


def _part(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y.copy_(x)
    return y + y.zero_() + y.fill_(2)


CASES = [
    *(Case(name, _function(name), (X,)) for name in _UNARY.split()),
    *(Case(name, _function(name), (X.abs() + 0.1,)) for name in _POSITIVE.split()),
    *(
        Case(name, _function(name), (X.tanh() / 2 + 0.5 if "log" in name or "ndtri" in name else X.tanh(),))
        for name in _WITHIN.split()
    ),
    Case("acosh", torch.acosh, (X.abs() + 1.5,)),
    Case("arccosh", torch.arccosh, (X.abs() + 1.5,)),
    *(
        Case(f"{name} of integers", _function(name), (INTS,))
        for name in [
            "relu",
            "sqrt",
            "exp",
            "sigmoid",
            "abs",
            "neg",
            "sign",
            "square",
            "tanh",
            "floor",
            "round",
            "log1p",
            "isnan",
            "trunc",
            "erf",
        ]
    ),
    *(
        Case(f"{name} of bfloat16", _function(name), (HALF,))
        for name in ["relu", "exp", "gelu", "silu", "sqrt", "erf"]
    ),
    Case("invert", operator.invert, (INTS,)),
    Case("bitwise_not", torch.bitwise_not, (BOOLS,)),
    *(
        Case(f"{name}_", lambda x, name=name: getattr(x.clone(), f"{name}_")(), (X,))
        for name in ["relu", "sigmoid", "tanh", "exp", "neg", "abs", "clamp_min", "square", "floor"]
        if name != "clamp_min"
    ),
    *(
        Case(f"{name} in place", lambda x, name=name: getattr(F, name)(x.clone(), inplace=True), (X,))
        for name in [
            "relu",
            "silu",
            "relu6",
            "selu",
            "hardswish",
            "hardsigmoid",
            "mish",
            "elu",
            "celu",
            "leaky_relu",
            "hardtanh",
        ]
    ),
    *(
        Case(name, _function(name), (X, Y))
        for name in _BINARY.split()
        if name not in ("pow", "xlogy", "nextafter")
    ),
    *(
        Case(f"{name} of positive numbers", _function(name), (X.abs(), Y.abs() + 0.2))
        for name in (
            "pow",
            "xlogy",
            "special.xlogy",
            "igamma",
            "igammac",
            "special.gammainc",
            "special.gammaincc",
        )
    ),
    Case("nextafter", torch.nextafter, (X, Y)),
    Case("ldexp", torch.ldexp, (X, SMALL)),
    *(Case(f"{name} of integers", _function(name), (INTS, NATURALS)) for name in _OF_INTS.split()),
    *(
        Case(f"{name} of several shapes", _function(name), lambda n: (tensor(n, 1, 3, 4), tensor(5, 1, 4)))
        for name in ("add", "sub", "mul", "maximum", "where_")[:4]
    ),
    Case("add of fewer axes", torch.add, lambda n: (tensor(n, 3, 4, 5), tensor(3, 1, 1))),
    Case("add of one axis", torch.add, lambda n: (tensor(n, 3, 4), tensor(4))),
    Case("add of one element", torch.add, (X, tensor(1))),
    Case("add of an axis of the batch", torch.mul, lambda n: (tensor(n, 3, 4, 5), tensor(n, 1, 1, 1))),
    Case("the batch as the axis of fewer", torch.mul, lambda n: (tensor(3, 4, n), tensor(n))),
    Case("alpha", lambda x, y: torch.add(x, y, alpha=3) - torch.sub(x, y, alpha=0.5), (X, Y)),
    Case("rsub with alpha", lambda x, y: torch.rsub(x, y, alpha=2), (X, Y)),
    *(
        Case(f"operator.{name}", getattr(operator, name), (X, Y))
        for name in _OPERATORS.split()
        if name != "pow"
    ),
    *(
        Case(f"operator.{name} of integers", getattr(operator, name), (INTS, NATURALS))
        for name in _BIT_OPERATORS.split()
    ),
    *(
        Case(f"operator.{name} reflected", _refl(name), (NATURALS,))
        for name in (*_BIT_OPERATORS.split(), "pow", "truediv")
    ),
    *(
        Case(f"operator.{name} reflected, floats", _refl(name), (Y,))
        for name in ["add", "sub", "mul", "truediv", "pow", "mod"]
    ),
    *(
        Case(f"operator.i{name}", _written(name), (X, Y))
        for name in ["add", "sub", "mul", "truediv", "floordiv", "mod"]
    ),
    *(
        Case(f"operator.i{name} of integers", _written(name), (INTS, NATURALS))
        for name in _BIT_OPERATORS.split()
    ),
    Case("operator.ipow", lambda x: operator.ipow(x.clone(), 3), (X,)),
    *(
        Case(f"{name} of {kind} and {number}", _scalar(name, number), (given,))
        for kind, given in DTYPES.items()
        for number in (2, 0.5)
        for name in ("add", "mul", "truediv", *(("pow",) if kind != "bools" else ()))
    ),
    *(
        Case(f"{a} and {b} {name}", getattr(operator, name), (DTYPES[a], DTYPES[b]))
        for a in DTYPES
        for b in DTYPES
        if a != b
        for name in ("add", "truediv")
    ),
    *(
        Case(f"{a} and a single {b}", operator.mul, (DTYPES[a], DTYPES[b][0, 0, 0]))
        for a in DTYPES
        for b in DTYPES
    ),
    Case("floor_divide rounds down", torch.floor_divide, (INTS, NATURALS - 7)),
    Case("remainder has the sign of the divisor", torch.remainder, (INTS, NATURALS - 7)),
    Case("remainder of floats", torch.remainder, (X, Y)),
    Case("fmod has the sign of the dividend", torch.fmod, (INTS, NATURALS - 7)),
    *(
        Case(f"div rounds {mode}", lambda x, y, mode=mode: torch.div(x, y, rounding_mode=mode), pair)
        for mode in ("floor", "trunc")
        for pair in ((X, Y), (INTS, NATURALS - 7))
    ),
    Case(
        "trunc of large integers", lambda x: torch.div(x, 3, rounding_mode="trunc"), (INTS * 123456789 + 1,)
    ),
    Case("a negative base", lambda x: (-2) ** x, (NATURALS,)),
    Case("uint8 wraps", lambda x: x * x + x, (BYTES,)),
    Case("int8 wraps", lambda x: x * x * x, (SMALL,)),
    Case("round to even", torch.round, (torch.tensor([[-2.5, -0.5, 0.5], [1.5, 2.5, 3.5]]),)),
    Case("round to decimals", lambda x: torch.round(x, decimals=1), (X,)),
    Case("clamp", lambda x: torch.clamp(x, -0.5, 0.5), (X,)),
    Case("clip", lambda x: x.clip(max=0.25), (X,)),
    Case("clamp of integers by a float", lambda x: torch.clamp(x, min=0.5), (INTS,)),
    Case("clamp of integers", lambda x: x.clamp(-1, 2), (INTS,)),
    Case("clamp whose bounds cross", lambda x: x.clamp(1, -1), (X,)),
    Case("clamp_min and clamp_max", lambda x: x.clamp_min(-0.5).clamp_max(0.5), (X,)),
    Case("clamp_ by name", lambda x: torch.clamp_max(x, max=0.5) + x.clone().clamp_(min=0), (X,)),
    Case(
        "clamp by tensors",
        lambda x, low, high: torch.clamp(x, low, high),
        (X, -tensor(3, 1).abs(), tensor(3).abs()),
    ),
    Case("clamp by one tensor", lambda x, high: torch.clamp(x, max=high), (X, tensor(3))),
    Case("where", torch.where, (BOOLS, X, Y)),
    Case("where with numbers", lambda m, x: torch.where(m, x, 0.0) + torch.where(m, 1.0, 0.0), (BOOLS, X)),
    Case("where of integers", lambda m: torch.where(m, 1, 0) + 1, (BOOLS,)),
    Case("where broadcasts", torch.where, (tensor(3, 1, dtype=torch.bool), X, tensor(3))),
    Case("Tensor.where", lambda x, m, y: x.where(m, y), (X, BOOLS, Y)),
    Case(
        "masked_fill",
        lambda x, m: x.masked_fill(m, -torch.inf).clamp_min(-9),
        (X, tensor(3, 1, dtype=torch.bool)),
    ),
    Case("masked_fill by a tensor", lambda x, m, v: x.masked_fill(m, v), (X, BOOLS, tensor())),
    Case("lerp", lambda x, y: torch.lerp(x, y, 0.3) + torch.lerp(x, y, x), (X, Y)),
    Case(
        "addcmul and addcdiv",
        lambda x, y, z: torch.addcmul(x, y, z, value=0.5) + torch.addcdiv(x, y, z),
        (X, X, Y + 9),
    ),
    Case("isclose", lambda x: torch.isclose(x, x + 1e-6, rtol=1e-7), (X,)),
    *(
        Case(f"gelu {kind}", lambda x, kind=kind: F.gelu(x, approximate=kind), (X,))
        for kind in ("tanh", "none")
    ),
    Case(
        "settings by position",
        lambda x: F.elu(x, 0.5) + F.leaky_relu(x, 0.2) + F.hardtanh(x, -0.5, 2.0),
        (X,),
    ),
    Case(
        "settings by name",
        lambda x: F.celu(x, alpha=0.5) + F.softshrink(x, lambd=0.2) + F.hardshrink(x, 0.1),
        (X,),
    ),
    Case("threshold", lambda x: F.threshold(x, 0.5, 3.0) + F.threshold(x, threshold=-0.5, value=2.0), (X,)),
    Case(
        "softplus with settings",
        lambda x: F.softplus(x, 2.0) + F.softplus(x, 1, 0.5) + F.softplus(x, beta=3, threshold=1),
        (X,),
    ),
    Case("nan_to_num with settings", lambda x: torch.nan_to_num(x.log(), 7.0, neginf=-3.0), (X.round(),)),
    Case("logit with eps", lambda x: torch.logit(x, eps=0.1), (X,)),
    Case("prelu", F.prelu, (X, tensor(3).abs())),
    Case("prelu of one slope", torch.prelu, (X, tensor(1).abs())),
    Case("rrelu", F.rrelu, (X,)),
    *(
        Case(name, lambda x, name=name: getattr(x, name)(), (X,))
        for name in ["half", "bfloat16", "double", "long", "int", "short", "bool", "float"]
    ),
    *(
        Case(f"{name} of bytes", lambda x, name=name: getattr(x, name)(), (BYTES,))
        for name in ["char", "byte", "cpu", "data"]
        if name != "data"
    ),
    Case("to", lambda x, y: x.to(torch.bfloat16) + x.to("cpu", torch.bfloat16) + x.to(y), (X, HALF)),
    Case("type", lambda x, y: x.type(torch.int32) + x.type_as(y), (X, INTS)),
    Case("data", lambda x: x.data, (X,)),
    Case("real", lambda x: x.real, (X,)),
    Case("copy_, zero_ and fill_", _part, (X, Y)),
    Case("copy_ broadcasts", lambda x, y: y.clone().copy_(x), lambda n: (tensor(3, 1), tensor(n, 3, 4))),
    Case("copy_ casts", lambda x, y: y.clone().copy_(x), (X, INTS)),
    Case("copy_ into an empty tensor", lambda x: torch.empty(3, 3, 3).copy_(x) + 1, (X,)),
]


def test_a_function_of_elements() -> None:
    check_all(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_function_of_elements_in_more_orders(case: Case) -> None:
    check(case, turns=4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: torch.where(x > 0), "depends on values; use its three arguments"),
        (torch.frexp, "no translation of torch.frexp"),
        (lambda x: x.map_(x, lambda a, b: a), "hands a tensor to Python"),
    ],
)
def test_what_has_no_translation_is_refused_with_a_way_out(call: Callable[..., Any], words: str) -> None:
    assert words in reasons(call, X)


SPECIAL = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 100.0, -100.0, 0.5])
# jnp gives NaN where torch gives 0, or infinity at a pole: nothing is hidden.
_OTHERWISE = "sign sgn angle digamma special.psi special.digamma"


def _hard(x: torch.Tensor) -> torch.Tensor:
    return F.threshold(x, 0.5, 20.0) + F.hardshrink(x, 0.2) + F.softshrink(x, 0.2)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize(
    "function",
    [_hard, *(_function(n) for n in (_UNARY + _POSITIVE).split() if n not in _OTHERWISE.split())],
    ids=lambda function: function.__name__,
)
def test_what_is_no_finite_number_gives_what_torch_gives(function: Callable[..., Any]) -> None:
    _, body = lowered(function, (SPECIAL,), [(0,)])
    (found,) = run(body, [as_jax(SPECIAL, (0,))])
    with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's gelu of infinity is NaN on some processors
        wanted = function(SPECIAL)
    np.testing.assert_allclose(np.asarray(found, wanted.numpy().dtype), wanted.numpy(), rtol=1e-4, atol=1e-6)
