"""Modules that `port` does not look into: those of ``modules=`` and of ``keep=``.

Owns how a caller says so, and what the emitted file calls instead. Refuses what no file could import or write.
"""

import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeAlias

from flax import linen, nnx
from torch import nn

from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.exchange import split_path
from torchjax_bridge.recording import Fault, SourceLine
from torchjax_bridge.weights import Keep as Pattern
from torchjax_bridge.weights import LayerType, Rule

from ._constructors import Call, Column, Given, Tree
from ._placed import Axes, channels_last, torch_order
from ._torch_part import part_rules

__all__ = ["Modules", "Part", "Replacement", "find_parts", "shared_weights"]


@dataclass(frozen=True)
class Replacement:
    """The Flax module that stands for a torch module in a port: an item of ``modules=``.

    The emitted class makes it as ``Class(**settings, rngs=rngs)`` and calls it with the arguments of the torch
    call. The emitted file imports the class. In a port to linen it is ``Class(**settings)``, a class of linen, and
    its call is given ``train`` if it takes that.

    Args:
        flax: A subclass of ``nnx.Module`` or ``linen.Module``, or where it is: ``"package.module:Class"``.
        settings: Arguments of its constructor: numbers, strings, bools, None, and tuples and lists of them.
        channels_last: Whether it takes and gives arrays of three and more axes with their channels last; otherwise
            they have torch's order of axes.
        rngs: Whether its constructor takes ``rngs``; one of linen never does.
        rules: How its weights lie in Flax where names and shapes do not say so; a class of your own with parameters
            of its own needs a `Rule`.

    Raises:
        ArgumentError: The class cannot be imported by a file, or a setting cannot be written into one.

    >>> Replacement(nnx.LayerNorm, {"num_features": 4}).where
    ('flax.nnx.nn.normalization', 'LayerNorm')
    """

    flax: type[nnx.Module] | type[linen.Module] | str
    settings: Mapping[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    rngs: bool = True
    rules: Sequence[Rule] = ()

    def __post_init__(self) -> None:
        module, name = self.where
        try:
            found = self._class()
        except (ImportError, AttributeError, ValueError) as err:
            raise ArgumentError(
                f"modules=: a file cannot import {name} from {module} ({err}). Put the class at the top level of a "
                'module that can be imported, and pass it or its path "package.module:Class".'
            ) from err
        if not _is_flax(found):
            raise ArgumentError(
                f"modules=: {module}:{name} is no subclass of nnx.Module or linen.Module, but {found!r}."
            )
        for setting, value in self.settings.items():
            if not _is_literal(value):
                raise ArgumentError(
                    f"modules=: the setting {setting}={value!r} of {name} cannot be written into a file; pass "
                    "numbers, strings, bools, None, and tuples and lists of them."
                )

    @property
    def where(self) -> tuple[str, str]:
        """The module to import, and the name in it."""
        if isinstance(self.flax, str):
            module, _, name = self.flax.partition(":")
            return module, name
        if not _is_flax(self.flax):
            raise ArgumentError(
                'modules= takes a subclass of nnx.Module or linen.Module, its path "package.module:Class", a '
                f"Replacement, or a function from the torch module to one, not {self.flax!r}."
            )
        return self.flax.__module__, self.flax.__qualname__

    def _class(self) -> Any:
        module, name = self.where
        return attrgetter(name)(importlib.import_module(module))

    def refuse_unless(self, to: str) -> None:
        """Make sure that it is of the library that the port is written for.

        Raises:
            ArgumentError: It is of the other one.
        """
        library = "linen" if issubclass(self._class(), linen.Module) else "nnx"
        if library != to:
            raise ArgumentError(
                f"modules=: {self.where[1]} is a class of {library}, and the port is written for {to}: pass a "
                f'class of {to}, or port with to="{library}".'
            )

    # --- as a part ------------------------------------------------------------------------------------------

    def takes(self, argument: str) -> bool:
        """Whether its call has an argument of this name."""
        return argument in inspect.signature(self._class().__call__).parameters

    def rules_at(self, path: str) -> Sequence[Rule | LayerType]:
        """How its tensors lie in Flax, for the module at this path."""
        del path
        return self.rules

    @property
    def imported(self) -> tuple[str, str]:
        """The module to import from, and what."""
        module, name = self.where
        return module, name.partition(".")[0]

    def order(self, rank: int) -> Axes:
        """The order of axes of an argument or a result of so many axes."""
        return channels_last(rank) if self.channels_last else torch_order(rank)

    def tree(self, path: str) -> Tree:
        """The constructor call in the emitted class."""
        place = path.rpartition(".")[2]
        kwargs: dict[str, Tree] = {
            name: Column([value], name, place) for name, value in self.settings.items()
        }
        return Call(self.where[1], [], kwargs, {}, ("rngs=rngs",) if self.rngs else ())


@dataclass(frozen=True)
class Kept:
    """A module that stays in torch: the emitted class takes it as an argument.

    Attributes:
        module: The torch module.
    """

    module: nn.Module
    imported: tuple[str, str] | None = None

    def takes(self, argument: str) -> bool:
        """Whether its call must be given an argument of this name."""
        del argument
        return False

    def rules_at(self, path: str) -> Sequence[Rule | LayerType]:
        """How its tensors lie in a `TorchPart`."""
        return part_rules(path, self.module)

    def order(self, rank: int) -> Axes:
        """The order of torch."""
        return torch_order(rank)

    def tree(self, path: str) -> Tree:
        """The argument of the emitted class."""
        holders, _, name = path.rpartition(".")
        if not name.isidentifier():  # an item of a list goes by the name of the list
            holder = holders.rpartition(".")[2]
            name = f"{holder}_{name}" if holder.isidentifier() else f"layer{name}"
        return Column([Given(path)], name, name)


Part: TypeAlias = Replacement | Kept
Modules: TypeAlias = Mapping[
    type[nn.Module],
    type[nnx.Module] | type[linen.Module] | str | Replacement | Callable[[Any], Replacement],
]


def find_parts(root: nn.Module, modules: Modules | None, keep: Collection[str], to: str) -> dict[str, Part]:
    """The parts of a model by path.

    Args:
        root: The model.
        modules: As `port` takes it; a subclass follows its nearest base class.
        keep: Paths, or patterns of them, as `port` takes them.
        to: The library that the port is written for.

    Raises:
        ArgumentError: A path or a class is in no place of the model, is of the other library, or is given in
            another way than `port` says.
    """
    paths = dict(root.named_modules(remove_duplicate=False))
    parts: dict[str, Part] = {}
    if isinstance(keep, str):
        raise ArgumentError(f"keep= takes a list of paths, such as [{keep!r}].")
    for given in keep:
        named = [path for path in paths if path and _matches(given, path)]
        if not named:
            known = ", ".join(repr(path) for path in list(paths)[1:6])
            raise ArgumentError(
                f"keep= names {given!r}, which is no module of the model; it has {known}, ..."
            )
        parts |= {path: Kept(paths[path]) for path in named}
    if parts and to == "linen":
        raise ArgumentError("keep= puts a module of nnx into a port: leave it out, or port to nnx.")
    for kind, replacement in (modules or {}).items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ArgumentError(f"modules= takes torch classes, such as {{MyLayer: ...}}, not {kind!r}.")
        if not any(isinstance(module, kind) for path, module in paths.items() if path):
            raise ArgumentError(
                f"modules= names {kind.__name__}, and no module of the model is of that class."
            )
        del replacement
    for path, module in paths.items():
        base = next((kind for kind in type(module).__mro__ if kind in (modules or {})), None)
        if path and path not in parts and modules is not None and base is not None:
            parts[path] = replacement = _replacement(modules[base], module)
            replacement.refuse_unless(to)
    return {path: part for path, part in parts.items() if not any(_inside(path, other) for other in parts)}


def _replacement(given: Any, module: nn.Module) -> Replacement:
    if isinstance(given, str | type):
        return Replacement(given)
    made = given(module) if inspect.isroutine(given) else given
    if not isinstance(made, Replacement):
        raise ArgumentError(f"modules= gives {made!r} for {type(module).__name__}, and no Replacement.")
    return made


def shared_weights(root: nn.Module, parts: Collection[str]) -> Iterator[Fault]:
    """Parameters that a part shares with a module outside: they would be two in the port."""
    homes: dict[int, dict[str, str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        home = next((part for part in parts if path == part or _inside(path, part)), "")
        for name, parameter in module.named_parameters(recurse=False):
            homes.setdefault(id(parameter), {}).setdefault(home, f"{path}.{name}".lstrip("."))
    for places in homes.values():
        if len(places) > 1:
            home = next(part for part in places if part)
            names = " and ".join(f"'{place}'" for place in places.values())
            reason = f"{names} are one weight, and would be two: keep or replace the module that holds both"
            yield Fault(reason, home, SourceLine())


def _is_flax(given: Any) -> bool:
    return isinstance(given, type) and issubclass(given, nnx.Module | linen.Module)


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def _matches(given: Any, path: str) -> bool:
    if not isinstance(given, str):
        raise ArgumentError(f'keep= takes paths of modules, such as "encoder.mixer", not {given!r}.')
    wanted, have = split_path(given), split_path(path)
    return len(wanted) == len(have) and Pattern(given).matches(have)


def _is_literal(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, bool | int | float | str)
