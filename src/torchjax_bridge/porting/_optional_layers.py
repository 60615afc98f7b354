"""Layers that only some instances of a class have: the code of a body without them, and with a question for each.

Works on the text of statements.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from ._body import Body, Statement

__all__ = ["body_with_optional", "body_without"]


def body_without(body: Body, names: Sequence[str]) -> Body:
    """The body of an instance that lacks these layers: each gives what it is given."""
    starts = [f"self.{name}(" for name in names]
    statements: list[Statement] = []
    same: dict[str, str] = {}
    for statement in body.statements:
        changed = re.sub(r"_v\d+_", lambda m: same.get(m.group(), m.group()), statement.text)
        for start in starts:
            changed = _unwrapped(changed, start)
        if re.fullmatch(r"_v\d+_", changed) and statement.target == statement.names[0]:
            same[statement.target] = changed
            continue
        statements.append(replace(statement, text=changed, called="", items=()))
    result = re.sub(r"_v\d+_", lambda m: same.get(m.group(), m.group()), body.result)
    training = None if body.training is None else body_without(body.training, names)
    return replace(body, statements=statements, result=result, training=training)


def body_with_optional(body: Body, names: set[str]) -> Body:
    """The body with ``x if self.layer is None else self.layer(x)`` for each of these layers."""
    statements = []
    for statement in body.statements:
        text = statement.text
        for name in names:
            text = _conditional(text, name)
        statements.append(replace(statement, text=text, called="", items=()))
    training = None if body.training is None else body_with_optional(body.training, names)
    return replace(body, statements=statements, training=training)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens before ``start`` closes."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _unwrapped(text: str, start: str) -> str:
    """``f(self.layer(x))`` as ``f(x)``."""
    while start in text:
        begin = text.index(start)
        inner = begin + len(start)
        end = _closing(text, inner)
        text = text[:begin] + text[inner:end] + text[end + 1 :]
    return text


def _conditional(text: str, name: str) -> str:
    start = f"self.{name}("
    if start not in text:
        return text
    begin = text.index(start)
    inner = begin + len(start)
    end = _closing(text, inner)
    given = text[inner:end]
    return f"{text[:begin]}({given} if self.{name} is None else self.{name}({given})){text[end + 1 :]}"
