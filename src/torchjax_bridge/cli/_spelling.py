"""The rules that a message proposes in Python, spelt for ``--rules FILE``.

A message is read as text, because the library words it for Python; only what is a whole call with values for
arguments is spelt, so that ``Flatten("fc", (C, H, W))`` stays the question that it is. Where two proposals speak of
one name, or a proposal has a ``<blank>``, somebody has to choose, and they are comments.
"""

import ast
import json
import re
from collections.abc import Iterator

__all__ = ["as_toml"]

_BLANK = re.compile('"<')
_CHOICE = re.compile(r'Rename\(("[^"]*"), <([^>]*)>\)')  # a question, with the answers that there are
# What the tables of a rules file are called, and the fields in the order in which Python has them.
_TABLES = {
    "Rename": ("rename", ("torch", "flax")),
    "LayerType": ("layer_type", ("torch", "kind")),
    "Flatten": ("flatten", ("torch", "features", "output")),
    "Fused": ("fused", ("module", "torch", "flax", "heads")),
    "Keep": ("keep", ("torch",)),
    "Fill": ("fill", ("flax", "value")),
}
_CALL = re.compile(rf"\b({'|'.join(_TABLES)})\(")


def as_toml(message: str) -> list[str]:
    """The lines of a rules file; empty where nothing is proposed.

    >>> as_toml('say rules=[Rename("a", "b"), LayerType("c", nn.Conv1d)]')
    ['rename = [{torch = "a", flax = "b"}]', 'layer_type = [{torch = "c", kind = "Conv1d"}]']
    """
    found: dict[str, dict[str, list[str]]] = {}
    for call in _calls(message):
        if (entry := _entry(call)) is not None:
            kind, subject, text = entry
            said = found.setdefault(_TABLES[kind][0], {}).setdefault(subject, [])
            if text not in said:
                said.append(text)
    return [line for table, subjects in found.items() for line in _table(table, subjects)]


def _table(table: str, subjects: dict[str, list[str]]) -> Iterator[str]:
    groups = list(subjects.values())
    first = [texts[0] for texts in groups if not _BLANK.search(texts[0])]
    asked: list[str] = []  # only comments: a choice is not made, and a blank not filled
    for texts in groups:
        if _BLANK.search(texts[0]):
            asked += ["  # fill in:", *(f"  # {text}," for text in texts)]
        elif len(texts) > 1 and table != "flatten":
            first.remove(texts[0])
            asked += ["  # one of these:", *(f"  # {text}," for text in texts)]
    if table == "flatten":  # one is proposed, and then what else could be
        yield from (f"# or {table} = [{text}]" for texts in groups for text in texts[1:])
    if len(first) == 1 and not asked:
        yield f"{table} = [{first[0]}]"
        return
    yield f"{table} = ["
    yield from (f"  {text}," for text in first)
    yield from asked
    yield "]"


def _calls(message: str) -> Iterator[ast.Call]:
    for line in re.sub(r"<(\w[\w ]*)>", r'"<\1>"', _CHOICE.sub(_each, message)).splitlines():
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
    said = dict(zip(_TABLES[kind][1], call.args, strict=False))
    said |= {word.arg: word.value for word in call.keywords if word.arg is not None}
    fields: dict[str, object] = {}
    for name, node in said.items():
        if name == "kind":  # a class
            fields[name] = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
            continue
        try:
            value = ast.literal_eval(node)
        except ValueError:  # a name, which somebody has to fill in
            return None
        fields[name] = list(value) if isinstance(value, tuple) else value
    if len(call.args) > len(said) or not all(map(_is_said, fields.values())) or not fields:
        return None
    if kind == "Flatten":
        if "features" not in fields:
            return None
        if fields["features"] is None:
            del fields["features"]
            fields["channels_first"] = True
        if fields.get("output") is False:
            del fields["output"]
    subject = " ".join(str(fields.get(name)) for name in ("module", "torch", "output") if name in fields)
    table = ", ".join(f"{name} = {json.dumps(value)}" for name, value in fields.items())
    return kind, subject or str(fields.get("flax")), f"{{{table}}}"


def _is_said(value: object) -> bool:
    return value is not ... and not (isinstance(value, list) and (... in value or not value))
