"""What the author's ``__init__`` says: which expression of its arguments each setting of each layer is.

Reads source as a hint. Without source there are no hints; a hint that does not fit the built modules is not used.
"""

import ast
import copy
import inspect
import textwrap
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from ._constructors import Call, Column, Either, Indexed, Items, Run, Start, Tree, columns, indexed

__all__ = [
    "AuthorInit",
    "Hint",
    "author_init",
    "bound_arguments",
    "parsed_function",
    "replaced",
    "settled_names",
]

# What torch calls the settings of its layers, by Flax's name.
_TORCH_NAMES = {
    "in_features": ("in_channels", "in_features"),
    "out_features": ("out_channels", "out_features"),
    "strides": ("stride",),
    "kernel_dilation": ("dilation",),
    "feature_group_count": ("groups",),
    "num_features": ("num_features", "normalized_shape", "num_channels"),
    "features": ("embedding_dim",),
    "rate": ("p",),
    "group_size": ("num_groups",),
}


@dataclass(frozen=True)
class Hint:
    """What the author wrote for one setting.

    Attributes:
        expression: It, with local variables replaced by what they stand for.
        name: The variable that he passed, or ``""``.
    """

    expression: ast.expr
    name: str = ""


@dataclass
class AuthorInit:
    """The ``__init__`` of a class.

    Attributes:
        arguments: The names of its arguments, in order, without ``self``.
        defaults: Their defaults, where these are numbers, strings or None.
        assigned: For each attribute what was assigned to it, each with the condition that it was under.
        scope: The names of the file that the class is in.
        settled: What each local variable that is assigned once stands for.
        lists: For each local list what is put into it, each with the condition that it is under; None in a loop.
    """

    arguments: list[str] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    assigned: dict[str, list[tuple[ast.expr, ast.expr | None]]] = field(default_factory=dict)
    scope: Mapping[str, Any] = field(default_factory=dict)
    settled: dict[str, ast.expr] = field(default_factory=dict)
    lists: "dict[str, list[tuple[ast.expr, ast.expr | None]] | None]" = field(default_factory=dict)

    def hints(self, fields: Mapping[str, Tree]) -> dict[int, list[Hint]]:
        """For each column of the attributes, by its identity, what the author wrote for it."""
        found: dict[int, list[Hint]] = {}
        for name, tree in fields.items():
            for column in columns(tree):
                if column.written:
                    found.setdefault(id(column), []).append(Hint(ast.parse(column.written, mode="eval").body))
            for value, condition in self.assigned.get(name, ()):
                self._match_under(condition, tree, value, found)
        return found

    def _match_under(
        self, condition: ast.expr | None, tree: Tree, value: ast.expr, found: dict[int, list[Hint]]
    ) -> None:
        """Match what stands under a condition: of an optional layer, the condition says who has it."""
        self._match(tree, value, found)
        if condition is not None and isinstance(tree, Either):
            found.setdefault(id(tree.flag), []).append(Hint(self._settled(condition)))

    def _settled(self, expression: ast.expr) -> ast.expr:
        return replaced(expression, self.settled)

    def _match(self, tree: Tree, value: ast.expr, found: dict[int, list[Hint]]) -> None:
        if isinstance(value, ast.IfExp):
            if isinstance(tree, Either):
                for test in (value.test, ast.UnaryOp(ast.Not(), value.test)):
                    found.setdefault(id(tree.flag), []).append(Hint(self._settled(test)))
            if not isinstance(tree, Column):
                self._match(tree, value.body, found)
                self._match(tree, value.orelse, found)
                return
        if isinstance(tree, Either):
            if isinstance(value, ast.Name) and value.id in self.arguments:
                found.setdefault(id(tree.flag), []).append(Hint(value, value.id))
            self._match(tree.then, value, found)
        elif isinstance(tree, Indexed):
            for part in tree.parts:
                self._match(part, value, found)
        elif isinstance(tree, Column):
            name = value.id if isinstance(value, ast.Name) else ""
            found.setdefault(id(tree), []).append(Hint(self._settled(value), name))
        elif isinstance(value, ast.Name) and value.id in self.settled:
            self._match(tree, self.settled[value.id], found)
        elif isinstance(value, ast.Call):
            self._match_call(tree, value, found)

    def _match_call(self, tree: Tree, value: ast.Call, found: dict[int, list[Hint]]) -> None:
        target = self._resolved(value.func)
        if isinstance(target, types.FunctionType):
            inlined = _inlined(target, value)
            if inlined is not None:
                self._match(tree, inlined, found)
        elif not isinstance(target, type):
            return
        elif isinstance(tree, Items) and issubclass(target, nn.Sequential | nn.ModuleList):
            written = value.args
            if len(written) == 1 and isinstance(written[0], ast.List):
                written = written[0].elts
            if len(written) == 1 and self._match_list(tree, written[0], found):
                return
            for item, expression in zip(tree.items, written, strict=False):
                inside = expression.value if isinstance(expression, ast.Starred) else expression
                if isinstance(item, Run) and isinstance(inside, ast.ListComp):
                    self._match_run(item, inside, found)
                elif isinstance(expression, ast.Starred):
                    return
                else:
                    self._match(item, expression, found)
        elif isinstance(tree, Start):  # nn.Parameter(0.02 * torch.randn(dim))
            if (shape := _shape_of(value)) is not None:
                for column in columns(tree):
                    if column.setting == "shape":
                        self._match(column, shape, found)
        elif isinstance(tree, Call):
            given = bound_arguments(target.__init__, value, skip=1)  # type: ignore[misc]
            for setting, item in (*_settings(tree), *tree.kwargs.items()):
                names = (*_TORCH_NAMES.get(setting, ()), setting)
                written_as = next((given[name] for name in names if name in given), None)
                if written_as is not None:
                    self._match(item, written_as, found)

    def _match_list(self, tree: Items, written: ast.expr, found: dict[int, list[Hint]]) -> bool:
        """``nn.Sequential(*layers)``, by what the author puts into the list."""
        name = written.value if isinstance(written, ast.Starred) else written
        put = self.lists.get(name.id) if isinstance(name, ast.Name) else None
        if put is None or len(put) != len(tree.items):
            return False
        for item, (value, condition) in zip(tree.items, put, strict=True):
            self._match_under(condition, item, value, found)
        return True

    def _match_run(self, run: Run, written: ast.ListComp, found: dict[int, list[Hint]]) -> None:
        """``Block(...) for i in range(depth)``: what is written for the places 0 and 1."""
        match written.generators:
            case [ast.comprehension(ast.Name(id=place), ast.Call(ast.Name(id="range"), [count], []), ifs=[])]:
                self._match(run.count, count, found)
            case _:
                return
        self._match(run.item, written.elt, found)
        of_first = [tree.parts[0] for tree in indexed(run.item)]
        for column in columns(run.item):
            at = 0 if column in of_first else 1
            for place_of, hint in enumerate(found.get(id(column), ())):
                inside = replaced(hint.expression, {place: ast.Constant(at)})
                found[id(column)][place_of] = Hint(inside, hint.name or _list_name(hint.expression, place))

    def _resolved(self, function: ast.expr) -> Any:
        if isinstance(function, ast.Name):
            return self.scope.get(function.id)
        if isinstance(function, ast.Attribute):
            return getattr(self._resolved(function.value), function.attr, None)
        return None


