"""One class for each torch class: where instances differ in settings alone, the settings are its arguments.

Works from the innermost class outwards, so that the arguments of a child are known when its parent is written.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flax import nnx
from torch import nn

from torchjax_bridge.recording import Fault, SourceLine

from ._arguments import Arguments, arguments_of
from ._attributes import is_container
from ._authors import author_loops
from ._axis_letters import AxisLetters
from ._bodies import abstract, alike, numbers, returned, with_attributes
from ._body import Body
from ._branches import Variant, merged
from ._calls import is_function
from ._constructors import Call, Column, Either, Items, Tree, is_uneven
from ._definition import Definition
from ._expressions import plain
from ._fields import Own, fields_of, local_modules, sequential_items, state_fields
from ._growing_lists import has_growing_list
from ._handed import LOCAL, made_first
from ._linen_calls import LINEN_NAMES, Modes
from ._linen_layers import linen_fields
from ._loops import with_loops
from ._merging import DifferError, merge
from ._model import Model
from ._modes import in_both_modes
from ._nesting import in_order
from ._numbered import Family, as_attributes, as_list, families, in_place_of
from ._optional_layers import body_with_optional, body_without
from ._rendering import PLACE, rendered_fields
from ._reserved import attribute_name
from ._sequences import is_chain
from ._shape_text import shape_text
from ._starts import chosen_starts
from ._statements import Written, arguments

__all__ = ["Definition", "definitions"]

_MOST_NUMBERS = 3  # that the bodies of one class may differ in


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
        self.names = {part.imported[1] for part in model.parts.values() if part.imported}
        self.letters = AxisLetters(model.recording)
        self.modes = Modes(model) if model.to == "linen" else None
        self.families: dict[str, list[Family]] = {}  # of each instance

    def build(self) -> list[Definition]:
        own = [path for path in self.model.bodies if self.model.is_class(path)]
        for kind, paths in in_order(own, {path: type(self.model.modules[path]) for path in own}):
            self._group(kind, paths)
        return self.found

    def _group(self, kind: type[nn.Module], paths: Sequence[str]) -> None:
        equal: dict[tuple[object, ...], list[_Instance]] = {}
        for instance in map(self._instance, paths):
            key = (*instance.fields, *abstract(instance.lines))
            equal.setdefault(key, []).append(instance)
        groups: list[list[_Instance]] = []
        for same in equal.values():
            groups += [same] if self._joined(same) is not None else self._clusters([[one] for one in same])
        for cluster in self._clusters(groups):
            self._define(kind, cluster)

    def _clusters(self, groups: list[list[_Instance]]) -> list[list[_Instance]]:
        """The fewest groups that each fit one class: all of them, else greedily."""
        every = [instance for group in groups for instance in group]
        if len(groups) > 1 and self._joined(every) is not None:
            return [every]
        clusters: list[list[_Instance]] = []
        for group in groups:
            for cluster in clusters:
                if self._joined([*cluster, *group]) is not None:
                    cluster += group
                    break
            else:
                clusters.append(list(group))
        return clusters

    # --- one instance ---------------------------------------------------------------------------------------

    def _instance(self, path: str) -> _Instance:
        body = self.model.bodies[path]
        module = body.frame.module
        if is_container(module, nn.Sequential):
            items = sequential_items(self.model, path, module, body)
            if not self._is_loop(path, body):
                items = items[: _called_items(self.model, path)]
            fields = state_fields(body)
            if items:
                fields["layers"] = Items("nnx.List([", items, "])")
            fields.update(self.model.ties_in(path))
        else:
            fields = fields_of(self.model, body, path)
        made = self.model.handed.made_in(path)
        fields = {**local_modules(self.model, made), **fields}
        fields = made_first({name: self._resolved(tree) for name, tree in fields.items()}, made)
        self.families[path] = families(type(module), fields)
        lines = self._written(path, body)
        for family in self.families[path]:
            fields = in_place_of(fields, family)
        if self.modes is not None:
            fields = linen_fields(fields, self.modes)
        return _Instance(path, body, fields, lines)

    def _written(self, path: str, body: Body) -> Written:
        if self._is_loop(path, body):
            [given] = arguments(body)
            loop = f"for layer in self.layers:\n    {given} = layer({given})\nreturn {given}"
            return Written([given], ast.parse(loop).body)
        return self._looped(path, in_both_modes(body))

    def _is_loop(self, path: str, body: Body) -> bool:
        """Whether a body calls all layers of a Sequential in turn, and tells them nothing."""
        module = self.model.modules[path]
        if not is_container(module, nn.Sequential) or body.asks_mode or not is_chain(body):
            return False
        told = self.modes is not None and any(
            self.modes.keyword(f"{path}.{name}" if path else name) for name in module._modules
        )
        return not told and not any("self." in text for text, _, _ in body.functions.values())

    def _looped(self, path: str, lines: Written) -> Written:
        module = self.model.modules[path]
        if self.modes is not None:
            lines = replace(lines, lines=self.modes.told(path, lines.lines))

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
        code = self.model.bodies[path].frame.code
        author = author_loops(code) if code is not None else {}
        looped = lines.lines
        for family in [*self.families.get(path, ())]:
            listed = with_loops(as_list(looped, family), family.length, taken | set(lines.params), {})
            attributes = None if PLACE in taken else as_attributes(listed, family)
            if attributes is None:
                self.families[path].remove(family)
            else:
                looped = attributes
        looped = with_loops(looped, length, taken | set(lines.params), author)
        return replace(lines, lines=returned(looped))

    def _resolved(self, tree: Tree) -> Tree:
        """The tree with the constructor calls of children in place."""
        if isinstance(tree, Own):
            return self.calls[tree.text]
        if isinstance(tree, Items):
            return replace(tree, items=[self._resolved(item) for item in tree.items])
        return tree

    # --- several instances ----------------------------------------------------------------------------------

    def _joined(self, instances: list[_Instance]) -> tuple[_Instance, dict[str, Tree]] | None:
        """The instance that shows the code of all, and the merged attributes; None if they do not fit."""
        if len({tuple(name for name in one.fields if "{" in name) for one in instances}) > 1:
            return None  # numbered layers that only some bodies loop over
        names = list(dict.fromkeys(name for one in _by_wealth(instances) for name in one.fields))
        instances = self._with_settings(_with_state(instances))
        try:
            fields = {n: merge([one.fields.get(n) for one in instances], n) for n in names}
        except DifferError:
            return None
        variants = _variants(instances)
        differing: list[tuple[Any, ...]] = []
        if len(variants) == 1:
            shown: _Instance | None = instances[0]
            differing = list(zip(*(numbers(one.lines) for one in instances), strict=True))
        elif (
            not any(map(is_uneven, fields.values()))
            and all(numbers(one.lines) == numbers(group[0].lines) for group in variants for one in group)
            and (found := merged([self._variant(group) for group in variants]))
        ):
            lines, read = found
            shown = replace(instances[0], lines=self._looped(instances[0].path, lines))
            fields = {**self._settings(instances, read - set(fields)), **fields}
        else:
            shown = self._with_all_layers(instances, names)
        if shown is None:
            return None
        if not has_growing_list(shown.lines.lines) and any(
            has_growing_list(one.lines.lines) for one in instances
        ):
            return None  # a list that a condition would take apart
        text = "".join(map(ast.unparse, shown.lines.lines))
        for name, tree in fields.items():
            if isinstance(tree, Either) and tree.otherwise == "None" and f"self.{name} is " not in text:
                fields[name] = replace(tree, otherwise="")
        varying = [place for place, values in enumerate(differing) if len(set(values)) > 1]
        if len({differing[place] for place in varying}) > _MOST_NUMBERS:
            return None
        if varying:
            made: dict[tuple[Any, ...], str] = {}
            for place in varying:
                made.setdefault(differing[place], f"size{len(made) + 1 if made else ''}")
            lines = with_attributes(shown.lines, {place: made[differing[place]] for place in varying})
            shown = replace(shown, lines=lines)
            fields = {**{name: Column(list(values), name, name) for values, name in made.items()}, **fields}
        return shown, fields

    def _with_settings(self, instances: list[_Instance]) -> list[_Instance]:
        """The instances, with the settings that the code of any of them reads, where all have them."""
        read = {n for one in instances for n, tree in one.fields.items() if isinstance(tree, Column)}
        found = []
        for one in instances:
            module = self.model.modules[one.path]
            lacking = {n for n in read - set(one.fields) if n not in module._modules and hasattr(module, n)}
            more: dict[str, Tree] = {n: Column([plain(getattr(module, n))], n, n) for n in sorted(lacking)}
            found.append(replace(one, fields={**more, **one.fields}) if more else one)
        return found

    def _with_all_layers(self, instances: list[_Instance], names: Sequence[str]) -> _Instance | None:
        """The instance that has every layer, if the others do the same without those that they lack."""
        richest = _by_wealth(instances)[0]
        optional = {n for one in instances for n in names if n not in one.fields}
        if set(names) - set(richest.fields):
            return None
        for one in instances:
            lacking = [name for name in names if name not in one.fields]
            plain = self._without(richest, lacking) if lacking else richest
            if not alike(plain.lines, one.lines) or numbers(plain.lines) != numbers(one.lines):
                return None
        return self._with_optional(richest, optional) if optional else richest

    def _variant(self, group: Sequence[_Instance]) -> Variant:
        modules = [self.model.modules[one.path] for one in group]
        return Variant(group[0].body, modules, set(group[0].fields))

    def _settings(self, instances: Sequence[_Instance], names: set[str]) -> dict[str, Tree]:
        """Attributes that a condition of the body reads."""
        found: dict[str, Tree] = {}
        for name in sorted(names):
            values = [getattr(self.model.modules[one.path], name) for one in instances]
            if any(isinstance(value, nn.Module) for value in values):
                values = [value is not None for value in values]
            found[name] = Column([plain(value) for value in values], name, name)
        return found

    def _without(self, instance: _Instance, names: Sequence[str]) -> _Instance:
        """The instance if it lacked these layers: each gives what it is given."""
        plain = body_without(instance.body, names)
        return replace(instance, body=plain, lines=self._written(instance.path, plain))

    def _with_optional(self, instance: _Instance, names: set[str]) -> _Instance:
        """The instance with ``x if self.layer is None else self.layer(x)`` for layers that some instances lack."""
        body = body_with_optional(instance.body, names)
        return replace(instance, body=body, lines=self._written(instance.path, body))

    def _define(self, kind: type[nn.Module], instances: list[_Instance]) -> None:
        if self.modes is None and all(map(_is_its_base, instances)):
            for one in instances:
                self.calls[one.path] = one.fields["super()"]  # type: ignore[assignment]
            return
        joined = self._joined(instances)
        if joined is None:
            raise AssertionError("instances that were joined one by one fit together")
        shown, fields = joined
        modules = [self.model.modules[one.path] for one in instances]
        local = [name.removeprefix(LOCAL) for name in fields if name.startswith(LOCAL)]
        names = arguments_of(kind, fields, modules, local)
        rendered, counts = rendered_fields(fields, names.texts)
        if self.modes is not None and (taken := _taken(names, rendered)):
            names = arguments_of(kind, fields, modules, taken)
            rendered, counts = rendered_fields(fields, names.texts)
        if self.modes is not None and (clash := sorted(LINEN_NAMES.intersection(fields))):
            reason = (
                f"every module of linen has a {clash[0]} of its own; rename {kind.__name__}'s, or port to nnx"
            )
            self.model.fault(Fault(reason, instances[0].path, SourceLine()))
        name = self._name(kind)
        conditions = {
            field: names.texts[id(tree.flag)]
            for field, tree in fields.items()
            if isinstance(tree, Either) and not tree.otherwise
        }
        derives = "super()" in rendered and self.modes is None
        base = rendered["super()"].partition("(")[0] if derives else "nnx.Module"
        needs_rngs = "" in [one.path for one in instances] or any("rngs" in t for t in rendered.values())
        self.found.append(
            Definition(
                name,
                kind,
                [one.path for one in instances],
                shown.lines,
                shown.body,
                shape_text([one.body for one in instances], self.letters),
                names.params,
                names.defaults,
                rendered,
                conditions,
                counts,
                base,
                needs_rngs,
                self.modes is not None,
                self.modes is not None and self.modes.has_mode(instances[0].path),
                chosen_starts(fields),
            )
        )
        for place, one in enumerate(instances):
            args: list[Tree] = [
                Column([values[place]], param, param)
                for param, values in names.params.items()
                if param not in names.defaults
            ]
            kwargs: dict[str, Tree] = {
                param: Column([names.params[param][place]], param, param) for param in names.defaults
            }
            ends = ("rngs=rngs",) if needs_rngs and self.modes is None else ()
            self.calls[one.path] = Call(name, args, kwargs, names.defaults, ends)

    def _name(self, kind: type[nn.Module]) -> str:
        base = kind.__name__.strip("_")
        name, count = base, 1
        while name in self.names or _is_layer_of_nnx(name):  # by which the file may call it with settings
            count += 1
            name = f"{base}{count}"
        self.names.add(name)
        return name


def _is_layer_of_nnx(name: str) -> bool:
    layer = getattr(nnx, name, None)
    return isinstance(layer, type) and issubclass(layer, nnx.Module) and layer is not nnx.Sequential


def _is_its_base(instance: _Instance) -> bool:
    """Whether an instance adds nothing to the layer of Flax that it derives from."""
    call = f"return super().__call__({', '.join(instance.lines.params)})"
    return [*instance.fields] == ["super()"] and [*map(ast.unparse, instance.lines.lines)] == [call]


def _called_items(model: Model, path: str) -> int:
    """How many layers of a Sequential stand up to the last one that is no function, which is code of the class."""
    children = list(model.modules[path]._modules.items())
    for count, (name, child) in reversed(list(enumerate(children, start=1))):
        place = f"{path}.{name}" if path else name
        lacks = child is None or is_function(child) or name in model.dropped(path)
        if place in model.parts or not (lacks or model.homes[id(child)][0] != place):
            return count
    return 0


def _taken(names: Arguments, rendered: Mapping[str, str]) -> set[str]:
    """The arguments that are called like an attribute of another value, which fields of linen cannot be."""
    return {name for name in names.params if rendered.get(name, name) != name} | (
        set(names.params) & LINEN_NAMES
    )


def _with_state(instances: list[_Instance]) -> list[_Instance]:
    """The instances, with random numbers and a mode for all if one needs them."""
    shared: dict[str, Tree] = {
        name: one.fields[name]
        for one in instances
        for name in ("rngs", "deterministic")
        if name in one.fields
    }
    return [replace(one, fields={**one.fields, **shared}) for one in instances]


def _by_wealth(instances: Sequence[_Instance]) -> list[_Instance]:
    """The instances, that with the most attributes first."""
    return sorted(instances, key=lambda one: -len(one.fields))


def _variants(instances: Sequence[_Instance]) -> list[list[_Instance]]:
    """The instances by their bodies."""
    found: dict[tuple[str, ...], list[_Instance]] = {}
    for one in instances:
        found.setdefault((*one.lines.params, *abstract(one.lines)), []).append(one)
    return list(found.values())
