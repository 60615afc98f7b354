"""The file: header, imports, the settings that all layers share, helper functions, classes."""

import ast
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torchjax_bridge.recording import Value

from ._annotations import nnx_annotation
from ._argument_trees import takes
from ._classes import Definition
from ._constructors import Code, Given
from ._format import formatted
from ._handed import LOCAL
from ._helpers import HELPERS
from ._linen_calls import MODE
from ._linen_text import in_linen_names, linen_helpers, setup_lines
from ._parts import Part, Replacement
from ._rendering import literal
from ._reserved import argument_name

__all__ = ["source_of"]

LIMIT = 110
_GLOBAL = {"initializers", "jax", "jnp", "nnx"}
_SHARED = re.compile(r"(?<![\w.])nnx\.([A-Z]\w*)\(")


def source_of(definitions: Sequence[Definition], header: str, parts: Collection[Part] = ()) -> str:
    """The text of the file.

    Args:
        definitions: The classes, each before those that use it.
        header: The docstring of the file, without quotes.
        parts: Those that the caller translated, whose classes are imported, and those that stay in torch.
    """
    code: list[str] = []
    for definition in definitions:
        code += ["", "", *_class(definition)]
    shared, code = _with_partials(code)
    known = HELPERS
    if definitions[-1].is_linen:
        told = {part.where[1] for part in parts if isinstance(part, Replacement) and part.takes(MODE)}
        known = linen_helpers(HELPERS, definitions, told)
    helpers = _needed(code, known)
    if definitions[-1].is_linen:
        shared, helpers, code = (list(map(in_linen_names, lines)) for lines in (shared, helpers, code))
    body = "\n".join([*formatted(shared, LIMIT), *helpers, *formatted(code, LIMIT)])
    gap = "\n\n" if shared else "\n\n\n"
    imported = {part.imported for part in parts if part.imported is not None}
    own = [f"from {module} import {name}" for module, name in sorted(imported)]
    imports = "\n".join([*_imports(body, definitions[-1].is_linen), *([""] if own else []), *own])
    return f'"""{header}"""\n\n{imports}{gap}' + body.strip("\n") + "\n"


def _class(definition: Definition) -> list[str]:
    lines = [f"class {definition.name}({definition.base}):", f'    """{_summary(definition)}"""', ""]
    lines += setup_lines(definition, _typed(definition)) if definition.is_linen else _init(definition)
    params = [f"{argument_name(name)}: {_type(tree)}" for name, tree in definition.body.inputs if takes(tree)]
    params += [f"{MODE}: bool = False"] if definition.has_mode else []
    bodies = [definition.body, *([definition.body.training] if definition.body.training else [])]
    result = " | ".join(dict.fromkeys(_type(body.frame.result) for body in bodies))
    lines += [*([""] if lines[-1] else []), f"    def __call__({', '.join(['self', *params])}) -> {result}:"]
    lines.append(f'        """{definition.shapes}"""')
    for statement in definition.written.lines:
        lines += [f"        {line}" for line in ast.unparse(statement).splitlines()]
    return lines


def _init(definition: Definition) -> list[str]:
    """``__init__``, if the class needs one."""
    lines: list[str] = []
    taken = ["self", *_typed(definition), *(["*", "rngs: nnx.Rngs"] if definition.needs_rngs else [])]
    if definition.fields or len(taken) > 1:
        lines.append(f"    def __init__({', '.join(taken)}) -> None:")
    start = definition.fields.get("super()")
    if start is not None:
        lines.append(f"        super().__init__({start.partition('(')[2]}")
    code = "\n".join(map(ast.unparse, definition.written.lines))

    def assigned(name: str, text: str) -> list[str]:
        if name.startswith(LOCAL):
            return [f"{name.removeprefix(LOCAL)} = {text}"]
        return [] if name == "super()" else [f"self.{name}{nnx_annotation(name, text, code)} = {text}"]

    lines += definition.attribute_lines(assigned)
    if definition.needs_rngs and not definition.fields:
        lines.append("        del rngs")
    return lines


def _summary(definition: Definition) -> str:
    """What a class is: the first line of the author's docstring, else where it comes from."""
    kind = definition.kind
    lines = (vars(kind).get("__doc__") or "").strip().splitlines()
    first = " ".join(lines[0].split()) if lines else ""
    if (
        first
        and not first.endswith((":", ","))
        and "\\" not in first
        and '"' not in first
        and len(first) < LIMIT - 20
    ):
        return first if first.endswith((".", "!", "?")) else f"{first}."
    return f"{kind.__name__} of {kind.__module__}."


def _typed(definition: Definition) -> list[str]:
    found = []
    for name, values in definition.params.items():
        default = f" = {literal(definition.defaults[name])}" if name in definition.defaults else ""
        found.append(f"{name}: {_setting_type(values)}{default}")
    return found


def _setting_type(values: Sequence[Any]) -> str:
    kinds = {_setting_kind(value) for value in values}
    return " | ".join(sorted(kinds, key=lambda kind: (kind == "None", kind)))


