"""The statements of a body as a person would write them: nothing dead, single uses inlined, the author's names.

Works on syntax trees. Knows nothing of torch or of layouts.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torchjax_bridge.recording import SourceLine

from ._authors import author_names
from ._lowering import Body, takes

__all__ = ["Written", "canonical", "written"]

_VARIABLE = re.compile(r"_v\d+_")
_RESERVED = {"self", "jnp", "jax", "nnx", "np", "nn", "partial"}


@dataclass
class Written:
    """A body as syntax trees.

    Attributes:
        params: The arguments of ``__call__``.
        lines: The statements.
        result: What is returned.
    """

    params: list[str]
    lines: list[ast.stmt]
    result: ast.expr


@dataclass
class _Line:
    names: tuple[str, ...]
    target: str
    text: str
    source: SourceLine
    statement: tuple[object, ...]  # which execution of which statement of the author's made it
    author: tuple[str, ...]  # the names on the left side of that statement
    returns: bool


def canonical(body: Body) -> tuple[str, ...]:
    """The code of a body with its variables numbered by appearance: equal for bodies that do the same."""
    numbers: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        return numbers.setdefault(match.group(), f"v{len(numbers)}")

    lines = [f"{line.target} = {line.text}" for line in body.statements]
    return tuple(_VARIABLE.sub(number, line) for line in (*body.names, *lines, body.result))


def written(body: Body) -> Written:
    """A body as a person would write it."""
    lines = _executions(body)
    result = body.result
    lines = _without_dead(lines, result)
    lines, result = _inlined(lines, result)
    names = _named(body, lines, result)

    def rename(text: str) -> str:
        return _VARIABLE.sub(lambda match: names[match.group()], text)

    statements = [ast.parse(f"{rename(line.target)} = {rename(line.text)}").body[0] for line in lines]
    params = [name for name, tree in body.inputs if takes(tree)]
    return Written(params, statements, ast.parse(rename(result), mode="eval").body)


def _executions(body: Body) -> list[_Line]:
    """The statements, each with the execution of the author's statement that made it.

    In a loop one statement runs several times: the place in the bytecode then goes back.
    """
    lines, last, turn = [], {}, 0  # type: ignore[var-annotated]
    for statement in body.statements:
        source = statement.source
        place, author, returns = author_names(source)
        if place:
            before = last.get(source.code)
            if before is not None and before[0] == place and source.instruction < before[1]:
                turn += 1
            if (
                before is not None
                and before[0] == place
                and source.instruction == before[1]
                and before[2] is not source
            ):
                turn += 1
            last[source.code] = place, source.instruction, source
        key = (place, turn) if place else ()
        lines.append(_Line(statement.names, statement.target, statement.text, source, key, author, returns))
    return lines


def _uses(lines: Sequence[_Line], result: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for text in (*(line.text for line in lines), result):
        found.update(_VARIABLE.findall(text))
    return found


def _without_dead(lines: list[_Line], result: str) -> list[_Line]:
    used = set(_VARIABLE.findall(result))
    kept = []
    for line in reversed(lines):
        if used.intersection(line.names):
            kept.append(line)
            used.update(_VARIABLE.findall(line.text))
    return kept[::-1]


def _inlined(lines: list[_Line], result: str) -> tuple[list[_Line], str]:
    """Put a value that is read once into the statement that reads it, if the author wrote both as one."""
    counts = _uses(lines, result)
    kept: list[_Line] = []
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


def _named(body: Body, lines: list[_Line], result: str) -> dict[str, str]:
    """A name for each variable: the author's, used again as soon as its old value is dead."""
    last: dict[str, int] = {}
    for place, text in enumerate([*(line.text for line in lines), result]):
        for name in _VARIABLE.findall(text):
            last[name] = place
    names = dict(body.names)
    params = {name for name, _ in body.inputs}
    whole = {name for name, tree in body.inputs if isinstance(tree, list | tuple | dict)}
    holds = {text: last.get(variable, -1) for variable, text in names.items() if text.isidentifier()}
    holds.update({name: len(lines) + 1 for name in whole})
    for place, line in enumerate(lines):
        for variable, wanted in zip(line.names, _wanted(line, last), strict=True):
            if variable not in last:
                names[variable] = "_"
                continue
            if wanted == "_":
                wanted = _fallback(line.text, params)
            name, count = wanted, 1
            while name in _RESERVED or holds.get(name, -1) > place:
                count += 1
                name = f"{wanted}_{count}"
            names[variable] = name
            holds[name] = last[variable]
    return names


def _wanted(line: _Line, last: dict[str, int]) -> Iterator[str]:
    alive = [name for name in line.names if name in last]
    for place in range(len(line.names)):
        if len(line.author) == len(line.names) > 1:
            yield line.author[place]
        elif len(line.author) == 1 and len(alive) == 1:
            yield line.author[0]
        else:
            yield "_"


def _fallback(text: str, params: set[str]) -> str:
    """A name for a value that the author has in the middle of an expression."""
    layer = re.match(r"self\.(\w+)\(", text)
    return f"{layer.group(1)}_out" if layer and len(params) > 1 else "y"
