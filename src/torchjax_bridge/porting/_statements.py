"""The statements of a body as a person would write them: nothing dead, single uses inlined, the author's names.

Works on syntax trees. Knows nothing of torch or of layouts.
"""

import ast
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from re import Match
from typing import TypeVar

from torchjax_bridge.recording import SourceLine

from ._aliases import with_aliases
from ._argument_trees import takes
from ._authors import author_names
from ._body import Body, Statement
from ._names import VARIABLE, Line, names_of
from ._reserved import argument_name
from ._sizes import with_sizes

__all__ = ["Written", "arguments", "canonical", "needed_calls", "parsed", "prepared", "written"]

_Step = TypeVar("_Step", Line, Statement)
_UNREAD = re.compile(r"\((?:_, )+_?\)")  # parts of a result of which none is read


@dataclass
class Written:
    """A body as syntax trees.

    Attributes:
        params: The arguments of ``__call__``.
        lines: The statements, ``return`` included.
    """

    params: list[str]
    lines: list[ast.stmt]


def canonical(body: Body) -> tuple[str, ...]:
    """The code of a body with its variables numbered by appearance: equal for bodies that do the same."""
    numbers: dict[str, str] = {}

    def number(match: Match[str]) -> str:
        return numbers.setdefault(match.group(), f"v{len(numbers)}")

    lines = [f"{line.target} = {line.text}" for line in body.statements]
    return tuple(VARIABLE.sub(number, line) for line in (*body.names, *lines, body.result))


def written(body: Body) -> Written:
    """A body as a person would write it."""
    lines = prepared(body)
    names = names_of(body.names, body.inputs, lines)
    return Written(arguments(body), [parsed(line, names) for line in lines])


def arguments(body: Body) -> list[str]:
    """The arguments of ``__call__``."""
    return [argument_name(name) for name, tree in body.inputs if takes(tree)]


def prepared(body: Body, always: bool = False) -> list[Line]:
    """The statements that are needed, ``return`` included, with variables that have no names yet.

    Args:
        body: The body.
        always: As for `with_aliases`.
    """
    lines = _without_dead(_executions(body), body.result)
    lines = [one for line in lines for one in _by_item(line, _uses(lines, body.result))]
    lines, result = _inlined(lines, body.result)
    sized = with_sizes(body, [*_spread(lines), Line((), "return", result, returns=True)])
    return with_aliases(body, sized, always)


def parsed(line: Line, names: Mapping[str, str]) -> ast.stmt:
    """A statement with names."""

    def rename(text: str) -> str:
        return VARIABLE.sub(lambda match: names[match.group()], text)

    text = f"return {rename(line.text)}"
    if line.names:
        target = _UNREAD.sub("_", rename(line.target))
        text = f"{target} = {rename(line.text)}"
    return ast.parse(text).body[0]


def _executions(body: Body) -> list[Line]:
    """The statements, each with the execution of the author's statement that made it.

    In a loop one statement runs several times: the place in the bytecode then goes back.
    """
    lines, last, turn = [], {}, 0  # type: ignore[var-annotated]
    for statement in body.statements:
        inner = statement.source
        ran = author_names(inner)[0]
        if ran:
            before = last.get(inner.code)
            again = before is not None and before[2] is not inner and before[1] == inner.instruction
            if before is not None and before[0] == ran and (inner.instruction < before[1] or again):
                turn += 1
            last[inner.code] = ran, inner.instruction, inner
        source = _owner(inner)
        place, author, returns = author_names(source)
        if source.code is not None and source.code.co_name == "<lambda>":
            author, returns = (), True
        key = (place, turn) if place else ()
        line = Line(statement.names, statement.target, statement.text, source, key, author, returns)
        lines.append(replace(line, items=statement.items, kinds=statement.kinds))
    return lines


def _owner(source: SourceLine) -> SourceLine:
    """The line that a value belongs to: what a function returns belongs to the line that called it."""
    while source.caller is not None and author_names(source)[2]:
        source = source.caller
    return source


def _spread(lines: Sequence[Line]) -> list[Line]:
    """``q, k = x[0], x[1]`` made one line for each: each gets its own name."""
    found: list[Line] = []
    for _, group in itertools.groupby(lines, key=lambda line: line.statement or id(line)):
        run = list(group)
        names = run[0].author
        if 1 < len(names) == len(run) and all(len(line.names) == 1 for line in run):
            run = [replace(line, author=(name,)) for line, name in zip(run, names, strict=True)]
        found += run
    return found


def _uses(lines: Sequence[Line], result: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for text in (*(line.text for line in lines), result):
        found.update(VARIABLE.findall(text))
    return found


def needed_calls(body: Body) -> set[str]:
    """The paths of the modules whose results the code reads."""
    return {statement.called for statement in _without_dead(body.statements, body.result)}


def _without_dead(lines: Sequence[_Step], result: str) -> list[_Step]:
    used = set(VARIABLE.findall(result))
    kept = []
    for line in reversed(lines):
        if used.intersection(line.names):
            kept.append(line)
            used.update(VARIABLE.findall(line.text))
    return kept[::-1]


def _by_item(line: Line, uses: Mapping[str, int]) -> list[Line]:
    """``a = x[:, 0]`` where few parts of a result are read, for ``a, _, _, _ = jnp.moveaxis(x, 1, 0)``."""
    read = [place for place, name in enumerate(line.names) if name in uses]
    if not line.items or 2 * len(read) > len(line.items):
        return [line]
    names = [line.names[place] for place in read]
    authors = (
        [line.author[place : place + 1] for place in read] if len(line.author) == len(line.names) else []
    )
    return [
        replace(line, names=(name,), target=name, text=line.items[place], items=(), author=own)
        for name, place, own in zip(names, read, authors or [line.author] * len(read), strict=True)
    ]


def _inlined(lines: list[Line], result: str) -> tuple[list[Line], str]:
    """Put a value that is read once into the statement that reads it, if the author wrote both as one."""
    counts = _uses(lines, result)
    kept: list[Line] = []
    for place, line in enumerate(lines):
        name = line.names[0]
        if len(line.names) > 1 or line.target != name or counts[name] != 1:
            kept.append(line)
            continue
        reader = next((other for other in lines[place + 1 :] if name in other.text), None)
        if reader is not None and (
            not line.statement or not reader.statement or line.statement == reader.statement
        ):
            reader.text = reader.text.replace(name, line.text)
        elif reader is None and (line.returns or not line.statement):
            result = result.replace(name, line.text)
        else:
            kept.append(line)
    return kept, result