def _setting_kind(value: Any) -> str:
    if isinstance(value, Given | Code):
        return "Callable[..., Any]"
    if isinstance(value, tuple | list) and value:
        inner = _setting_kind(value[0])
        return f"tuple[{inner}, ...]" if isinstance(value, tuple) else f"list[{inner}]"
    return {type(None): "None", bool: "bool", int: "int", float: "float", str: "str"}.get(type(value), "Any")


def _type(tree: Any) -> str:
    """The annotation of an argument or a result."""
    if isinstance(tree, Value):
        return "jax.Array" if tree.dtype is not None else "int"
    if isinstance(tree, dict):
        return "dict[str, Any]"
    if isinstance(tree, list):
        kinds = {_type(item) for item in tree}
        return f"list[{kinds.pop() if len(kinds) == 1 else 'Any'}]"
    if isinstance(tree, tuple):
        return f"tuple[{', '.join(map(_type, tree))}]"
    return "None" if tree is None else type(tree).__mro__[-2].__name__


def _needed(code: Sequence[str], known: Mapping[str, str]) -> list[str]:
    """The helper functions that the code calls, and those that they call."""
    text, found = "\n".join(code), []
    for _ in range(2):
        for name in known:
            if re.search(rf"(?<![\w.]){name}[()]", text) and name not in found:
                found.append(name)
                text += known[name]
    return [line for name in known if name in found for line in ("", "", *known[name].strip().splitlines())]


def _with_partials(code: list[str]) -> tuple[list[str], list[str]]:
    """Settings that the layers of a class share and repeat, as a ``functools.partial`` in front of the classes."""
    shared = []
    for name in dict.fromkeys(_SHARED.findall("\n".join(code))):
        calls = _calls(code, name)
        keywords = [_keywords(call) for call in calls]
        common = [k for k in keywords[0] if all(k in other for other in keywords)]
        if len(calls) < 2 or not common:
            continue
        shared.append(f"{name} = partial(nnx.{name}, {', '.join(common)})")
        code = [_shortened(line, name, common) for line in code]
    shared = [line.replace("'", '"') for line in shared]
    code = [re.sub(r"(?<=kernel_init=)initializers[^()]*\([^()]*\)", _double, line) for line in code]
    text = "\n".join([*shared, *code])
    starts = dict.fromkeys(re.findall(r"kernel_init=(initializers\.\w+\([^()]*\))", text))
    if len(starts) == 1 and text.count("kernel_init=") > 1:
        [start] = starts
        shared = [f"kernel_init = {start}", *(line.replace(start, "kernel_init") for line in shared)]
        code = [line.replace(start, "kernel_init") for line in code]
    return shared, code


def _double(match: re.Match[str]) -> str:
    return match.group().replace("'", '"')


def _parsed(line: str) -> ast.stmt:
    """A line of code; the head of a block, with a body."""
    text = line.strip()
    return ast.parse(f"{text} pass" if text.endswith(":") else text).body[0]


def _calls(code: Sequence[str], name: str) -> list[ast.Call]:
    return [
        node
        for line in code
        if f"nnx.{name}(" in line and not line.startswith("class")
        for node in ast.walk(_parsed(line))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"nnx.{name}"
    ]


def _keywords(call: ast.Call) -> list[str]:
    """The settings of a call that mean the same outside of the class."""
    return [
        f"{keyword.arg}={ast.unparse(keyword.value)}"
        for keyword in call.keywords
        if {node.id for node in ast.walk(keyword.value) if isinstance(node, ast.Name)} <= _GLOBAL
    ]


def _shortened(line: str, name: str, common: Sequence[str]) -> str:
    if f"nnx.{name}(" not in line or line.startswith("class"):
        return line
    indent = line[: len(line) - len(line.lstrip())]

    class Shorten(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            self.generic_visit(node)
            if ast.unparse(node.func) == f"nnx.{name}":
                node.func = ast.Name(name, ast.Load())
                node.keywords = [k for k in node.keywords if f"{k.arg}={ast.unparse(k.value)}" not in common]
            return node

    return indent + ast.unparse(Shorten().visit(_parsed(line))).splitlines()[0]


def _imports(body: str, is_linen: bool) -> list[str]:
    standard = ["import math"] if re.search(r"\bmath\.", body) else []
    abstract = [name for name in ("Callable", "Sequence") if re.search(rf"\b{name}\b", body)]
    standard += [f"from collections.abc import {', '.join(abstract)}"] if abstract else []
    standard += ["from functools import partial"] if "partial(" in body else []
    standard += ["from typing import Any"] if re.search(r"\bAny\b", body) else []
    third = ["import jax"] if re.search(r"\bjax\.", body) else []
    third += ["import jax.numpy as jnp"] if "jnp." in body else []
    third += ["import numpy as np"] if re.search(r"\bnp\.", body) else []
    third.append("from flax import linen as nn" if is_linen else "from flax import nnx")
    initializers = re.search(r"(?<!\.)\binitializers\.", body)
    third += [f"from flax.{'linen' if is_linen else 'nnx'} import initializers"] if initializers else []
    return [*standard, *([""] if standard else []), *third]
