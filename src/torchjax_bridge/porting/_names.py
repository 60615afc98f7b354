"""Names for the variables of a body: the author's, each used again as soon as its old value is dead.

Knows statements and the branches that they are in. Knows nothing of torch or of layouts.
"""

import ast
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchjax_bridge.recording import SourceLine, Value

from ._argument_trees import parts_of, takes
from ._reserved import RESERVED, argument_name

__all__ = ["VARIABLE", "Line", "names_of"]

VARIABLE = re.compile(r"_v\d+_")
# What is compared with anything but a number: a name of capitals there looks like the constant of the two.
_COMPARED = re.compile(r"(_v\d+_) (?:[=!]=|[<>]=?) (?!-?\d)")

# Which variants of a body run a statement; None for all.
Path = frozenset[int] | None


@dataclass
class Line:
    """A statement that is still to be named.

    Attributes:
        names: The variables that it binds.
        target: Its left side.
        text: Its right side; of a ``return``, what it returns.
        source: The author's line.
        statement: Which execution of which statement of the author's made it; ``()`` where that is unknown.
        author: The names on the left side of that statement.
        returns: Whether that statement returns.
        path: Which variants of the body run it; None for all.
        is_copy: Whether it gives a value another name at the end of a branch.
        is_alias: Whether it is the author's ``residual = x``.
        items: As those of a `Statement`.
        kinds: As those of a `Statement`.
    """

    names: tuple[str, ...]
    target: str
    text: str
    source: SourceLine = field(default_factory=SourceLine)
    statement: tuple[object, ...] = ()
    author: tuple[str, ...] = ()
    returns: bool = False
    path: Path = None
    is_copy: bool = False
    is_alias: bool = False
    items: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)


def names_of(
    params: Mapping[str, str], inputs: Sequence[tuple[str, Any]], lines: Sequence[Line]
) -> dict[str, str]:
    """A name for each variable.

    Args:
        params: The variables that are arguments, or parts of one, with their expressions.
        inputs: The arguments by name.
        lines: The statements in order, ``return`` included.
    """
    uses: dict[str, list[tuple[int, Path]]] = {}
    copies: dict[str, list[int]] = {}
    for place, line in enumerate(lines):
        for name in VARIABLE.findall(line.text):
            uses.setdefault(name, []).append((place, line.path))
        if line.is_copy:
            copies.setdefault(line.names[0], []).append(place)
    names = dict(params)
    whole = {argument_name(name) for name, tree in inputs if takes(tree) and not isinstance(tree, Value)}
    arguments = {name: argument_name(name) for name, _ in inputs}
    kinds = _kinds(params, inputs, lines)
    compared = {name for line in lines for name in _COMPARED.findall(line.text)}
    defined: dict[str, list[Path]] = {variable: [None] for variable in params}

    def read_after(variable: str, place: int, path: Path) -> bool:
        return any(later > place and _together(where, path) for later, where in uses.get(variable, ()))

    def held(name: str, place: int, path: Path, variable: str) -> bool:
        """Whether a name is taken: by a value that is read after ``place``, or by one of another kind."""
        if name in RESERVED or name in whole:
            return True
        for other, paths in defined.items():
            if other == variable or names[other] != name:
                continue
            if kinds.get(other) != kinds.get(variable):
                return True
            if any(_together(at, path) for at in paths) and read_after(other, place, path):
                return True
        return any(
            names.get(other) == name
            and any(
                at > place and _together(lines[at].path, path) and read_after(variable, at, path)
                for at in places
            )
            for other, places in copies.items()
            if other != variable
        )

    for place, line in enumerate(lines):
        for variable, given in zip(line.names, _wanted(line, uses), strict=True):
            defined.setdefault(variable, []).append(line.path)
            if variable not in uses:
                names[variable] = "_"
            elif variable not in names:
                places = copies.get(variable, [place])
                wanted = [arguments.get(name, name) for name in given]
                wanted = [name.lower() for name in wanted] if variable in compared else wanted
                for name in _candidates(wanted, line, {*arguments.values()}):
                    if not any(held(name, at, lines[at].path, variable) for at in places):
                        names[variable] = name
                        break
    return names


def _kinds(
    params: Mapping[str, str], inputs: Sequence[tuple[str, Any]], lines: Sequence[Line]
) -> dict[str, str]:
    """What each variable is that is no array."""
    numbers = {
        text
        for name, tree in inputs
        for value, text in parts_of(argument_name(name), tree)
        if value.dtype is None
    }
    kinds = {variable: "int" for variable, text in params.items() if text in numbers}
    for line in lines:
        kinds.update(line.kinds)
        if line.text in kinds:  # of which it is a copy
            kinds.update(dict.fromkeys(line.names, kinds[line.text]))
    return kinds


def _candidates(given: Sequence[str], line: Line, arguments: set[str]) -> Iterator[str]:
    """Names to try, in order."""
    wanted = [name for name in given if name != "_"] or [_fallback(line.text, arguments)]
    yield from wanted
    yield from (f"{wanted[0]}_{count}" for count in itertools.count(2))


def _together(one: Path, other: Path) -> bool:
    """Whether one variant runs both."""
    return one is None or other is None or bool(one & other)


def _wanted(line: Line, uses: Mapping[str, object]) -> Iterator[Sequence[str]]:
    """The author's names for what a statement binds."""
    alive = [name for name in line.names if name in uses]
    parts = _parts(line.target) if line.names else []
    for place, name in enumerate(line.names):
        if line.is_copy:
            yield line.author
        elif len(line.author) == len(line.names) > 1:
            yield line.author[place : place + 1]
        elif len(line.author) == len(parts) > 1:
            yield [author for author, part in zip(line.author, parts, strict=True) if name in part]
        else:
            yield line.author if len(line.author) == 1 and len(alive) == 1 else ()


def _parts(target: str) -> list[str]:
    """The parts of a left side, of which one may be a tuple itself."""
    match ast.parse(target, mode="eval").body:
        case ast.Tuple(elts=parts):
            return [ast.unparse(part) for part in parts]
    return [target]


def _fallback(text: str, params: set[str]) -> str:
    """A name for a value that the author has in the middle of an expression."""
    layer = re.match(r"self\.(\w+)\(", text)
    return f"{layer.group(1)}_out" if layer and len(params) > 1 else "y"
