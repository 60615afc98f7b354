"""Constructor calls as trees, and the settings in which the trees of one class differ.

The instances of a torch class make equal trees but for some settings. Where settings differ there is a
`Column`: one value for each instance. Columns become the arguments of the emitted class.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "MISSING",
    "Call",
    "Code",
    "Column",
    "Either",
    "Given",
    "Handed",
    "Indexed",
    "Items",
    "Numbered",
    "Run",
    "Start",
    "Text",
    "Tree",
    "columns",
    "indexed",
    "is_uneven",
]


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
class Handed(Given):
    """A module that other modules hold, too: an argument of every class up to the one that makes it."""


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
        written: The expression of the author's that gives it, where that is known.
    """

    values: list[Any]
    setting: str
    place: str = ""
    written: str = ""

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
    """``nnx.Sequential(a, b)`` and the like: ``start``, items, ``end``; of a Sequential, the module.

    ``between`` stands between the items.
    """

    start: str
    items: "list[Tree]"
    end: str
    path: str = ""
    between: str = ", "


@dataclass(eq=False)
class Start(Items):
    """A parameter or a buffer, and the values that it has in a new model.

    Attributes:
        is_chosen: Whether these are the port's own choice.
        fallback: The tree of the port's own choice, for instances whose values are made in different ways.
    """

    is_chosen: bool = False
    fallback: "Start | None" = None


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


@dataclass(eq=False)
class Indexed:
    """A setting that follows the place ``i`` of a layer in a `Run`.

    Attributes:
        kind: ``steps``: ``start + step * i``; ``first``: one for the first layer, another for the rest; ``listed``:
            an item of a tuple.
        parts: The start, the first and the rest, or the tuple of each instance.
        step: By how much it grows.
    """

    kind: str
    parts: list[Column]
    step: int = 0


@dataclass(eq=False)
class Run:
    """``*[item for i in range(count)]``: layers that instances have in different numbers."""

    item: "Tree"
    count: Column


@dataclass(eq=False)
class Numbered:
    """Layers that stand in attributes of one name with numbers: a `Run`, once instances are merged."""

    items: "list[Tree]"
    counted_by: str


Tree = Column | Text | Call | Items | Either | Indexed | Run | Numbered


def _key(value: Any) -> str:
    return repr(value)


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
    if isinstance(tree, Run):
        return [*columns(tree.item), tree.count]
    return [*tree.parts] if isinstance(tree, Indexed) else []


def indexed(tree: Tree) -> Iterator[Indexed]:
    """The settings of a layer that follow its place."""
    if isinstance(tree, Indexed):
        yield tree
    for item in tree.items if isinstance(tree, Items) else ():
        yield from indexed(item)
    for item in (*tree.args, *tree.kwargs.values()) if isinstance(tree, Call) else ():
        yield from indexed(item)


def is_uneven(tree: Tree) -> bool:
    """Whether instances have different numbers of layers in a list."""
    if isinstance(tree, Items):
        return any(isinstance(item, Either) or is_uneven(item) for item in tree.items)
    if isinstance(tree, Either):
        return is_uneven(tree.then)
    return isinstance(tree, Run) and tree.count.varies
