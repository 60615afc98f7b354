"""Numbers that remember where they came from: a size of a tensor, an attribute of a module, arithmetic on these.

torch code computes with plain ``int``s and ``float``s. A `Dim` is an ``int`` and a `Real` a ``float``, so the
code runs unchanged, and afterwards ``x.view(n, c // 2, -1)`` is known to have been called with ``c // 2`` and
not with ``32``.
Conversions to plain numbers (``int(dim)``, ``math.sqrt(dim)``) forget the origin; the value stays right.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._frames import Value

__all__ = ["Argument", "Attribute", "Dim", "Expression", "Number", "Operation", "Output", "Real", "SizeOf"]


@dataclass(frozen=True)
class SizeOf:
    """``value.shape[axis]``, in torch's order of axes."""

    value: "Value"
    axis: int


@dataclass(frozen=True)
class Attribute:
    """A number among the attributes of a module: ``self.groups``, or ``self.window[0]`` with an index."""

    path: str
    name: str
    index: int | None = None


@dataclass(frozen=True)
class Argument:
    """A number that was passed to ``forward``; ``name`` may carry an index, as in ``"size[0]"``."""

    name: str


@dataclass(frozen=True)
class Output:
    """A number that a module returned."""

    value: "Value"


@dataclass(frozen=True)
class Operation:
    """Arithmetic of two numbers; ``symbol`` is Python's own operator."""

    symbol: str
    left: "Expression"
    right: "Expression"


Expression = SizeOf | Attribute | Argument | Output | Operation | int | float


def expression_of(number: Any) -> Expression:
    """The origin of a number; a plain number is its own."""
    return number.expression if isinstance(number, Dim | Real) else number


def depends_on_sizes(expression: Expression) -> bool:
    """Whether an expression depends on the shape of a value, and not on settings alone."""
    if isinstance(expression, Operation):
        return depends_on_sizes(expression.left) or depends_on_sizes(expression.right)
    return isinstance(expression, SizeOf | Argument | Output)


# Called with (left, symbol, right, outcome) for each comparison that involves a size.
Listener = Callable[[Any, str, Any, bool], None]
_listeners: list[Listener] = []


class Dim(int):
    """An ``int`` that remembers its origin."""

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> "Dim":
        """An int of this value."""
        self = super().__new__(cls, value)
        self.expression = expression
        return self

    __hash__ = int.__hash__

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __bool__(self) -> bool:
        _compared(self, "!=", 0, int(self) != 0)
        return int(self) != 0


class Real(float):
    """A ``float`` that remembers its origin."""

    expression: Expression

    def __new__(cls, value: float, expression: Expression) -> "Real":
        """A float of this value."""
        self = super().__new__(cls, value)
        self.expression = expression
        return self

    __hash__ = float.__hash__

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


Number = Dim | Real | int | float


def is_size(item: Any) -> bool:
    """Whether something is a number that depends on the shape of a value."""
    return isinstance(item, Dim | Real) and depends_on_sizes(item.expression)


def with_origin(value: int | float, expression: Expression) -> Dim | Real:
    """The number with its origin."""
    return Dim(value, expression) if isinstance(value, int) else Real(value, expression)


def _plain(number: Any) -> Any:
    if isinstance(number, Dim):
        return int(number)
    return float(number) if isinstance(number, Real) else number


def _compared(left: Any, symbol: str, right: Any, outcome: bool) -> None:
    if _listeners and (depends_on_sizes(expression_of(left)) or depends_on_sizes(expression_of(right))):
        for listener in _listeners:
            listener(left, symbol, right, outcome)


def _arithmetic(symbol: str, compute: Callable[[Any, Any], Any], reflected: bool) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        if isinstance(other, bool) or not isinstance(other, int | float):
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        value = compute(_plain(left), _plain(right))
        if not isinstance(value, int | float):
            return value
        return with_origin(value, Operation(symbol, expression_of(left), expression_of(right)))

    return method


def _comparison(symbol: str, compute: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        outcome = compute(_plain(self), _plain(other))
        _compared(self, symbol, other, outcome)
        return outcome

    return method


def _negative(self: Any) -> Any:
    return with_origin(-_plain(self), Operation("-", 0, expression_of(self)))


_ARITHMETIC = {
    "add": ("+", operator.add),
    "sub": ("-", operator.sub),
    "mul": ("*", operator.mul),
    "floordiv": ("//", operator.floordiv),
    "mod": ("%", operator.mod),
    "truediv": ("/", operator.truediv),
    "pow": ("**", operator.pow),
}
_COMPARISONS = {
    "eq": ("==", operator.eq),
    "ne": ("!=", operator.ne),
    "lt": ("<", operator.lt),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "ge": (">=", operator.ge),
}
for _kind in (Dim, Real):
    for _name, (_symbol, _compute) in _ARITHMETIC.items():
        setattr(_kind, f"__{_name}__", _arithmetic(_symbol, _compute, reflected=False))
        setattr(_kind, f"__r{_name}__", _arithmetic(_symbol, _compute, reflected=True))
    for _name, (_symbol, _compute) in _COMPARISONS.items():
        setattr(_kind, f"__{_name}__", _comparison(_symbol, _compute))
    _kind.__neg__ = _negative  # type: ignore[method-assign]
