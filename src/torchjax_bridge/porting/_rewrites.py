"""Whether code of a model may write a parameter after its module has made it: ``self.apply(init)`` and the like.

Looks into ``__init__`` of the module and of those around it, and into what these call. Code under an
``isinstance`` that the module fails does not count.
"""

import ast
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from ._author_numbers import own_attribute
from ._author_starts import READS, author_classes, method_of, scope_of, syntax_of

__all__ = ["may_be_rewritten"]

_PARAMETERS = {"parameters", "named_parameters", "buffers", "named_buffers", "state_dict"}
_MOST = 100  # functions that one __init__ leads to


def may_be_rewritten(modules: Mapping[str, nn.Module], path: str, name: str) -> bool:
    """Whether code other than that of its own module may write a parameter.

    Args:
        modules: Every module of the model by path.
        path: The module that holds it.
        name: Its name.
    """
    parts = path.split(".") if path else []
    paths = (".".join(parts[:count]) for count in range(len(parts) + 1))
    for holder in (modules[one] for one in paths if one in modules):
        kind: Any = type(holder)
        for tree, scope in _reached(kind):
            if tree is None or _Search(holder, modules[path], name, scope).finds(tree):
                return True
    return False


@functools.lru_cache(maxsize=128)
def _reached(kind: type[nn.Module]) -> list[tuple[ast.FunctionDef | None, Mapping[str, Any]]]:
    """The functions that the ``__init__`` of a class leads to, with the names of their files."""
    starts = [vars(one).get("__init__") for one in author_classes(kind)]
    waiting: list[Callable[..., Any]] = [function for function in starts if function is not None]
    seen: list[Callable[..., Any]] = []
    found: list[tuple[ast.FunctionDef | None, Mapping[str, Any]]] = []
    while waiting and len(seen) < _MOST:
        function = waiting.pop()
        if function in seen:
            continue
        seen.append(function)
        tree, scope = syntax_of(function), scope_of(function)
        found.append((tree, scope))
        if tree is not None:
            waiting += _led_to(tree, scope, kind, everything=function not in starts)
    return found if not waiting else [*found, (None, {})]


def _led_to(
    tree: ast.AST, scope: Mapping[str, Any], kind: type[nn.Module], *, everything: bool
) -> Iterator[Callable[..., Any]]:
    """The methods that code calls on ``self``, and the functions that are given ``self`` or go over all modules."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if (name := own_attribute(node.func)) and (method := method_of(kind, name)) is not None:
            yield method
        is_given = any(isinstance(arg, ast.Name) and arg.id == "self" for arg in node.args)
        visits = isinstance(node.func, ast.Attribute) and node.func.attr.endswith("apply")
        for inner in ast.walk(node) if everything or is_given or visits else ():
            if (name := own_attribute(inner)) and (method := method_of(kind, name)) is not None:
                yield method
            given = scope.get(inner.id) if isinstance(inner, ast.Name) else None
            if isinstance(given, types.FunctionType) and not given.__module__.startswith("torch."):
                yield given


class _Search(ast.NodeVisitor):
    """Looks for code that may write a parameter, inside one function."""

    def __init__(self, holder: nn.Module, target: nn.Module, name: str, scope: Mapping[str, Any]) -> None:
        self.holder, self.target, self.name, self.scope = holder, target, name, scope
        self.local: set[str] = set()
        self.writes = self.found = False

    def finds(self, tree: ast.AST) -> bool:
        """Whether there is any."""
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                self.local.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.local.add(node.id)
        self.writes = _writes(tree)
        self.visit(tree)
        return self.found

    def visit_If(self, node: ast.If) -> None:
        for line in node.body if not self._fails(node.test) else ():
            self.visit(line)
        for line in node.orelse:
            self.visit(line)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in READS:
            if not isinstance(node.value, ast.Attribute):
                self.visit(node.value)
            return
        if node.attr in _PARAMETERS and self.writes:
            owner = self._module(node.value)
            self.found |= owner is None or self.target in owner.modules()
        if node.attr == self.name:
            owner = self._module(node.value)
            self.found |= owner is None or (owner is self.target and owner is not self.holder)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("setattr", "getattr"):
            told = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
            owner = self._module(node.args[0])
            self.found |= self.name in told and (owner is None or owner is self.target)
        self.generic_visit(node)

    def _module(self, node: ast.expr) -> nn.Module | None:
        """The module that ``self.stage.block`` is, or None if it is no such chain."""
        if isinstance(node, ast.Name) and node.id == "self":
            return self.holder
        if isinstance(node, ast.Name) and node.id in self.scope and node.id not in self.local:
            return _NOWHERE  # ``torch`` and the like
        if isinstance(node, ast.Attribute):
            held = self._module(node.value)
            found = None if held is None else held._modules.get(node.attr)
            return found if found is not None else _NOWHERE if held is not None else None
        return None

    def _fails(self, test: ast.expr) -> bool:
        """Whether the module fails a condition on its class."""
        match test:
            case ast.BoolOp(op=ast.And(), values=parts):
                return any(map(self._fails, parts))
            case ast.BoolOp(op=ast.Or(), values=parts):
                return all(map(self._fails, parts))
            case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name(), kinds]):
                written = kinds.elts if isinstance(kinds, ast.Tuple) else [kinds]
                known = [self._resolved(kind) for kind in written]
                return all(isinstance(kind, type) and not isinstance(self.target, kind) for kind in known)
        return False

    def _resolved(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return self.scope.get(node.id)
        return (
            getattr(self._resolved(node.value), node.attr, None) if isinstance(node, ast.Attribute) else None
        )


_NOWHERE = nn.Module()


def _writes(tree: ast.AST) -> bool:
    """Whether code writes a tensor with a name of its own: ``normal_(p)``, ``p.data.zero_()``, ``p.data = x``."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=held, attr=name), args=args) if name.endswith("_"):
                if name != "requires_grad_" and any(_is_local(one) for one in (held, *args[:1])):
                    return True
            case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name.endswith("_") and _is_local(
                first
            ):
                return True
            case ast.Attribute(value=ast.Name(), attr="data", ctx=ast.Store()):
                return True
    return False


def _is_local(node: ast.expr) -> bool:
    """``p`` or ``p.data``, which may be any parameter."""
    inner = node.value if isinstance(node, ast.Attribute) and node.attr == "data" else node
    return isinstance(inner, ast.Name) and inner.id != "self"
