"""What an expression of the author's makes of a tensor, read and not run: a constant, draws, or a regular table.

Knows torch's factories, arithmetic with numbers, and the functions of ``torch.nn.init``. What it does not know is
None, never a guess.
"""

import ast
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from ._author_init import bound_arguments
from ._author_numbers import Number, Numbers, combined

__all__ = ["Reading", "expression", "initializer", "written_in_place"]

_ZERO, _ONE = Number.of(0.0), Number.of(1.0)
_SAME_VALUES = {
    "view",
    "reshape",
    "unsqueeze",
    "squeeze",
    "flatten",
    "contiguous",
    "clone",
    "detach",
    "float",
}
_SAME_VALUES |= {"double", "requires_grad_", "to"}
_MOVED_VALUES = {"permute", "transpose", "t", "T", "mT"}  # draws do not mind
_REPEATED = {"expand", "repeat", "expand_as", "tile"}  # nor do equal values
_OF_SHAPES = {"zeros": 0.0, "ones": 1.0}
_LISTED = 16  # numbers of ``torch.tensor([...])``
_OPERATIONS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_OF_NUMBERS = {"log": math.log, "exp": math.exp, "sqrt": math.sqrt}
_FAR = 8.0  # standard deviations, which no draw of float32 reaches


@dataclass(frozen=True)
class Reading:
    """How the values of a tensor are made.

    Attributes:
        kind: ``empty``, ``full``, ``normal``, ``uniform``, ``truncated``, ``scaled`` (by its fans), ``orthogonal``,
            or ``made`` (by an expression of JAX).
        numbers: The numbers that it takes, by their names.
        words: Those of ``scaled``: which fan, and which distribution; the expression of ``made``.
        shape: That of ``made``.
    """

    kind: str
    numbers: Mapping[str, Number] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()

    def affine(self, operation: str, number: Number, *, number_first: bool = False) -> "Reading | None":
        """The values after an operation with a number."""
        if operation in "+-" and self.kind in ("full", "normal", "uniform", "truncated", "made"):
            if operation == "-" and number_first:
                flipped = self.affine("*", Number.of(-1.0))
                return flipped and flipped.affine("+", number)
            moved = {"full": ("value",), "uniform": ("low", "high"), "made": ("offset",)}.get(
                self.kind, ("mean",)
            )
            return self._changed(moved, operation, number)
        if operation == "/" and number_first and self.kind == "full" and self.numbers["value"].value:
            return replace(self, numbers={"value": combined(number, "/", self.numbers["value"])})
        if operation not in "*/" or (operation == "/" and (number_first or not number.value)):
            return None
        if self.kind in ("full", "made"):
            names = ("value",) if self.kind == "full" else ("scale", "offset")
            return self._changed(names, operation, number, first=number_first)
        if number.value < 0:
            return self._flipped(operation, number) if self.kind in ("normal", "uniform") else None
        if self.kind in ("normal", "truncated"):
            return self._changed(("std", "mean"), operation, number, first=number_first)
        if self.kind == "uniform":
            return self._changed(("low", "high"), operation, number, first=number_first)
        return None

    def _changed(
        self, names: tuple[str, ...], operation: str, number: Number, *, first: bool = False
    ) -> "Reading":
        changed = {
            name: self.numbers[name]
            if self.numbers[name] == _ZERO and operation in "*/"
            else combined(number, operation, self.numbers[name])
            if first
            else combined(self.numbers[name], operation, number)
            for name in names
        }
        return replace(self, numbers={**self.numbers, **changed})

    def _flipped(self, operation: str, number: Number) -> "Reading":
        opposite = replace(
            number, value=-number.value, written=f"-({number.written})" if number.written else ""
        )
        made = self._changed(tuple(self.numbers), operation, opposite)
        if self.kind == "uniform":
            low, high = (combined(_ZERO, "-", made.numbers[name]) for name in ("high", "low"))
            return replace(made, numbers={"low": low, "high": high})
        mean = made.numbers["mean"]
        return replace(
            made, numbers={**made.numbers, "mean": mean if mean == _ZERO else combined(_ZERO, "-", mean)}
        )

    def mapped(self, function: Callable[[float], float]) -> "Reading | None":
        """A constant after a function of numbers."""
        if self.kind != "full":
            return None
        try:
            return _full(Number.of(function(self.numbers["value"].value)))
        except (ValueError, ArithmeticError):
            return None


_EMPTY = Reading("empty")


def _full(value: Number) -> Reading:
    return Reading("full", {"value": value})


def _normal(mean: Number, std: Number) -> Reading:
    return Reading("normal", {"mean": mean, "std": std})


def _made(text: str, *shape: int) -> Reading:
    return Reading("made", {"scale": _ONE, "offset": _ZERO}, (text,), shape)


