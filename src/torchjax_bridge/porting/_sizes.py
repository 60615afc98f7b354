"""Sizes that are read several times, by name: ``n, h, w, c = x.shape``.

Works on statements that have no names yet. Reads the author's ``b, c, h, w = x.shape`` as a hint for names.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ._authors import author_shapes, author_size
from ._body import Body
from ._names import Line
from ._placed import Axes, channels_last
from ._reserved import argument_name

__all__ = ["with_sizes"]

_SIZE = re.compile(r"(_v\d+_)\.shape\[(\d+)\]")
_WORDS = {"n": "batch", "c": "channels", "h": "height", "w": "width", "l": "length", "d": "depth"}
_LETTERS = {3: "nlc", 4: "nchw", 5: "ncdhw"}


def with_sizes(body: Body, lines: Sequence[Line]) -> list[Line]:
    """The statements, with the sizes of an array taken apart once where several are read."""
    read: dict[str, list[tuple[int, int]]] = {}
    for place, line in enumerate(lines):
        for name, axis in _SIZE.findall(line.text):
            read.setdefault(name, []).append((place, int(axis)))
    found = list(lines)
    made: dict[int, list[Line]] = {}
    given = {argument_name(name): name for name, _ in body.inputs}
    taken = {author for line in lines for author in line.author}
    for name, sizes in read.items():
        order = body.axes.get(name, ())
        start = next((place + 1 for place, line in enumerate(lines) if name in line.names), 0)
        text = body.names.get(name, "")
        own = next((line.author for line in lines if name in line.names), (given.get(text, text),))
        late = _is_late(lines, start, name, own, max(place for place, _ in sizes))
        axes = {axis for _, axis in sizes}
        if late and len(axes) == 1:
            [axis] = axes
            made.setdefault(start, []).append(_single(body, name, own, order, axis, taken))
            found = [
                replace(
                    line, text=line.text.replace(f"{name}.shape[{axis}]", f"_v{name[2:-1]}{axis:02d}9999_")
                )
                for line in found
            ]
            continue
        if len(axes) < 2 or (len(sizes) < 3 and not late) or len(order) not in _LETTERS:
            continue
        variables = [f"_v{name[2:-1]}{axis:02d}9999_" for axis in range(len(order))]

        def named(match: re.Match[str], name: str = name, variables: list[str] = variables) -> str:
            return variables[int(match.group(2))] if match.group(1) == name else match.group()

        found = [replace(line, text=_SIZE.sub(named, line.text)) for line in found]
        target = f"({', '.join(variables)})"
        letters = _letters(body, own[0] if len(own) == 1 else "", order)
        letters = tuple(
            _WORDS.get(letter, letter) if letter in {*taken, "l"} else letter for letter in letters
        )
        kinds = dict.fromkeys(variables, "int")
        made.setdefault(start, []).append(
            Line(tuple(variables), target, f"{name}.shape", author=letters, kinds=kinds)
        )
    return [line for place, own in enumerate([*found, None]) for line in (*made.get(place, ()), own) if line]


def _is_late(lines: Sequence[Line], start: int, name: str, own: tuple[str, ...], last: int) -> bool:
    """Whether sizes of an array are read after its name means something else and it is read no more."""
    rebound = [
        p
        for p, line in enumerate(lines)
        if start <= p < last and line.author == own and name not in line.names
    ]
    reads = [p for p, line in enumerate(lines) if name in _SIZE.sub("", line.text)]
    return bool(rebound) and max(reads, default=0) <= rebound[0]


def _single(
    body: Body, name: str, own: tuple[str, ...], order: Axes, axis: int, taken: Collection[str]
) -> Line:
    """One size: the author's name for it, else the usual letter, or a word where a value has that name."""
    variable, torch_axis = f"_v{name[2:-1]}{axis:02d}9999_", order[axis] if axis < len(order) else axis
    code = body.frame.code
    written = author_size(code, own[0], torch_axis) if code is not None and len(own) == 1 else ""
    letters = _LETTERS.get(len(order), "n" * max(len(order), 1))
    usual = letters[torch_axis] if torch_axis < len(letters) else "size"
    if usual in {*taken, "l"}:
        usual = _WORDS[usual] if usual in letters and len(order) in _LETTERS else "size"
    text, kinds = f"{name}.shape[{axis}]", {variable: "int"}
    return Line((variable,), variable, text, author=(written or usual,), kinds=kinds)


def _letters(body: Body, name: str, order: Axes) -> tuple[str, ...]:
    """The names of the sizes in the emitted order: the author's, else the usual letters."""
    shapes: Mapping[str, tuple[str, ...]] = author_shapes(body.frame.code) if body.frame.code else {}
    written = shapes.get(name, ())
    rank = len(order)
    if len(written) != rank:
        usual = rank == 3 or order == channels_last(rank)
        written = tuple(_LETTERS[rank]) if usual else tuple(f"d{axis}" for axis in range(rank))
    # A letter that the author left out is the usual one.
    full = [given if given != "_" else _LETTERS[rank][axis] for axis, given in enumerate(written)]
    return tuple(full[axis] for axis in order)
