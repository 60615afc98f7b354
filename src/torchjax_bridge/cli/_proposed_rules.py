"""Translates the rules that a message proposes in Python into lines for ``--rules FILE``.

Parses the text of the message. Translates only calls whose arguments are all values; ``Flatten("fc", (C, H, W))``
is a question, and left out. Two proposals for one name, or a proposal with a ``<blank>``, become comments, because
the user has to choose.
"""

import ast
import json
import re
from collections.abc import Iterator

__all__ = ["proposed_rules"]

_BLANK = re.compile('"<')
_CHOICE = re.compile(r'Rename\(("[^"]*"), <([^>]*)>\)')  # a question with its possible answers
# For each class, the table of a rules file, and its fields in the order of the arguments.
_TABLES = {
    "Rename": ("rename", ("torch", "flax")),
    "LayerType": ("layer_type", ("torch", "kind")),
    "Flatten": ("flatten", ("torch", "features", "output")),
    "Fused": ("fused", ("module", "torch", "flax", "heads")),
    "Keep": ("keep", ("torch",)),
    "Fill": ("fill", ("flax", "value")),
}
_CALL = re.compile(rf"\b({'|'.join(_TABLES)})\(")


def proposed_rules(message: str) -> list[str]:
    """The lines of a rules file; empty if the message proposes no rule.

    >>> proposed_rules('say rules=[Rename("a", "b"), LayerType("c", nn.Conv1d)]')
    ['rename = [{torch = "a", flax = "b"}]', 'layer_type = [{torch = "c", kind = "Conv1d"}]']
    """
    found: dict[str, dict[str, list[str]]] = {}
    for call in _calls(message):
        if (entry := _toml_entry(call)) is not None:
            kind, subject, text = entry
            texts = found.setdefault(_TABLES[kind][0], {}).setdefault(subject, [])
            if text not in texts:
                texts.append(text)
    return [line for table, subjects in found.items() for line in _table(table, subjects)]


def _table(table: str, subjects: dict[str, list[str]]) -> Iterator[str]:
    groups = list(subjects.values())
    first = [texts[0] for texts in groups if not _BLANK.search(texts[0])]
    questions: list[str] = []  # as comments
    for texts in groups:
        if _BLANK.search(texts[0]):
            questions += ["  # fill in:", *(f"  # {text}," for text in texts)]
        elif len(texts) > 1 and table != "flatten":
            first.remove(texts[0])
            questions += ["  # one of these:", *(f"  # {text}," for text in texts)]
    if table == "flatten":  # the first text is proposed, the others are alternatives
        yield from (f"# or {table} = [{text}]" for texts in groups for text in texts[1:])
    if len(first) == 1 and not questions:
        yield f"{table} = [{first[0]}]"
        return
    yield f"{table} = ["
    yield from (f"  {text}," for text in first)
    yield from questions
    yield "]"


def _calls(message: str) -> Iterator[ast.Call]:
    for line in re.sub(r"<(\w[\w ]*)>", r'"<\1>"', _CHOICE.sub(_one_call_per_answer, message)).splitlines():
        for begin in _CALL.finditer(line):
            for end in re.finditer(r"\)", line[begin.end() :]):
                try:
                    tree = ast.parse(line[begin.start() : begin.end() + end.end()], mode="eval")
                except SyntaxError:  # this parenthesis does not close the call, or it is prose
                    continue
                if isinstance(tree.body, ast.Call):
                    yield tree.body
                break


def _one_call_per_answer(choice: re.Match[str]) -> str:
    answers = re.findall(r'"[^"]*"', choice[2])
    return " or ".join(f"Rename({choice[1]}, {answer})" for answer in answers)


def _toml_entry(call: ast.Call) -> tuple[str, str, str] | None:
    """The class of a rule, the names it is about, and its TOML table on one line."""
    kind = call.func.id if isinstance(call.func, ast.Name) else ""
    arguments = dict(zip(_TABLES[kind][1], call.args, strict=False))
    arguments |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    fields: dict[str, object] = {}
    for name, node in arguments.items():
        if name == "kind":  # a class
            fields[name] = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
            continue
        try:
            value = ast.literal_eval(node)
        except ValueError:  # a variable, which the user has to fill in
            return None
        fields[name] = list(value) if isinstance(value, tuple) else value
    if len(call.args) > len(arguments) or not all(map(_is_given, fields.values())) or not fields:
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


def _is_given(value: object) -> bool:
    return value is not ... and not (isinstance(value, list) and (... in value or not value))
