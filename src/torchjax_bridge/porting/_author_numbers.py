"""Numbers and conditions in the author's ``__init__``, as far as one live module shows what they were.

An argument is known where an attribute, a layer of torch's own or the shape of a parameter holds it. Its default
is no knowledge: another value may have been passed. Runs no code of the author's.
"""

import ast
import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ._author_init import bound_arguments, replaced, settled_names
from ._expressions import UnknownError, evaluated, plain

__all__ = ["Number", "Numbers", "combined", "is_stored", "own_attribute"]

_FUNCTIONS = (math.sqrt, math.log, math.exp, math.pow, np.sqrt, np.log, np.exp)
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_FACTORIES = ("empty", "zeros", "ones", "randn", "rand")
_NEUTRAL = {"+": 0, "*": 1}
_PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True)
class Number:
    """A number, and the expression of the author's arguments that gives it."""

    value: float
    written: str = ""

    @staticmethod
    def of(value: float) -> "Number":
        """A number that stands in the code."""
        return Number(value, repr(value))


def combined(one: Number, operation: str, other: Number) -> Number:
    """The result of an operation, with neither a 0 that is added nor a 1 that multiplies."""
    neutral = _NEUTRAL.get(operation)
    if neutral is not None:
        for given, kept in ((one, other), (other, one)):
            if given == Number.of(neutral) or given == Number.of(float(neutral)):
                return kept
    value = _OPERATORS[operation](one.value, other.value)
    written = f"({one.written}) {operation} ({other.written})" if one.written and other.written else ""
    return Number(value, ast.unparse(ast.parse(written, mode="eval")) if written else "")


