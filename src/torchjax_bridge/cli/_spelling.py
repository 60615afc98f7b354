"""The rules that a message proposes in Python, spelt for ``--rules FILE``.

A message is read as text, because the library words it for Python; only what is a whole call with values for
arguments is spelt, so that ``Flatten("fc", (C, H, W))`` stays the question that it is. Where two proposals speak of
one name, somebody has to choose, and both are comments.
"""

import ast
import json
import re
from collections.abc import Iterator, Sequence

__all__ = ["as_toml"]

_CALL = re.compile(r"\b(Rename|LayerType|Flatten|Keep)\(")
_CHOICE = re.compile(r'Rename\(("[^"]*"), <([^>]*)>\)')  # a question, with the answers that there are
_TABLES = {"Rename": "rename", "LayerType": "layer_type", "Flatten": "flatten", "Keep": "keep"}


def as_toml(message: str) -> list[str]:
    """The lines of a rules file; empty where nothing is proposed.

    >>> as_toml('say rules=[Rename("a", "b"), LayerType("c", nn.Conv1d)]')
    ['rename = [{torch = "a", flax = "b"}]', 'layer_type = [{torch = "c", kind = "Conv1d"}]']
    """
    found: dict[str, dict[str, list[str]]] = {}
    for call in _calls(message):
        if (entry := _entry(call)) is not None:
            kind, subject, text = entry
            said = found.setdefault(_TABLES[kind], {}).setdefault(subject, [])
            if text not in said:
                said.append(text)
    return [line for table, subjects in found.items() for line in _table(table, subjects)]


def _table(table: str, subjects: dict[str, list[str]]) -> Iterator[str]:
    first = [texts[0] for texts in subjects.values() if len(texts) == 1 or table == "flatten"]
    open_ = [texts for texts in subjects.values() if len(texts) > 1]
    if table == "flatten":  # one is proposed, and then what else could be
        yield from (f"# or {table} = [{text}]" for texts in open_ for text in texts[1:])
        open_ = []
    if len(first) == 1 and not open_:
        yield f"{table} = [{first[0]}]"
        return
    yield f"{table} = ["
    yield from (f"  {text}," for text in first)
    for texts in open_:
        yield "  # one of these:"
        yield from (f"  # {text}," for text in texts)
    yield "]"


def _calls(message: str) -> Iterator[ast.Call]:
    for line in _CHOICE.sub(_each, message).splitlines():
        for begin in _CALL.finditer(line):
            for end in re.finditer(r"\)", line[begin.end() :]):
                try:
                    tree = ast.parse(line[begin.start() : begin.end() + end.end()], mode="eval")
                except SyntaxError:  # a parenthesis within, or words
                    continue
                if isinstance(tree.body, ast.Call):
                    yield tree.body
                break


def _each(choice: re.Match[str]) -> str:
    options = re.findall(r'"[^"]*"', choice[2])
    return " or ".join(f"Rename({choice[1]}, {option})" for option in options)


def _entry(call: ast.Call) -> tuple[str, str, str] | None:
    """The kind of a rule, what it speaks of, and its table on one line."""
    kind = call.func.id if isinstance(call.func, ast.Name) else ""
    subject = _value(call.args[0]) if call.args else None
    if not isinstance(subject, str):
        return None
    fields: dict[str, object] = {"torch": subject}
    rest: Sequence[ast.expr] = call.args[1:]
    if kind == "Rename":
        flax = _value(rest[0]) if len(rest) == 1 else None
        if not isinstance(flax, str):
            return None
        fields["flax"] = flax
    elif kind == "LayerType":
        named = rest[0] if len(rest) == 1 else None
        name = named.attr if isinstance(named, ast.Attribute) else getattr(named, "id", None)
        if name is None:
            return None
        fields["kind"] = name
    elif kind == "Flatten":
        sizes = _value(rest[0]) if len(rest) == 1 else ()
        if sizes is None:
            fields["channels_first"] = True
        elif isinstance(sizes, tuple) and sizes and all(type(size) is int for size in sizes):
            fields["features"] = list(sizes)
        else:
            return None
        if any(word.arg == "output" and _value(word.value) is True for word in call.keywords):
            fields["output"] = True
            subject += " (its output)"
    elif rest or call.keywords:
        return None
    table = ", ".join(f"{name} = {json.dumps(value)}" for name, value in fields.items())
    return kind, subject, f"{{{table}}}"


def _value(node: ast.expr) -> object:
    try:
        found: object = ast.literal_eval(node)
    except ValueError:
        return ()
    return found