def expression(node: ast.expr, numbers: Numbers) -> Reading | None:
    """What an expression makes."""
    match node:
        case ast.Name(id=name) if name in numbers.settled and numbers.loads[name] == 1:
            return expression(numbers.settled[name], numbers)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            made = expression(inner, numbers)
            return made and made.affine("*", Number.of(-1.0))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            for tensor, other, is_first in ((left, right, False), (right, left, True)):
                number = numbers.number(other)
                made = expression(tensor, numbers) if number is not None else None
                if made is not None and number is not None:
                    return made.affine(_OPERATIONS[type(op)], number, number_first=is_first)
            return None
        case ast.IfExp(test=test, body=body, orelse=orelse):
            held = numbers.truth(test)
            return None if held is None else expression(body if held else orelse, numbers)
        case ast.Attribute(value=inner, attr="data"):
            return expression(inner, numbers)
        case ast.Subscript(value=inner, slice=ast.Constant(value=None)):
            return _with_axes(expression(inner, numbers))
        case ast.Call():
            return _call(node, numbers)
    return None


def _with_axes(made: Reading | None) -> Reading | None:
    """The same values in another shape: what depends on the shape is not known any more."""
    return None if made is None or made.kind in ("scaled", "orthogonal") else made


def _call(node: ast.Call, numbers: Numbers) -> Reading | None:
    function = numbers.resolved(node.func)
    if function is not None:
        name = getattr(function, "__name__", "")
        if getattr(torch, name, None) is function or function is torch.FloatTensor:
            return _factory(name or "FloatTensor", node, numbers)
        if node.args and expression(node.args[0], numbers) is not None:
            return initializer(node, numbers)
        return None
    if not isinstance(node.func, ast.Attribute):
        return None
    method, made = node.func.attr, expression(node.func.value, numbers)
    if made is None:
        return None
    if method == "to" and any(_is_of_integers(numbers.resolved(arg)) for arg in node.args):
        return None
    if method in _SAME_VALUES:
        return _with_axes(made)
    if method in _MOVED_VALUES | _REPEATED:
        kinds = (
            ("full", "empty") if method in _REPEATED else ("full", "empty", "normal", "uniform", "truncated")
        )
        return made if made.kind in kinds else None
    if method in _OF_NUMBERS and not node.args:
        return made.mapped(_OF_NUMBERS[method])
    return written_in_place(method, node, made, numbers)


def _is_of_integers(given: object) -> bool:
    return isinstance(given, torch.dtype) and not given.is_floating_point


def _given(node: ast.Call, numbers: Numbers, *names: str) -> dict[str, Number | None] | None:
    """The numbers that a call is given, None for those that are not known; None if it is given anything else."""
    if len(node.args) > len(names) or any(isinstance(arg, ast.Starred) for arg in node.args):
        return None
    given = dict(zip(names, node.args, strict=False))
    for keyword in node.keywords:
        if keyword.arg not in names:
            return None
        given[keyword.arg] = keyword.value
    return {name: numbers.number(value) for name, value in given.items()}


def written_in_place(method: str, node: ast.Call, before: Reading | None, numbers: Numbers) -> Reading | None:
    """What a method that writes a tensor in place makes of it, such as ``normal_``.

    Args:
        method: Its name.
        node: The call.
        before: What the tensor was.
        numbers: What is known.
    """
    operation = {"mul_": "*", "div_": "/", "add_": "+", "sub_": "-"}.get(method)
    if operation is not None:
        given = _given(node, numbers, "other")
        number = given.get("other") if given else None
        return before.affine(operation, number) if before is not None and number is not None else None
    defaults: dict[str, dict[str, Number]] = {
        "zero_": {},
        "fill_": {"value": _ZERO},
        "normal_": {"mean": _ZERO, "std": _ONE},
        "uniform_": {"from": _ZERO, "to": _ONE},
    }
    names = defaults.get(method)
    given = None if names is None else _given(node, numbers, *names)
    if names is None or given is None or None in given.values():
        return None
    known = {name: given.get(name) or default for name, default in names.items()}
    if method == "normal_":
        return _normal(known["mean"], known["std"])
    if method == "uniform_":
        return Reading("uniform", {"low": known["from"], "high": known["to"]})
    return _full(known["value"] if method == "fill_" and given else _ZERO)


