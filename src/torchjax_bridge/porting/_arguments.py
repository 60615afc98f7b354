"""The arguments of an emitted class: the author's, as far as his ``__init__`` explains what its instances hold.

Each setting that varies becomes an expression of arguments: the author's own where it fits every instance, else
a multiple of an argument, else an argument of its own.
"""

import ast
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ._author_init import AuthorInit, author_init
from ._columns import agree, eithers, equal, scalar, shown, text
from ._constructors import MISSING, Column, Given, Tree, columns
from ._expressions import Instances, UnknownError, plain
from ._rendering import PLACE

__all__ = ["Arguments", "arguments_of"]

_RESERVED = {"self", "rngs", "jax", "jnp", "nnx", "np", "nn", "partial", "key", PLACE}
_GENERIC = {"feature_group_count": "groups", "num_features": "features", "kernel_dilation": "dilation"}
_GENERIC |= {"strides": "stride"}
_NOT_COUNTS = {"kernel_size", "strides", "padding", "kernel_dilation", "stride", "dilation"}
_LARGEST_FACTOR = 8


@dataclass
class Arguments:
    """The arguments of a class.

    Attributes:
        params: By name, the value of each instance.
        defaults: The defaults of the last of them.
        texts: The expression of each column that varies, by the identity of the column.
    """

    params: dict[str, list[Any]] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)


def arguments_of(
    kind: type[nn.Module],
    fields: Mapping[str, Tree],
    modules: Sequence[nn.Module],
    reserved: Collection[str] = (),
) -> Arguments:
    """The arguments that explain every column of the attributes.

    Args:
        kind: The torch class.
        fields: Its attributes, merged over its instances.
        modules: The instances.
        reserved: Names that no argument may have.
    """
    return _Search(kind, fields, modules, {*_RESERVED, *reserved}).run()


