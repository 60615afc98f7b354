"""Modules with weights that several modules hold: one class makes each, and hands it to the others.

That class is the innermost that holds all of them. The author's own attribute of it, where there is one, is the
module's; else it is a variable of ``__init__``.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ._attributes import attribute_text, is_container, is_inside
from ._constructors import Call, Column, Handed, Items, Text, Tree, columns
from ._placed import RefusedError
from ._reserved import argument_name, attribute_name

__all__ = ["LOCAL", "HandedModules", "argument_of", "made_first"]

LOCAL = "="
"""What the name of an attribute starts with that is a variable of ``__init__`` alone."""


class HandedModules:
    """Those of one translation.

    Args:
        model: The translation.

    Attributes:
        aliases: By the path under which a class calls a module: the path that the recording knows it by.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.aliases: dict[str, str] = {}

    def alias(self, base: str, path: str) -> str:
        """The path below ``base`` of a module that is known by another.

        Raises:
            RefusedError: There is none, or the port is one of linen, whose modules share no weights.
        """
        modules: Mapping[str, nn.Module] = self._model.modules
        names = [name for name, one in modules.items() if one is modules[path] and is_inside(base, name)]
        if not names:
            raise RefusedError(f"'{path}' is called inside '{base}', which does not hold it")
        found = min(names, key=lambda name: name.count("."))
        if self._model.to == "linen":
            raise RefusedError(
                f"'{path}' and '{found}' are one module, and a port to linen would make two; port to nnx"
            )
        alias, owner = found, path
        while True:  # a list of layers, say, of which all are shared, is handed as it is
            around, home = (one.rpartition(".")[0] for one in (alias, owner))
            if around in ("", base) or not home or modules[around] is not modules[home]:
                break
            alias, owner = around, home
        self.aliases[alias] = owner
        return found

    @property
    def owners(self) -> dict[str, None]:
        """The modules that are handed to others, by their own paths."""
        return dict.fromkeys(self.aliases.values())

    def places(self, path: str) -> list[str]:
        """Under which paths classes hold a module: its own, and those where it is handed to them."""
        return [path, *(alias for alias, owner in self.aliases.items() if owner == path)]

    def is_handed(self, path: str) -> str | None:
        """The module that a class is given as its attribute ``path``, by its own path; None where it makes it."""
        owner = self.aliases.get(path, path)
        if owner not in self.owners or (path == owner and self._has_attribute(owner)):
            return None
        return owner

    def made_in(self, path: str) -> dict[str, str]:
        """The modules that a class makes for others: the expression of each, by its own path."""
        found: dict[str, str] = {}
        for owner in self.owners:
            if self._maker(owner) != path:
                continue
            if self._has_attribute(owner):
                found[owner] = attribute_text(self._model, path, owner)
                continue
            name, count = argument_of(owner), 1
            while (local := f"{name}{count if count > 1 else ''}") in found.values():
                count += 1
            found[owner] = local
        return found

    def _maker(self, path: str) -> str:
        """The path of the module whose class makes a module."""
        found: str = self._model.common_class(self.places(path))
        return found

    def _has_attribute(self, path: str) -> bool:
        """Whether an attribute of the class that makes a module is that module, and is there before its users."""
        maker = self._maker(path)
        if self._model.common_class([path.rpartition(".")[0]]) != maker:
            return False
        inside = len(maker) + 1 if maker else 0
        first, *others = (place[inside:].partition(".")[0] for place in self.places(path))
        return first not in others and not is_container(self._model.modules[maker], nn.Sequential)


def argument_of(path: str) -> str:
    """The name of a module as an argument or a variable; an item of a list goes by the name of the list, too."""
    holder, name = path.split(".")[-2:] if "." in path else ("", path)
    listed = f"{holder}_{name}" if holder.isidentifier() and not name.isidentifier() else attribute_name(name)
    return argument_name(listed)


def with_made(tree: Tree, made: Mapping[str, str]) -> Tree:
    """A tree with the expressions of the modules that its class makes for others."""
    if isinstance(tree, Column):
        given = tree.values[0]
        return Text(made[given.path]) if isinstance(given, Handed) and given.path in made else tree
    if isinstance(tree, Call):
        kwargs = {name: with_made(item, made) for name, item in tree.kwargs.items()}
        return replace(tree, args=[with_made(item, made) for item in tree.args], kwargs=kwargs)
    if isinstance(tree, Items):
        return replace(tree, items=[with_made(item, made) for item in tree.items])
    return tree


def made_first(fields: Mapping[str, Tree], made: Mapping[str, str]) -> dict[str, Tree]:
    """The attributes of a class, with what it makes for others before them, and in place in their trees."""
    users: dict[str, list[str]] = {}
    for name, tree in fields.items():
        for column in columns(tree):
            if isinstance(given := column.values[0], Handed) and given.path in made:
                users.setdefault(made[given.path].removeprefix("self.").partition("[")[0], []).append(name)
    order: list[str] = []
    for name in fields:
        order += [first for first, using in users.items() if name in using and first in fields]
        order.append(name)
    return {name: with_made(fields[name], made) for name in dict.fromkeys(order)}
