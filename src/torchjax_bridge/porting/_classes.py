"""One class for each torch class: where instances differ in settings alone, the settings are its arguments.

Works from the innermost class outwards, so that the arguments of a child are known when its parent is written.
"""

import ast
import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ._constructors import Call, Column, DifferError, Items, Tree, merge, render
from ._fields import Own, fields_of, sequential_items, state_fields
from ._hints import argument_names
from ._loops import with_loops
from ._lowering import Body, Statement, attribute_name, is_container
from ._model import Model
from ._modes import in_both_modes
from ._statements import Written

__all__ = ["Definition", "definitions"]

_MOST_NUMBERS = 3  # that the bodies of one class may differ in


@dataclass
class Definition:
    """One emitted class.

    Attributes:
        name: Its name.
        kind: The torch class.
        paths: The modules that are its instances.
        body: The code of one of them.
        params: The arguments of ``__init__`` by name, with the value of each instance.
        fields: The attributes, as source.
        base: The class that it derives from.
        input_shapes: The shapes of one instance's inputs, in the emitted order.
    """

    name: str
    kind: type[nn.Module]
    paths: list[str]
    written: Written
    body: Body
    params: dict[str, list[Any]] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    base: str = "nnx.Module"


@dataclass
class _Instance:
    path: str
    body: Body
    fields: dict[str, Tree]
    lines: Written


def definitions(model: Model) -> list[Definition]:
    """The classes of a translated model, each before those that use it."""
    return _Classes(model).build()


class _Classes:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.found: list[Definition] = []
        self.calls: dict[str, Call] = {}  # the constructor call of each instance
        self.names: set[str] = set()

    def build(self) -> list[Definition]:
        own = [path for path, body in self.model.bodies.items() if self._is_class(path, body)]
        height: dict[str, int] = {}
        for path in sorted(own, key=lambda path: -len(path.split(".")) if path else 1):
            inside = [
                other for other in own if other != path and other.startswith(f"{path}." if path else "")
            ]
            height[path] = 1 + max((height[other] for other in inside), default=0)
        kinds: dict[type, list[str]] = {}
        for path in own:
            kinds.setdefault(type(self.model.modules[path]), []).append(path)
        for kind, paths in sorted(kinds.items(), key=lambda item: max(height[path] for path in item[1])):
            nested = any(a != b and a.startswith(f"{b}." if b else "") for a in paths for b in paths)
            for level in sorted({height[path] for path in paths}) if nested else (None,):
                self._group(kind, [path for path in paths if level in (None, height[path])])
        return self.found

    def _is_class(self, path: str, body: Body) -> bool:
        module = body.frame.module
        return not is_container(module, nn.Sequential) or path in self.model.own_sequentials or not path

    def _group(self, kind: type[nn.Module], paths: Sequence[str]) -> None:
        clusters: list[list[_Instance]] = []
        for instance in map(self._instance, paths):
            for cluster in clusters:
                if self._joined([*cluster, instance]) is not None:
                    cluster.append(instance)
                    break
            else:
                clusters.append([instance])
        for cluster in clusters:
            self._define(kind, cluster)

    # --- one instance ---------------------------------------------------------------------------------------

    def _instance(self, path: str) -> _Instance:
        body = self.model.bodies[path]
        module = body.frame.module
        if is_container(module, nn.Sequential):
            items = sequential_items(self.model, path, module, body)
            fields = {**state_fields(body), "layers": Items("nnx.List([", items, "])")}
        else:
            fields = fields_of(self.model, body, path)
        fields = {name: self._resolved(tree) for name, tree in fields.items()}
        return _Instance(path, body, fields, self._written(path, body))

    def _written(self, path: str, body: Body) -> Written:
        lines = in_both_modes(body)
        module = self.model.modules[path]

        def length(owner: str) -> int | None:
            holder: nn.Module | None = module
            for part in owner.split(".")[1:]:
                if part != "layers" or not isinstance(holder, nn.Sequential):
                    holder = (
                        next((m for n, m in holder._modules.items() if attribute_name(n) == part), None)
                        if holder
                        else None
                    )
            return len(holder._modules) if isinstance(holder, nn.Sequential | nn.ModuleList) else None

        taken = {node.id for line in lines.lines for node in ast.walk(line) if isinstance(node, ast.Name)}
        return replace(lines, lines=with_loops(lines.lines, length, taken | set(lines.params)))

    def _resolved(self, tree: Tree) -> Tree:
        """The tree with the constructor calls of children in place."""
        if isinstance(tree, Own):
            return self.calls[tree.text]
        if isinstance(tree, Items):
            return Items(tree.start, [self._resolved(item) for item in tree.items], tree.end)
        return tree

    # --- several instances ----------------------------------------------------------------------------------

    def _joined(self, instances: list[_Instance]) -> tuple[_Instance, dict[str, Tree]] | None:
        """The instance that shows the code of all, and the merged attributes; None if they do not fit."""
        richest = max(instances, key=lambda one: (len(one.fields), -instances.index(one)))
        names = list(richest.fields)
        optional = {n for one in instances for n in names if n not in one.fields}
        if optional & {"rngs", "deterministic"} or any(set(one.fields) - set(names) for one in instances):
            return None
        shown = richest
        if optional:
            shown = self._with_optional(richest, optional)
            for one in instances:
                lacking = [name for name in names if name not in one.fields]
                plain = self._without(richest, lacking) if lacking else richest
                if plain is None or not _alike(plain.lines, one.lines):
                    return None
        elif any(not _alike(richest.lines, one.lines) for one in instances):
            return None
        try:
            fields = {n: merge([one.fields.get(n) for one in instances], n) for n in names}
        except DifferError:
            return None
        numbers = list(zip(*(_numbers(one.lines) for one in instances), strict=False)) if not optional else []
        varying = [place for place, values in enumerate(numbers) if len(set(values)) > 1]
        if len(varying) > _MOST_NUMBERS:
            return None
        if varying:
            made: dict[tuple[Any, ...], str] = {}
            for place in varying:
                made.setdefault(numbers[place], f"size{len(made) + 1}")
            lines = _with_attributes(shown.lines, {place: made[numbers[place]] for place in varying})
            shown = replace(shown, lines=lines)
            fields = {**{name: Column(list(values), name, name) for values, name in made.items()}, **fields}
        return shown, fields

    def _without(self, instance: _Instance, names: Sequence[str]) -> _Instance | None:
        """The instance if it lacked these layers: each gives what it is given."""
        plain = _body_without(instance.body, names)
        return replace(instance, body=plain, lines=self._written(instance.path, plain))

    def _with_optional(self, instance: _Instance, names: set[str]) -> _Instance:
        """The instance with ``x if self.layer is None else self.layer(x)`` for layers that some instances lack."""
        body = _body_with_optional(instance.body, names)
        return replace(instance, body=body, lines=self._written(instance.path, body))

    def _define(self, kind: type[nn.Module], instances: list[_Instance]) -> None:
        joined = self._joined(instances)
        if joined is None:
            raise AssertionError("instances that were joined one by one fit together")
        shown, fields = joined
        names = argument_names(kind, fields)
        name = self._name(kind)
        rendered = {field: render(tree, names.by_column) for field, tree in fields.items()}
        base = "nnx.Module"
        if "super()" in rendered:
            base = rendered["super()"].partition("(")[0]
        definition = Definition(
            name, kind, [one.path for one in instances], shown.lines, shown.body, names.params, rendered, base
        )
        self.found.append(definition)
        for place, one in enumerate(instances):
            kwargs: dict[str, Tree] = {
                param: Column([values[place]], param, param) for param, values in names.params.items()
            }
            self.calls[one.path] = Call(name, [], kwargs, {}, ("rngs=rngs",))

    def _name(self, kind: type[nn.Module]) -> str:
        base = kind.__name__.strip("_")
        name, count = base, 1
        while name in self.names:
            count += 1
            name = f"{base}{count}"
        self.names.add(name)
        return name


