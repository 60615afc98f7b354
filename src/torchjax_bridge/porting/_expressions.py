"""Expressions of the author's, evaluated for each instance of his class and written shorter.

Knows numbers, strings, arithmetic and conditions. Runs no code of the author's.
"""

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ._constructors import MISSING

__all__ = ["Instances", "UnknownError", "evaluated", "plain"]

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "round": round,
    "max": max,
    "min": min,
    "abs": abs,
    "bool": bool,
}
_OF_MATH: dict[str, Callable[[float], float]] = {"sqrt": math.sqrt, "log": math.log, "exp": math.exp}
_KINDS = (bool, int, float, str)


class UnknownError(Exception):
    """An expression needs something that is not known."""


def plain(value: Any) -> Any:
    """A setting without the origin that a recording gives numbers, a list as a tuple."""
    if isinstance(value, tuple | list):
        return tuple(plain(item) for item in value)
    kind = next((kind for kind in _KINDS if isinstance(value, kind)), None)
    return value if kind is None else kind(value)


@dataclass
class Instances:
    """The instances of a class.

    Attributes:
        modules: They.
        known: What is known of the arguments of their ``__init__``: for each instance its value.
    """

    modules: Sequence[nn.Module]
    known: dict[str, list[Any]]

    def values(
        self, expression: ast.expr, places: Sequence[int], more: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """What an expression is in some of the instances.

        Raises:
            UnknownError: It needs something that is not known.
        """
        found = []
        for place in places:
            names = {name: v[place] for name, v in self.known.items() if v[place] is not MISSING}
            try:
                found.append(evaluated(expression, {**names, **(more or {})}, self.modules[place]))
            except (TypeError, ValueError, ArithmeticError) as err:
                raise UnknownError from err
        return found

    def settled(self, expression: ast.expr, places: Sequence[int], names: Collection[str]) -> ast.expr:
        """An expression as written, of these names alone: whatever else it holds is computed.

        Raises:
            UnknownError: It needs something else.
        """
        if isinstance(expression, ast.Name) and expression.id in names:
            return expression
        if not any(isinstance(node, ast.Name) and node.id in names for node in ast.walk(expression)):
            values = self.values(expression, places)
            if len({repr(value) for value in values}) != 1 or type(values[0]) not in _KINDS:
                raise UnknownError
            return ast.Constant(values[0])
        match expression:
            case ast.BinOp(left=left, op=op, right=right):
                return _simple(self.settled(left, places, names), op, self.settled(right, places, names))
            case ast.Call(func=function, args=args, keywords=[]):
                return ast.Call(function, [self.settled(arg, places, names) for arg in args], [])
            case ast.Tuple(elts=items):
                return ast.Tuple([self.settled(item, places, names) for item in items], ast.Load())
        raise UnknownError

    def short(self, expression: ast.expr, places: Sequence[int], names: Sequence[str]) -> ast.expr:
        """An expression with its constant parts computed and in as few of ``names`` as say the same.

        Raises:
            UnknownError: It needs something else.
        """
        values = self.values(expression, places)
        if isinstance(expression, ast.Name) and expression.id in names:
            first = next(n for n in names if _same(self.known[n], self.known[expression.id]))
            return ast.Name(first, ast.Load())
        if len({repr(value) for value in values}) == 1 and type(values[0]) in _KINDS:
            return ast.Constant(values[0])
        for name in names:
            if _same([self.known[name][place] for place in places], values):
                return ast.Name(name, ast.Load())
        match expression:
            case ast.BinOp(left=left, op=op, right=right):
                return _simple(self.short(left, places, names), op, self.short(right, places, names))
            case ast.UnaryOp(op=op, operand=operand):
                inner = self.short(operand, places, names)
                if isinstance(op, ast.Not) and isinstance(inner, ast.Compare) and len(inner.ops) == 1:
                    opposite = _OPPOSITE.get(type(inner.ops[0]))
                    if opposite is not None:
                        return ast.Compare(inner.left, [opposite()], inner.comparators)
                return ast.UnaryOp(op, inner)
            case ast.BoolOp(op=op, values=parts):
                kept = [self.short(part, places, names) for part in parts]
                kept = [part for part in kept if not isinstance(part, ast.Constant)]
                return ast.BoolOp(op, kept) if len(kept) > 1 else kept[0]
            case ast.Compare(left=left, ops=ops, comparators=others):
                shorter = [self.short(other, places, names) for other in others]
                return ast.Compare(self.short(left, places, names), ops, shorter)
            case ast.Call(func=function, args=args, keywords=[]):
                return ast.Call(function, [self.short(arg, places, names) for arg in args], [])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                parts = [self.short(part, places, names) for part in (test, body, orelse)]
                return ast.IfExp(*parts)
            case ast.Tuple(elts=items):
                return ast.Tuple([self.short(item, places, names) for item in items], ast.Load())
        raise UnknownError


def _simple(left: ast.expr, op: ast.operator, right: ast.expr) -> ast.expr:
    """An operation without a 0 that is added or a 1 that multiplies."""
    for given, other in ((left, right), (right, left)):
        neutral = given.value if isinstance(given, ast.Constant) else None
        if (neutral == 0 and isinstance(op, ast.Add)) or (neutral == 1 and isinstance(op, ast.Mult)):
            return other
    return ast.BinOp(left, op, right)


_OPPOSITE = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is}


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return all(type(a) is type(b) and a == b for a, b in zip(one, other, strict=True))


def evaluated(node: ast.expr, names: Mapping[str, Any], module: nn.Module) -> Any:
    def value(part: ast.expr) -> Any:
        return evaluated(part, names, module)

    match node:
        case ast.Constant(value=constant):
            return constant
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Attribute(value=ast.Name(id="self"), attr=name) if hasattr(module, name):
            return plain(getattr(module, name))
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](value(left), value(right)) if type(op) in _BINARY else _unknown()
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not value(operand)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value(operand)
        case ast.BoolOp(op=op, values=parts):
            found: Any = None
            for part in parts:
                found = value(part)
                if bool(found) is isinstance(op, ast.Or):
                    break
            return found
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _COMPARE[type(op)](value(left), value(right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(value, args))
        case ast.Call(func=ast.Name(id="hasattr"), args=[ast.Name(id="self"), ast.Constant(value=str(name))]):
            return hasattr(module, name)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="math"), attr=name), args=[arg], keywords=[]) if (
            name in _OF_MATH
        ):
            return _OF_MATH[name](value(arg))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return value(body) if value(test) else value(orelse)
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(map(value, items))
        case ast.Subscript(value=whole, slice=ast.Constant(value=int(place))):
            given = value(whole)
            return given[place] if isinstance(given, tuple) and place < len(given) else _unknown()
    return _unknown()


def _unknown() -> Any:
    raise UnknownError
