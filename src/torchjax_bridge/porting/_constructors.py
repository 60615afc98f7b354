"""Constructor calls as trees, and what several trees of one class have in common.

The instances of a torch class make equal trees but for some settings. Where settings differ there is a
`Column`: one value for each instance. Columns become the arguments of the emitted class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "MISSING",
    "Call",
    "Code",
    "Column",
    "Either",
    "Given",
    "Items",
    "Text",
    "Tree",
    "columns",
    "literal",
    "merge",
    "render",
]


# Settings of layers that a reader expects in this order; any other comes after them.
_ORDER = ("strides", "padding", "kernel_dilation", "feature_group_count", "use_bias")
_PLACES = {name: place for place, name in enumerate(_ORDER)}


class _Missing:
    """The setting of a layer that an instance has not."""

    def __repr__(self) -> str:
        return "None"


MISSING = _Missing()


@dataclass(frozen=True)
class Given:
    """A setting that no file can hold, so that it is an argument of every class up to the model itself.

    Attributes:
        path: The torch module that it stands for.
    """

    path: str


@dataclass(frozen=True)
class Code:
    """A setting that is code: the name of a function, or a lambda."""

    text: str = "None"


@dataclass(eq=False)
class Column:
    """A setting, with its value in each instance.

    Attributes:
        values: One for each instance; `MISSING` where the instance lacks the layer.
        setting: The name of the setting.
        place: The attribute of the class that it belongs to.
    """

    values: list[Any]
    setting: str
    place: str = ""

    @property
    def known(self) -> list[Any]:
        """The values of the instances that have the layer."""
        return [value for value in self.values if value is not MISSING]

    @property
    def varies(self) -> bool:
        """Whether instances differ, or the value must be given."""
        return self.is_given or len({_key(value) for value in self.known}) > 1

    @property
    def is_given(self) -> bool:
        """Whether no file can hold the value."""
        return any(isinstance(value, Given) for value in self.known)


@dataclass(eq=False)
class Text:
    """Source that is the same in every instance."""

    text: str


@dataclass(eq=False)
class Call:
    """``function(*args, **kwargs)``; a keyword that equals its default is left out."""

    function: str
    args: "list[Tree]" = field(default_factory=list)
    kwargs: "dict[str, Tree]" = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ends: tuple[str, ...] = ()


@dataclass(eq=False)
class Items:
    """``nnx.Sequential(a, b)`` and the like: ``start``, items, ``end``; of a Sequential, the module."""

    start: str
    items: "list[Tree]"
    end: str
    path: str = ""


@dataclass(eq=False)
class Either:
    """A layer that only some instances have; ``flag`` says which.

    Attributes:
        flag: Whether an instance has it.
        then: The layer.
        otherwise: What the others have; ``""`` if they lack the attribute.
    """

    flag: Column
    then: "Tree"
    otherwise: str


Tree = Column | Text | Call | Items | Either


def _key(value: Any) -> str:
    return repr(value)


class DifferError(Exception):
    """The trees have not the same form."""


def merge(trees: Sequence[Tree | None], name: str) -> Tree:
    """One tree for all instances.

    Args:
        trees: The tree of each instance; None where it lacks the layer.
        name: The attribute that holds the layer.

    Raises:
        DifferError: They have not the same form.
    """
    poor = [tree is None or (isinstance(tree, Items) and not tree.items) for tree in trees]
    if all(poor):
        present = [tree for tree in trees if tree is not None]
        if len(present) not in (0, len(trees)):
            raise DifferError
        return present[0] if present else Text("None")
    if any(poor):
        empties = {
            f"{tree.start}{tree.end}" if isinstance(tree, Items) else None
            for tree, lacks in zip(trees, poor, strict=True)
            if lacks
        }
        if len(empties) > 1:
            raise DifferError
        flag = Column([not p for p in poor], f"has_{name}", name)
        return Either(
            flag,
            _merge([None if p else t for t, p in zip(trees, poor, strict=True)]),
            empties.pop() or "None",
        )
    return _merge(trees)


def _merge(trees: Sequence[Tree | None]) -> Tree:
    present = [tree for tree in trees if tree is not None]
    first = present[0]
    if any(type(tree) is not type(first) for tree in present):
        raise DifferError
    if isinstance(first, Text):
        if len({tree.text for tree in present}) > 1:  # type: ignore[union-attr]
            raise DifferError
        return first
    if isinstance(first, Column):
        values: list[Any] = []
        for tree in trees:
            values += [MISSING] if tree is None else tree.values  # type: ignore[union-attr]
        return Column(values, first.setting, first.place)
    if isinstance(first, Items):
        if len({(tree.start, tree.end, len(tree.items)) for tree in present}) > 1:  # type: ignore[union-attr]
            raise DifferError
        return Items(first.start, _merge_each([tree and tree.items for tree in trees]), first.end)  # type: ignore[union-attr]
    if isinstance(first, Call):
        calls: list[Call] = present  # type: ignore[assignment]
        if len({(call.function, len(call.args), call.ends) for call in calls}) > 1:
            raise DifferError
        args = _merge_each([tree and tree.args for tree in trees])  # type: ignore[union-attr]
        kwargs: dict[str, Tree] = {}
        defaults = {name: value for call in calls for name, value in call.defaults.items()}
        for name in dict.fromkeys(name for call in calls for name in call.kwargs):
            column: list[Tree | None] = []
            for tree in trees:
                value = tree.kwargs.get(name) if isinstance(tree, Call) else None
                if isinstance(tree, Call) and value is None:
                    if name not in defaults:
                        raise DifferError
                    value = Column([defaults[name]], name)
                column.append(value)
            kwargs[name] = _merge(column)
        return Call(first.function, args, kwargs, defaults, first.ends)
    raise DifferError


def _merge_each(lists: Sequence[Any]) -> list[Tree]:
    length = len(next(items for items in lists if items is not None))
    return [
        _merge([items[place] if items is not None else None for items in lists]) for place in range(length)
    ]


def columns(tree: Tree) -> list[Column]:
    """The columns of a tree, in order."""
    if isinstance(tree, Column):
        return [tree]
    if isinstance(tree, Items):
        return [column for item in tree.items for column in columns(item)]
    if isinstance(tree, Call):
        return [column for item in (*tree.args, *tree.kwargs.values()) for column in columns(item)]
    if isinstance(tree, Either):
        return [tree.flag, *columns(tree.then)]
    return []


def render(tree: Tree, names: Mapping[int, str]) -> str:
    """The source of a tree.

    Args:
        tree: The tree.
        names: The argument that stands for a column, by the identity of the column; any other column has one value.
    """
    if isinstance(tree, Text):
        return tree.text
    if isinstance(tree, Column):
        return names.get(id(tree)) or literal(tree.known[0] if tree.known else None)
    if isinstance(tree, Items):
        inside = _repeated([render(item, names) for item in tree.items])
        if tree.start.endswith("[") and inside.startswith("*[") and _closes(inside, 1) == len(inside) - 1:
            inside = inside[2:-1]  # the list is one comprehension
        return f"{tree.start}{inside}{tree.end}"
    if isinstance(tree, Either):
        flag = names.get(id(tree.flag))
        text = render(tree.then, names)
        return f"{text} if {flag} else {tree.otherwise}" if flag and tree.otherwise else text
    keywords = []
    for name, value in sorted(tree.kwargs.items(), key=lambda item: _PLACES.get(item[0], len(_PLACES))):
        text = render(value, names)
        if name in tree.defaults and text == literal(tree.defaults[name]):
            continue
        keywords.append(f"{name}={text}")
    return (
        f"{tree.function}({', '.join([*(render(arg, names) for arg in tree.args), *keywords, *tree.ends])})"
    )


def _closes(text: str, start: int) -> int:
    """Where the bracket at ``start`` closes; strings of settings hold no brackets."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth == 0:
            return place
    return len(text)


def _repeated(items: list[str]) -> str:
    """Equal items in a row as a comprehension."""
    found, start = [], 0
    while start < len(items):
        end = start
        while end < len(items) and items[end] == items[start]:
            end += 1
        if end - start >= 3 and items[start].endswith(")"):
            found.append((f"{items[start]} for _ in range({end - start})", True))
        else:
            found += [(item, False) for item in items[start:end]]
        start = end
    return ", ".join(f"*[{text}]" if repeated else text for text, repeated in found)


def literal(value: Any) -> str:
    """A setting as source."""
    if isinstance(value, Code):
        return value.text
    if isinstance(value, str):
        return '"' + value.replace('"', '\\"') + '"'
    if isinstance(value, float):
        for bottom in range(2, 64):
            top = round(value * bottom)
            if top and top / bottom == value and len(f"{top} / {bottom}") < len(repr(value)):
                return f"{top} / {bottom}"
        return f"{value!r}"
    if isinstance(value, tuple):
        items = [literal(item) for item in value]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    return str(value) if type(value).__name__ == "Initializer" else repr(value)
