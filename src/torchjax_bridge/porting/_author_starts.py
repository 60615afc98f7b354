"""With which values the author's code starts each parameter of a module: ``__init__``, and what that calls.

Follows the statements in their order; the last one that writes a parameter wins. A condition that is not known, a
loop or any other use of a parameter leaves it unread. Runs no code of the author's.
"""

import ast
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ._author_init import parsed_function, replaced
from ._author_numbers import Numbers, is_stored, own_attribute
from ._author_tensors import Reading, expression, initializer, written_in_place

__all__ = [
    "ABSENT",
    "READS",
    "attribute_stores",
    "author_classes",
    "author_start",
    "method_of",
    "scope_of",
    "syntax_of",
]

ABSENT = Reading("absent")
"""The start of a tensor that the author's code never speaks of."""
_UNREAD = Reading("unread")
# Attributes of a tensor that say nothing of its values, and write none.
READS = {"shape", "size", "dim", "ndim", "numel", "device", "dtype", "requires_grad"}
_USUAL = ("reset_parameters", "init_weights", "_reset_parameters", "_init_weights")


def author_start(module: nn.Module, name: str, item: int | None = None) -> Reading | None:
    """How the author starts a parameter or a buffer of a module.

    None where the code does not say it for certain, `ABSENT` where it says nothing.

    Args:
        module: The module.
        name: The attribute that holds the tensor.
        item: Its place, where the attribute is a ``ParameterList``.
    """
    walk = _Walk(module, name, item)
    state = ABSENT
    for kind in author_classes(type(module)):
        function = vars(kind).get("__init__")
        if function is not None:
            state = walk.method(function, state)
    for usual in _USUAL:
        method = method_of(type(module), usual)
        if method is not None and usual not in walk.followed and _names(syntax_of(method), name):
            return None  # somebody may call it, or nobody
    return None if state.kind in ("unread", "empty") else state


def author_classes(kind: type[nn.Module]) -> list[type]:
    """What a class derives from that is not torch's, and the class itself as the last."""
    kinds = [one for one in kind.__mro__ if one is not object]
    return [one for one in reversed(kinds) if not one.__module__.startswith("torch.nn.modules.")]


def method_of(kind: type[nn.Module], name: str) -> Callable[..., Any] | None:
    """A method of the author's."""
    owner = next((one for one in kind.__mro__ if name in vars(one)), None)
    found = None if owner is None or owner.__module__.startswith("torch.nn.modules.") else vars(owner)[name]
    return found if callable(found) else None


def scope_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The names of the file that a function is in."""
    return getattr(inspect.unwrap(function), "__globals__", {})


@functools.lru_cache(maxsize=512)
def syntax_of(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """The syntax tree of a function, which nobody may change; a method's first argument is called ``self``."""
    tree = parsed_function(function)
    if isinstance(function, staticmethod):
        return tree
    holder = getattr(function, "__qualname__", "").rpartition(".")[0]
    if tree is None or not holder or holder.endswith("<locals>") or not tree.args.args:
        return tree
    own = tree.args.args[0].arg
    return tree if own == "self" else replaced(tree, {own: ast.Name("self", ast.Load())})


@functools.lru_cache(maxsize=128)
def attribute_stores(kind: type) -> Counter[str]:
    """How often the methods of a class assign each attribute of ``self``."""
    found: Counter[str] = Counter()
    for owner in kind.__mro__:
        if owner.__module__.startswith("torch.nn.modules.") or owner is object:
            continue
        for function in vars(owner).values():
            tree = syntax_of(function) if callable(function) and hasattr(function, "__code__") else None
            nodes = ast.walk(tree) if tree is not None else ()
            found.update(node.attr for node in nodes if is_stored(node, ast.Attribute))  # type: ignore[attr-defined]
    return found


def _names(tree: ast.AST | None, name: str) -> bool:
    """Whether code speaks of a parameter; code that cannot be had may."""
    return tree is None or any(own_attribute(node) == name for node in ast.walk(tree))