def own_attribute(node: ast.AST) -> str:
    """The ``name`` of ``self.name``, or ``""``."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name
    return ""


class Numbers:
    """What is known inside a method of one module.

    Args:
        tree: The method.
        scope: The names of its file.
        module: The module.
        stores: How often the methods of its class assign each attribute.
    """

    def __init__(
        self, tree: ast.FunctionDef, scope: Mapping[str, Any], module: nn.Module, stores: Counter[str]
    ) -> None:
        self.scope, self.module, self.stores = scope, module, stores
        given = tree.args
        arguments = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
        extra = {a.arg for a in (given.vararg, given.kwarg) if a is not None}
        stored = {node.id for node in ast.walk(tree) if is_stored(node, ast.Name)}  # type: ignore[attr-defined]
        self.local = stored | arguments | extra
        self.settled = settled_names(tree, arguments | extra)
        self.loads = Counter(
            n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        )
        self.names: dict[str, Any] = {}
        for name, value in self._shown(tree, arguments - stored - {"self"}):
            if self.names.setdefault(name, value) != value:
                self.names[name] = UnknownError  # two places disagree
        self.names = {n: value for n, value in self.names.items() if value is not UnknownError}

    def number(self, node: ast.expr) -> Number | None:
        """A number, or None if it is not known or no number."""
        value = self.value(node)
        if type(value) not in (int, float):
            return None
        return Number(value, ast.unparse(replaced(node, self.settled)))

    def truth(self, node: ast.expr) -> bool | None:
        """Whether a condition holds, or None if that is not known."""
        value = self.value(node)
        return bool(value) if isinstance(value, bool | int | float | str | None) else None

    def value(self, node: ast.expr) -> Any:
        """What an expression is, or `UnknownError`."""
        known = _Known(self).visit(replaced(node, self.settled))
        try:
            return evaluated(ast.fix_missing_locations(known), {}, nn.Module())
        except (UnknownError, TypeError, ValueError, ArithmeticError):
            return UnknownError

    def resolved(self, function: ast.expr) -> Any:
        """What a name of the file stands for, or None."""
        if isinstance(function, ast.Name):
            return None if function.id in self.local else self.scope.get(function.id)
        if isinstance(function, ast.Attribute):
            return getattr(self.resolved(function.value), function.attr, None)
        return None

    def _shown(self, tree: ast.FunctionDef, arguments: set[str]) -> Iterator[tuple[str, Any]]:
        """The arguments that the module shows, with their values."""
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign) or len(node.targets) != 1:
                continue
            name = own_attribute(node.targets[0])
            if not name or self.stores[name] > 1 or not hasattr(self.module, name):
                continue
            live = getattr(self.module, name)
            if isinstance(node.value, ast.Name) and node.value.id in arguments:
                value = plain(live)
                if isinstance(value, _PLAIN):
                    yield node.value.id, value
            elif isinstance(live, nn.Parameter):
                yield from self._sizes(node.value, live, arguments)
            elif isinstance(live, nn.Module) and type(live).__module__.startswith("torch.nn.modules."):
                yield from self._settings(node.value, live, arguments)

    def _sizes(self, written: ast.expr, live: nn.Parameter, arguments: set[str]) -> Iterator[tuple[str, Any]]:
        """The arguments that are sizes of a parameter: ``nn.Parameter(torch.randn(1, count, dim))``."""
        names = [n.func.attr for n in ast.walk(written) if _is_method(n)]  # type: ignore[attr-defined]
        if names.count("Parameter") > 1 or not set(names) <= {
            *_FACTORIES,
            "Parameter",
            "normal_",
            "uniform_",
        }:
            return
        calls = [n for n in ast.walk(written) if _is_method(n) and n.func.attr in _FACTORIES]  # type: ignore[attr-defined]
        for call in calls if len(calls) == 1 else ():
            args = call.args  # type: ignore[attr-defined]
            items = args[0].elts if len(args) == 1 and isinstance(args[0], ast.Tuple) else args
            if len(items) == live.dim() and not any(isinstance(item, ast.Starred) for item in items):
                for item, size in zip(items, live.shape, strict=True):
                    if isinstance(item, ast.Name) and item.id in arguments:
                        yield item.id, size

    def _settings(self, written: ast.expr, live: nn.Module, arguments: set[str]) -> Iterator[tuple[str, Any]]:
        """The arguments that are settings of a layer: ``nn.Linear(dim, hidden)``."""
        if not isinstance(written, ast.Call) or self.resolved(written.func) is not type(live):
            return
        for setting, item in bound_arguments(type(live).__init__, written, skip=1).items():
            value = vars(live).get(setting)
            if isinstance(item, ast.Name) and item.id in arguments and type(value) in (int, float):
                yield item.id, value


def _is_method(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)


def is_stored(node: ast.AST, kind: type[ast.AST]) -> bool:
    """Whether a node is a name or an attribute that is assigned."""
    return isinstance(node, kind) and isinstance(node.ctx, ast.Store)  # type: ignore[attr-defined]


class _Known(ast.NodeTransformer):
    """Puts numbers in the place of arguments, attributes, sizes, and functions of ``math``."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def visit_Name(self, node: ast.Name) -> ast.AST:
        numbers = self.numbers
        if node.id in numbers.names:
            return ast.Constant(numbers.names[node.id])
        value = numbers.resolved(node)
        return ast.Constant(value) if type(value) in (int, float) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        name, module = own_attribute(node), self.numbers.module
        if name:
            of_class = next((vars(k)[name] for k in type(module).__mro__ if name in vars(k)), UnknownError)
            value = plain(vars(module).get(name, of_class))
            is_known = isinstance(value, _PLAIN) and self.numbers.stores[name] < 2
            return ast.Constant(value) if is_known else node
        value = self.numbers.resolved(node)
        return ast.Constant(value) if type(value) in (int, float) else self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        match node:
            case ast.Subscript(
                value=ast.Attribute(value=held, attr="shape"), slice=ast.Constant(value=int(at))
            ):
                return self._size(held, at) or node
        return self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        match node:
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as op], comparators=[ast.Constant(None)]):
                held = getattr(self.numbers.module, own_attribute(left) or " ", UnknownError)
                if held is not UnknownError:
                    return ast.Constant((held is None) is isinstance(op, ast.Is))
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        match node:
            case ast.Call(func=ast.Attribute(value=held, attr="size"), args=[ast.Constant(value=int(at))]):
                return self._size(held, at) or node
        function = self.numbers.resolved(node.func)
        if any(function is one for one in _FUNCTIONS) and not node.keywords:
            args = [self.numbers.value(arg) for arg in node.args]
            if all(type(arg) in (int, float) for arg in args):
                try:
                    return ast.Constant(float(function(*args)))
                except (ValueError, TypeError, ArithmeticError):
                    return node
        if isinstance(node.func, ast.Name) and node.func.id not in ("hasattr", "getattr"):
            return ast.Call(node.func, [self.visit(arg) for arg in node.args], node.keywords)
        return ast.Name("an unknown call", ast.Load())

    def _size(self, held: ast.expr, at: int) -> ast.Constant | None:
        tensor = self.numbers.module._parameters.get(own_attribute(held))
        sizes = () if tensor is None else tuple(tensor.shape)
        return ast.Constant(sizes[at]) if -len(sizes) <= at < len(sizes) else None