class _Search:
    def __init__(
        self,
        kind: type[nn.Module],
        fields: Mapping[str, Tree],
        modules: Sequence[nn.Module],
        reserved: set[str],
    ) -> None:
        self.fields = fields
        self.reserved = reserved
        self.init: AuthorInit = author_init(kind)
        self.every = [(name, column) for name, tree in fields.items() for column in columns(tree)]
        self.flags = {id(tree.flag) for tree in eithers(list(fields.values()))}
        self.hints = self.init.hints(fields)
        self.instances = Instances(modules, {})
        self.expressions: dict[int, ast.expr] = {}
        self.made: dict[str, list[Any]] = {}  # arguments that the author has not
        self.defaults: dict[str, Any] = {}

    def run(self) -> Arguments:
        self._learn()
        names = [name for name in self.init.arguments if self._is_candidate(name)]
        rest = []
        for attribute, column in self.every:
            if column.varies and (column.is_given or not self._explained(column, names)):
                rest.append((attribute, column))
        self._join([item for item in rest if id(item[1]) not in self.flags], names)
        for attribute, column in rest:
            if id(column) in self.flags:
                self._flag(attribute, column)
        self._keep_written(names)
        return self._result(names)

    # --- what is known --------------------------------------------------------------------------------------

    def _learn(self) -> None:
        """The author's arguments, as far as attributes and layers show them."""
        known, count = self.instances.known, len(self.instances.modules)
        for attribute, given in self.init.assigned.items():
            for value, _ in given:
                if isinstance(value, ast.Name) and value.id in self.init.arguments:
                    values = [plain(getattr(module, attribute, MISSING)) for module in self.instances.modules]
                    if all(isinstance(v, bool | int | float | str | tuple) for v in values):
                        known.setdefault(value.id, values)
        for _ in range(4):
            for _, column in self.every:
                for hint in self.hints.get(id(column), ()):
                    self._solve(hint.expression, column)
        for name, values in list(known.items()):
            if MISSING in values:
                del known[name]
        for name, default in self.init.defaults.items():
            known.setdefault(name, [default] * count)

    def _solve(self, expression: ast.expr, column: Column) -> None:
        """Find the one argument that an expression, or each size of a shape, needs and nothing else shows."""
        if isinstance(expression, ast.Tuple) and not column.is_given:
            rows = [value if isinstance(value, tuple) else () for value in column.known]
            if all(len(row) == len(expression.elts) for row in rows):
                for at, item in enumerate(expression.elts):
                    sizes = [MISSING if row is MISSING else row[at] for row in column.values]
                    self._solve(item, Column(sizes, "size"))
            return
        known = self.instances.known
        names = {n.id for n in ast.walk(expression) if isinstance(n, ast.Name)} & set(self.init.arguments)
        for place, wanted in enumerate(column.values):
            if wanted is MISSING or column.is_given or id(column) in self.flags:
                continue
            unknown = [n for n in names if n not in known or known[n][place] is MISSING]
            if len(unknown) != 1:
                continue
            name, wanted = unknown[0], scalar(wanted)
            value = self._inverse(expression, name, place, wanted)
            if value is not MISSING:
                known.setdefault(name, [MISSING] * len(column.values))[place] = value

    def _inverse(self, expression: ast.expr, name: str, place: int, wanted: Any) -> Any:
        if isinstance(expression, ast.Name):
            return wanted
        if type(wanted) is not int:
            return MISSING
        if isinstance(self.init.defaults.get(name), bool):
            for value in (False, True):
                try:
                    if self.instances.values(expression, [place], {name: value}) == [wanted]:
                        return value
                except UnknownError:
                    pass
            return MISSING
        try:
            [low], [high] = (self.instances.values(expression, [place], {name: at}) for at in (0, 1))
            if high == low:
                return MISSING
            value = round((wanted - low) / (high - low))
            found = self.instances.values(expression, [place], {name: value}) == [wanted]
        except (UnknownError, TypeError):
            return MISSING
        return value if found else MISSING

    @property
    def _unknown(self) -> list[str]:
        """The author's arguments that nothing shows."""
        return [
            name for name in self.init.arguments if name not in self.instances.known and name not in self.made
        ]

    def _is_candidate(self, name: str) -> bool:
        values = self.instances.known.get(name, ())
        return name not in self.reserved and len({repr(value) for value in values}) > 1

    # --- columns --------------------------------------------------------------------------------------------

    def _explained(self, column: Column, names: Sequence[str]) -> bool:
        places = [place for place, value in enumerate(column.values) if value is not MISSING]
        wanted = [shown(column)[place] for place in places]
        for hint in self.hints.get(id(column), ()):
            try:
                if equal(self.instances.values(hint.expression, places), wanted, id(column) in self.flags):
                    self.expressions[id(column)] = self.instances.short(hint.expression, places, names)
                    return True
            except UnknownError:
                continue
        return False

    def _keep_written(self, names: Sequence[str]) -> None:
        """Settings that are the same in the few instances that have them, as the author wrote them.

        A shortcut that one block of a model has is made of the block's own arguments all the same.
        """
        used = _names_in(self.expressions.values()).intersection(names)
        for _, column in self.every:
            places = [place for place, value in enumerate(column.values) if value is not MISSING]
            if column.varies or len(places) in (0, len(column.values)) or id(column) in self.expressions:
                continue
            for hint in self.hints.get(id(column), ()):
                wanted = [shown(column)[place] for place in places]
                if not _names_in([hint.expression]) & used or id(column) in self.flags:
                    continue
                try:
                    if equal(self.instances.values(hint.expression, places), wanted, False):
                        self.expressions[id(column)] = self.instances.settled(hint.expression, places, used)
                        break
                except UnknownError:
                    continue

    def _join(self, rest: list[tuple[str, Column]], names: list[str]) -> None:
        """Columns that no expression of the author's explains: equal ones are one argument."""
        groups: list[list[tuple[str, Column]]] = []
        for item in sorted(rest, key=lambda item: len(item[1].values) - len(item[1].known)):
            group = next((group for group in groups if agree(group, item[1])), None)
            if group is None:
                groups.append([item])
            else:
                group.append(item)
        order = {id(column): place for place, (_, column) in enumerate(self.every)}
        groups.sort(key=lambda group: min(order[id(column)] for _, column in group))
        for group in groups:
            values = [
                next((v for _, c in group if (v := shown(c)[i]) is not MISSING), MISSING)
                for i in range(len(group[0][1].values))
            ]
            expression = self._explained_elsewhere(values)
            expression = expression or self._related(values, [*names, *self.made], group[0][1].setting)
            if expression is None:
                name = self._name(group, _paths(group, groups))
                self.made[name] = self.instances.known[name] = values
                self._default(name, values, group[0][1].setting)
                expression = ast.Name(name, ast.Load())
            for _, column in group:
                self.expressions[id(column)] = expression

    def _default(self, name: str, values: Sequence[Any], setting: str) -> None:
        """A setting that most instances share has it as default."""
        known = [value for value in values if value is not MISSING]
        most = max(known, key=lambda value: (known.count(value), -known.index(value)))
        is_size = type(most) is int and setting not in _NOT_COUNTS
        if len(known) > 2 and 2 * known.count(most) > len(known) and not (is_size or isinstance(most, Given)):
            self.defaults[name] = most

    def _explained_elsewhere(self, wanted: Sequence[Any]) -> ast.expr | None:
        """The expression of a column with the same values."""
        places = [place for place, value in enumerate(wanted) if value is not MISSING]
        for _, column in self.every:
            values = [shown(column)[place] for place in places]
            if id(column) in self.expressions and equal(values, [wanted[place] for place in places], False):
                return self.expressions[id(column)]
        return None

    def _related(self, wanted: Sequence[Any], names: Sequence[str], setting: str) -> ast.expr | None:
        """Another argument, or a multiple or a part of one."""
        places = [place for place, value in enumerate(wanted) if value is not MISSING]
        given = [wanted[place] for place in places]
        for name in names:
            known = [self.instances.known[name][place] for place in places]
            if equal(known, given, False):
                return ast.Name(name, ast.Load())
        if setting == "padding":  # half of the kernel, as most authors have it
            for name in names:
                known = [self.instances.known[name][place] for place in places]
                is_kernel = "kernel" in name and all(type(size) is int and size % 2 for size in known)
                if is_kernel and [size // 2 for size in known] == given:
                    return ast.BinOp(ast.Name(name, ast.Load()), ast.FloorDiv(), ast.Constant(2))
        if setting in _NOT_COUNTS or any(type(value) is not int or value < 3 for value in given):
            return None
        if self._unknown:  # an argument of the author's explains it better
            return None
        for name in names:
            known = [self.instances.known[name][place] for place in places]
            if any(type(value) is not int or value <= 0 for value in known) or len(set(known)) < 2:
                continue
            for factor in range(2, _LARGEST_FACTOR + 1):
                if [factor * value for value in known] == given:
                    return ast.BinOp(ast.Constant(factor), ast.Mult(), ast.Name(name, ast.Load()))
                if [value // factor for value in known] == given:
                    return ast.BinOp(ast.Name(name, ast.Load()), ast.FloorDiv(), ast.Constant(factor))
        return None

    def _name(self, group: list[tuple[str, Column]], paths: list[str]) -> str:
        group = sorted(group, key=lambda item: item[1].place == "")
        hints = [hint for _, column in group for hint in self.hints.get(id(column), ())]
        first, column = group[0]
        generic = _GENERIC.get(column.setting, column.setting)
        settings = {column.setting for _, column in group}
        wanted = [hint.name for hint in hints if hint.name]
        wanted += [name for name in self._unknown if any(_is_part(setting, name) for setting in settings)]
        wanted += [column.setting for name, column in group if column.setting == name]
        return self._free(
            [*paths, *wanted, generic, f"{first}_{generic}", *(f"{generic}{i}" for i in range(2, 100))]
        )

    def _free(self, wanted: Sequence[str]) -> str:
        taken = {*self.reserved, *self.made, *(n for n in self.init.arguments if self._is_candidate(n))}
        return next(name for name in wanted if name.isidentifier() and name not in taken)

    def _flag(self, attribute: str, column: Column) -> None:
        """An optional layer that no condition of the author's explains."""
        for name, values in self.made.items():
            may_lack = None not in values and self.init.defaults.get(name) is None
            if may_lack and equal([one is not MISSING for one in values], column.values, True):
                test = ast.Compare(ast.Name(name, ast.Load()), [ast.IsNot()], [ast.Constant(None)])
                self.expressions[id(column)] = test
                self.defaults[name] = None
                return
            if equal(values, column.values, False):
                self.expressions[id(column)] = ast.Name(name, ast.Load())
                return
        of_item = [] if column.place else [column.setting]  # a layer of a list
        attribute = attribute.partition("{")[0]  # of numbered layers
        wanted = [*of_item, attribute, f"has_{attribute}"]
        name = self._free([*wanted, *(f"{wanted[0]}{i}" for i in range(2, 100))])
        self.made[name] = list(column.values)
        self.defaults[name] = False
        self.expressions[id(column)] = ast.Name(name, ast.Load())

    # --- the result -----------------------------------------------------------------------------------------

    def _result(self, names: Sequence[str]) -> Arguments:
        used = _names_in(self.expressions.values())
        params = {name: self.instances.known[name] for name in names if name in used}
        params |= {name: values for name, values in self.made.items() if name in used}
        defaults = dict(self.defaults)
        for name, values in params.items():
            if name in self.init.defaults and self.init.defaults[name] in values:
                defaults[name] = self.init.defaults[name]
            elif MISSING in values and name not in defaults:
                known = next(value for value in values if value is not MISSING)
                defaults[name] = None if isinstance(known, Given) else type(known)()
            params[name] = [defaults[name] if value is MISSING else value for value in values]
        ordered = sorted(params, key=lambda name: name in defaults)
        texts = {}
        for _, column in self.every:
            expression = self.expressions.get(id(column))
            if expression is not None:
                texts[id(column)] = text(expression, column, is_whole=self._is_whole(expression, column))
        return Arguments(
            {name: params[name] for name in ordered},
            {n: defaults[n] for n in ordered if n in defaults},
            texts,
        )

    def _is_whole(self, expression: ast.expr, column: Column) -> bool:
        """Whether an expression gives the tuples of a column, and not the number that they repeat."""
        places = [place for place, value in enumerate(column.values) if value is not MISSING]
        try:
            return any(isinstance(value, tuple) for value in self.instances.values(expression, places))
        except UnknownError:
            return False


def _names_in(expressions: Iterable[ast.expr]) -> set[str]:
    return {node.id for e in expressions for node in ast.walk(e) if isinstance(node, ast.Name)}


def _is_part(setting: str, name: str) -> bool:
    """Whether an argument's name holds that of a setting, which says more than that it is some size."""
    return setting in name and not setting.startswith("size")


def _paths(group: list[tuple[str, Column]], groups: list[list[tuple[str, Column]]]) -> list[str]:
    """The name of an argument of the model itself that stands for one of several modules: their paths differ."""
    column = group[0][1]
    alike = [other for other in groups if other[0][1].setting == column.setting]
    if not column.is_given or len(column.values) > 1 or len(alike) < 2:
        return []
    name = column.values[0].path.replace(".", "_")
    return [name if name.isidentifier() else f"layer{name}"]