# --- bodies -------------------------------------------------------------------------------------------------


def _body_without(body: Body, names: Sequence[str]) -> Body:
    starts = [f"self.{name}(" for name in names]
    statements: list[Statement] = []
    same: dict[str, str] = {}
    for statement in body.statements:
        changed = re.sub(r"_v\d+_", lambda m: same.get(m.group(), m.group()), statement.text)
        for start in starts:
            changed = _unwrapped(changed, start)
        if re.fullmatch(r"_v\d+_", changed) and statement.target == statement.names[0]:
            same[statement.target] = changed
            continue
        statements.append(Statement(statement.names, statement.target, changed, statement.source))
    result = re.sub(r"_v\d+_", lambda m: same.get(m.group(), m.group()), body.result)
    training = None if body.training is None else _body_without(body.training, names)
    return replace(body, statements=statements, result=result, training=training)


def _body_with_optional(body: Body, names: set[str]) -> Body:
    statements = []
    for statement in body.statements:
        text = statement.text
        for name in names:
            text = _conditional(text, name)
        statements.append(Statement(statement.names, statement.target, text, statement.source))
    training = None if body.training is None else _body_with_optional(body.training, names)
    return replace(body, statements=statements, training=training)


def _alike(one: Written, other: Written) -> bool:
    """Whether two bodies are equal but for numbers."""
    return one.params == other.params and _abstract(one) == _abstract(other)


def _numbered(lines: Written) -> Iterator[ast.Constant]:
    for tree in (*lines.lines, lines.result):
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and type(node.value) in (int, float):
                yield node


def _numbers(lines: Written) -> list[Any]:
    return [node.value for node in _numbered(lines)]


def _abstract(lines: Written) -> list[str]:
    copied = copy.deepcopy(lines)
    for node in _numbered(copied):
        node.value = 0
    return [ast.dump(tree) for tree in (*copied.lines, copied.result)]


def _with_attributes(lines: Written, names: dict[int, str]) -> Written:
    """The code with some of its numbers replaced by attributes."""
    copied = copy.deepcopy(lines)
    constants = list(_numbered(copied))
    chosen = {id(constants[place]): name for place, name in names.items()}

    class Change(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.AST:
            name = chosen.get(id(node))
            return node if name is None else ast.parse(f"self.{name}", mode="eval").body

    change = Change()
    return replace(
        copied, lines=[change.visit(line) for line in copied.lines], result=change.visit(copied.result)
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens before ``start`` closes."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _unwrapped(text: str, start: str) -> str:
    """``f(self.layer(x))`` as ``f(x)``."""
    while start in text:
        begin = text.index(start)
        inner = begin + len(start)
        end = _closing(text, inner)
        text = text[:begin] + text[inner:end] + text[end + 1 :]
    return text


def _conditional(text: str, name: str) -> str:
    start = f"self.{name}("
    if start not in text:
        return text
    begin = text.index(start)
    inner = begin + len(start)
    end = _closing(text, inner)
    given = text[inner:end]
    return f"{text[:begin]}({given} if self.{name} is None else self.{name}({given})){text[end + 1 :]}"