class _Walk:
    """The statements that concern one parameter of a module."""

    def __init__(self, module: nn.Module, name: str, item: int | None) -> None:
        self.module, self.name, self.item = module, name, item
        self.followed: set[str] = set()

    def method(self, function: Callable[..., Any], state: Reading) -> Reading:
        """The state of the parameter after a method."""
        tree = syntax_of(function)
        if tree is None:
            return _UNREAD
        kind: Any = type(self.module)
        numbers = Numbers(tree, scope_of(function), self.module, attribute_stores(kind))
        early = any(isinstance(node, ast.Return) and node not in tree.body for node in ast.walk(tree))
        if early and self._concerns(tree):
            return _UNREAD
        return self.body(tree.body, state, numbers)

    def body(self, lines: Sequence[ast.stmt], state: Reading, numbers: Numbers) -> Reading:
        """The state after statements."""
        for line in lines:
            if self._concerns(line):
                state = self._after(line, state, numbers)
        return state

    def _concerns(self, node: ast.AST) -> bool:
        """Whether code speaks of the parameter, or calls a method of the author's that may."""
        return any(
            own_attribute(inner) == self.name
            or (isinstance(inner, ast.Constant) and inner.value == self.name)
            or (isinstance(inner, ast.Call) and (self._method(inner) or _of_super(inner)))
            for inner in ast.walk(node)
        )

    def _method(self, call: ast.Call) -> Callable[..., Any] | None:
        """The method of the author's that ``self.method()`` calls."""
        name = own_attribute(call.func)
        return method_of(type(self.module), name) if name and name not in vars(self.module) else None

    def _methods(self, call: ast.Call) -> Iterator[Callable[..., Any]]:
        """The methods of the author's that ``self.method()`` or ``super().method()`` may call."""
        if (method := self._method(call)) is not None:
            yield method
        for kind in author_classes(type(self.module)) if (name := _of_super(call)) else ():
            if callable(method := vars(kind).get(name)):
                yield method

    def _after(self, line: ast.stmt, state: Reading, numbers: Numbers) -> Reading:
        match line:
            case ast.If(test=test, body=body, orelse=orelse):
                return self._branch(test, body, orelse, state, numbers)
            case ast.With(body=body):
                return self.body(body, state, numbers)
            case (
                ast.Assign(targets=[target], value=value)
                | ast.AnnAssign(target=target, value=ast.expr() as value)
            ) if own_attribute(target) == self.name:
                return self._created(value, numbers)
            case ast.Assign(targets=[ast.Attribute(value=held, attr="data")], value=value) if (
                own_attribute(held) == self.name
            ):
                return expression(value, numbers) or _UNREAD
            case ast.Expr(value=ast.Call() as call):
                return self._call(call, state, numbers)
        return self._others(line, state)

    def _branch(
        self,
        test: ast.expr,
        body: Sequence[ast.stmt],
        orelse: Sequence[ast.stmt],
        state: Reading,
        numbers: Numbers,
    ) -> Reading:
        """The state after an ``if``: known if its condition is, or if both ways agree or only one makes values."""
        held = numbers.truth(test)
        if held is not None:
            return self.body(body if held else orelse, state, numbers)
        return _either(self.body(body, state, numbers), self.body(orelse, state, numbers))

    def _created(self, value: ast.expr, numbers: Numbers) -> Reading:
        match value:
            case ast.Constant(value=None):
                return ABSENT
            case ast.IfExp(test=test, body=body, orelse=orelse):
                held = numbers.truth(test)
                if held is not None:
                    return self._created(body if held else orelse, numbers)
                return _either(self._created(body, numbers), self._created(orelse, numbers))
            case ast.Call(func=function, args=[whole]) if self.item is not None:
                item = _item(whole, self.item) if numbers.resolved(function) is nn.ParameterList else None
                return _UNREAD if item is None else self._made(item, numbers)
        return self._made(value, numbers) if self.item is None else _UNREAD

    def _made(self, value: ast.expr, numbers: Numbers) -> Reading:
        """What ``nn.Parameter(...)`` makes."""
        match value:
            case (
                ast.Call(func=function, args=[data, *_])
                | ast.Call(func=function, args=[], keywords=[ast.keyword(arg="data", value=data), *_])
            ) if numbers.resolved(function) is nn.Parameter:
                return expression(data, numbers) or _UNREAD
        return _UNREAD

    def _call(self, call: ast.Call, state: Reading, numbers: Numbers) -> Reading:
        match call.func:
            case ast.Attribute(attr="__init__"):
                return self._others(call, state)
            case ast.Attribute(
                value=ast.Name(id="self"), attr="register_parameter" | "register_buffer" as kind
            ):
                match call.args:
                    case [ast.Constant(value=self.name), value, *_]:
                        if kind == "register_parameter" or _is_none(value):
                            return self._created(value, numbers)
                        return expression(value, numbers) or _UNREAD
                return self._others(call, state)
            case ast.Attribute(value=held, attr=method) if self._is_tensor(held):
                if method == "requires_grad_":
                    return state
                return written_in_place(method, call, state, numbers) or _UNREAD
        if call.args and self._is_tensor(call.args[0]):
            return initializer(call, numbers) or _UNREAD
        method_called = self._method(call)
        if method_called is not None and not any(
            _names(given, self.name) for given in (*call.args, *call.keywords)
        ):
            name = own_attribute(call.func)
            if name in self.followed:
                return _UNREAD if _names(syntax_of(method_called), self.name) else state
            self.followed.add(name)
            return self.method(method_called, state)
        return self._others(call, state)

    def _is_tensor(self, node: ast.expr) -> bool:
        """``self.name``, or ``self.name.data``."""
        inner = node.value if isinstance(node, ast.Attribute) and node.attr == "data" else node
        return own_attribute(inner) == self.name

    def _others(self, node: ast.AST, state: Reading) -> Reading:
        """The state after code that asks for the shape of the parameter and the like; any other may write it."""
        harmless: set[ast.AST] = set()
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute):
                is_note = isinstance(inner.ctx, ast.Store) and inner.attr != "data"
                if is_note or inner.attr in READS:
                    harmless.add(inner.value)
            elif isinstance(inner, ast.Compare) and all(map(_is_none, inner.comparators)):
                harmless.add(inner.left)
        for inner in ast.walk(node):
            if own_attribute(inner) == self.name and inner not in harmless:
                return _UNREAD
            if isinstance(inner, ast.Constant) and inner.value == self.name:
                return _UNREAD
            methods = [*self._methods(inner)] if isinstance(inner, ast.Call) else []
            if any(_speaks_deeply(self.module, method, self.name) for method in methods):
                return _UNREAD
        return state