def _shape_of(parameter: ast.Call) -> ast.expr | None:
    """The shape that a factory of torch's is given inside ``nn.Parameter(...)``."""
    factories = ("zeros", "ones", "empty", "full", "randn", "rand", "Tensor", "FloatTensor")
    for node in ast.walk(parameter):
        match node:
            case ast.Call(func=ast.Attribute(attr=name), args=[first, *rest]) if name in factories:
                is_whole = not rest or name == "full"
                return first if is_whole else ast.Tuple([first, *rest], ast.Load())
    return None


def _settings(call: Call) -> Iterator[tuple[str, Tree]]:
    for item in call.args:
        if isinstance(item, Column | Indexed):
            yield (item if isinstance(item, Column) else item.parts[0]).setting, item


def author_init(kind: type[nn.Module]) -> AuthorInit:
    """The ``__init__`` of a torch class."""
    tree = parsed_function(kind.__init__)
    if tree is None:
        return AuthorInit()
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    defaults = {
        p.name: p.default for p in plain if p.default is None or type(p.default) in (bool, int, float, str)
    }
    found = AuthorInit([p.name for p in plain], defaults, scope=kind.__init__.__globals__)
    found.settled = settled_names(tree, {p.name for p in parameters})
    found.assigned, found.lists = _assignments(tree.body), _lists(tree.body)
    return found