def _factory(name: str, node: ast.Call, numbers: Numbers) -> Reading | None:
    allowed = {None, "size", "dtype", "device", "requires_grad", "layout"}
    words = {k.arg: k.value for k in node.keywords}
    base = name.removesuffix("_like")
    if name.endswith("Tensor"):
        is_size = all(numbers.number(arg) is not None or isinstance(arg, ast.Starred) for arg in node.args)
        return _EMPTY if node.args and is_size and not words else None
    if base in ("zeros", "ones", "empty", "randn", "rand") and set(words) <= allowed:
        if base in _OF_SHAPES:
            return _full(Number.of(_OF_SHAPES[base]))
        made = {"empty": _EMPTY, "randn": _normal(_ZERO, _ONE)}
        return made.get(base) or Reading("uniform", {"low": _ZERO, "high": _ONE})
    if base == "full":
        value = node.args[1] if len(node.args) == 2 else words.get("fill_value")
        number = None if value is None else numbers.number(value)
        return _full(number) if number is not None and set(words) <= {*allowed, "fill_value"} else None
    if name in _OF_NUMBERS and len(node.args) == 1 and not words:
        inner = expression(node.args[0], numbers)
        return inner and inner.mapped(_OF_NUMBERS[name])
    if not set(words) <= allowed - {"size"}:
        return None
    if name == "tensor" and len(node.args) == 1:
        return _listed(node.args[0], numbers)
    found = [numbers.number(arg) for arg in node.args]
    known = [number.value for number in found if number is not None]
    if len(known) != len(found) or not known:
        return None
    if name != "linspace" and not all(type(number) is int for number in known):
        return None
    if name == "eye" and len(known) <= 2:
        return _made(f"jnp.eye({', '.join(map(repr, known))})", *map(int, (known * 2)[:2]))
    if name == "arange" and len(known) <= 3:
        text = ", ".join(map(repr, known))
        return _made(f"jnp.arange({text}, dtype=jnp.float32)", len(torch.arange(*known)))
    if name == "linspace" and len(known) == 3:
        return _made(f"jnp.linspace({known[0]!r}, {known[1]!r}, {known[2]!r})", int(known[2]))
    return None


def _listed(node: ast.expr, numbers: Numbers) -> Reading | None:
    """``torch.tensor(...)`` of a number or a list of numbers."""
    if (number := numbers.number(node)) is not None:
        return _full(number)
    if not isinstance(node, ast.List | ast.Tuple) or not 0 < len(node.elts) <= _LISTED:
        return None
    found = [numbers.number(item) for item in node.elts]
    known = [number for number in found if number is not None]
    if len(known) != len(found):
        return _listed(node.elts[0], numbers) if len(node.elts) == 1 else None
    if len(known) == 1:
        return _full(known[0])
    return _made(f"jnp.asarray({[float(number.value) for number in known]!r})", len(known))


def initializer(node: ast.Call, numbers: Numbers) -> Reading | None:
    """What a function of ``torch.nn.init``, or timm's for truncated draws, makes of its first argument."""
    function = numbers.resolved(node.func)
    name = getattr(function, "__name__", "")
    is_own = getattr(nn.init, name, None) is function
    is_timm = str(getattr(function, "__module__", "")).startswith("timm.") and name.startswith(
        "trunc_normal_"
    )
    if not isinstance(function, types.FunctionType) or not (is_own or is_timm):
        return None
    given = bound_arguments(function, node)
    spread = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
    if spread or "generator" in given:
        return None
    words = {n: v.value for n, v in given.items() if isinstance(v, ast.Constant) and isinstance(v.value, str)}
    known: dict[str, Number] = {}
    for setting, value in list(given.items())[1:]:
        number = numbers.number(value)
        if number is None and setting not in words:
            return None
        if number is not None:
            known[setting] = number
    try:
        return _initialized(name, known, words)
    except (KeyError, ValueError, ArithmeticError):
        return None


def _initialized(name: str, known: Mapping[str, Number], words: Mapping[str, str]) -> Reading | None:
    if name in ("zeros_", "ones_", "constant_"):
        return _full({"zeros_": _ZERO, "ones_": _ONE}.get(name) or known["val"])
    if name == "normal_":
        return _normal(known["mean"], known["std"])
    if name == "uniform_":
        return Reading("uniform", {"low": known["a"], "high": known["b"]})
    if name in ("trunc_normal_", "trunc_normal_tf_"):
        return _truncated(known, in_deviations=name == "trunc_normal_tf_")
    if name == "orthogonal_":
        return Reading("orthogonal", {"scale": known["gain"]})
    if name == "eye_":
        return _made("jnp.eye")  # of the shape of the parameter
    scheme, _, distribution = name.strip("_").partition("_")
    if scheme not in ("xavier", "kaiming") or distribution not in ("uniform", "normal"):
        return None
    if scheme == "xavier":
        gain, fan = known["gain"].value, "fan_avg"
    else:
        curve: Any = words["nonlinearity"]
        gain, fan = nn.init.calculate_gain(curve, known["a"].value), words["mode"]
    squared = float(gain) ** 2
    near = Fraction(squared).limit_denominator(64)
    squared = float(near) if math.isclose(near, squared, rel_tol=1e-12) else squared
    return Reading("scaled", {"scale": Number.of(squared)}, (fan, distribution))


def _truncated(known: Mapping[str, Number], *, in_deviations: bool) -> Reading | None:
    """Draws between two bounds, which torch takes in numbers and not in standard deviations."""
    mean, std = known["mean"], known["std"]
    if std.value <= 0:
        return None
    if in_deviations:
        lower, upper = known["a"], known["b"]
    else:
        lower, upper = (
            Number.of((bound.value - mean.value) / std.value) for bound in (known["a"], known["b"])
        )
    if lower.value <= -_FAR and upper.value >= _FAR:
        return _normal(mean, std)
    return Reading("truncated", {"mean": mean, "std": std, "lower": lower, "upper": upper})