def _item(whole: ast.expr, place: int) -> ast.expr | None:
    """The expression of one item of a list."""
    match whole:
        case ast.ListComp(elt=item) | ast.GeneratorExp(elt=item):
            return item
        case ast.List(elts=items) if not any(isinstance(item, ast.Starred) for item in items):
            return items[place] if place < len(items) else None
    return None


def _either(one: Reading, other: Reading) -> Reading:
    """What is known where one of two holds: a tensor that is never filled is no start of anybody's."""
    for given, instead in ((one, other), (other, one)):
        if given.kind in ("absent", "empty") and instead != ABSENT:
            return instead
    return one if one == other else _UNREAD


def _speaks_deeply(module: nn.Module, function: Callable[..., Any], name: str) -> bool:
    """Whether a method, or one that it calls, speaks of a parameter."""
    seen: set[str] = set()

    def speaks(function: Callable[..., Any]) -> bool:
        tree = syntax_of(function)
        return _names(tree, name) or any(
            speaks(method) for method in _methods_of(module, tree, seen) if tree is not None
        )

    return speaks(function)


def _methods_of(module: nn.Module, tree: ast.AST | None, seen: set[str]) -> Iterator[Callable[..., Any]]:
    for node in ast.walk(tree) if tree is not None else ():
        name = own_attribute(node.func) if isinstance(node, ast.Call) else ""
        method = method_of(type(module), name) if name and name not in seen else None
        if method is not None:
            seen.add(name)
            yield method


def _of_super(call: ast.Call) -> str:
    """The ``method`` of ``super().method()``, but for ``__init__``, which is read by itself."""
    match call.func:
        case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name) if name != "__init__":
            return name
    return ""


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