def parsed_function(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """The syntax tree of a function, if its source can be had."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError, TypeError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def settled_names(tree: ast.FunctionDef, taken: set[str]) -> dict[str, ast.expr]:
    """The local variables that are assigned once, outside loops."""
    stored = Counter(
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )
    found: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if stored[name] == 1 and name not in taken:
                found[name] = replaced(node.value, found)
    return found


def _under_conditions(
    body: Sequence[ast.stmt], condition: ast.expr | None = None
) -> Iterator[tuple[ast.stmt, ast.expr | None]]:
    """The statements of a body in order, those of each ``if`` with its condition."""
    for line in body:
        if isinstance(line, ast.If):
            yield from _under_conditions(line.body, _both(condition, line.test))
            yield from _under_conditions(line.orelse, _both(condition, ast.UnaryOp(ast.Not(), line.test)))
        else:
            yield line, condition


def _assignments(body: Sequence[ast.stmt]) -> "dict[str, list[tuple[ast.expr, ast.expr | None]]]":
    """What is assigned to attributes."""
    found: dict[str, list[tuple[ast.expr, ast.expr | None]]] = {}
    for line, condition in _under_conditions(body):
        target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
        value: ast.expr | None = getattr(line, "value", None)
        match target:
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if value is not None:
                found.setdefault(name, []).append((value, condition))
    return found


def _lists(body: Sequence[ast.stmt]) -> "dict[str, list[tuple[ast.expr, ast.expr | None]] | None]":
    """What is put into local lists, in order."""
    found: dict[str, list[tuple[ast.expr, ast.expr | None]] | None] = {}
    for line, condition in _under_conditions(body):
        match line:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.List(elts=items))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.List(elts=items))
            ):
                found[name] = [(item, condition) for item in items]
                continue
            case ast.Expr(ast.Call(ast.Attribute(ast.Name(id=name), "append"), [item], [])):
                items = [item]
            case ast.Expr(ast.Call(ast.Attribute(ast.Name(id=name), "extend"), [ast.List(elts=items)], [])):
                pass
            case ast.AugAssign(ast.Name(id=name), ast.Add(), ast.List(elts=items)):
                pass
            case _:
                for node in ast.walk(line):
                    if isinstance(node, ast.Name) and node.id in found and not isinstance(line, ast.Assign):
                        found[node.id] = None
                continue
        put = found.get(name)
        if put is not None:
            put += [(item, condition) for item in items]
    return found


def _both(one: ast.expr | None, other: ast.expr) -> ast.expr:
    return other if one is None else ast.BoolOp(ast.And(), [one, other])


def bound_arguments(function: Callable[..., Any], call: ast.Call, skip: int = 0) -> dict[str, ast.expr]:
    """The arguments of a written call by name."""
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    found = {}
    for parameter, given in zip(parameters, call.args, strict=False):
        if isinstance(given, ast.Starred) or parameter.kind is parameter.VAR_POSITIONAL:
            break
        found[parameter.name] = given
    found.update({keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None})
    for parameter in parameters:
        if parameter.name not in found and type(parameter.default) in (bool, int, float, str):
            found[parameter.name] = ast.Constant(parameter.default)
    return found


def _inlined(function: types.FunctionType, call: ast.Call) -> ast.expr | None:
    """What a function of the author's returns, as an expression of what it is called with."""
    tree = parsed_function(function)
    if tree is None or not isinstance(tree.body[-1], ast.Return) or tree.body[-1].value is None:
        return None
    given = bound_arguments(function, call)
    local = settled_names(tree, set(given))
    return replaced(replaced(tree.body[-1].value, local), given)


def _list_name(expression: ast.expr, place: str) -> str:
    """The list of which an expression takes the item at a place."""
    for node in ast.walk(expression):
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Name(id=at)) if at == place:
                return name
    return ""


_Tree = TypeVar("_Tree", bound=ast.AST)


def replaced(tree: _Tree, known: Mapping[str, ast.expr]) -> _Tree:
    """A copy of a tree with expressions for some of its names."""

    class Replace(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return copy.deepcopy(known[node.id]) if node.id in known else node

    changed: _Tree = Replace().visit(copy.deepcopy(tree))
    return changed
