"""The source of constructor trees: calls without settings that are defaults, layers in a row as a comprehension."""

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

from ._constants import number_text
from ._constructors import Code, Column, Either, Indexed, Items, Numbered, Run, Text, Tree

__all__ = ["PLACE", "literal", "render", "rendered_fields"]

# Settings of layers that a reader expects in this order; any other comes after them.
_ORDER = ("strides", "padding", "kernel_dilation", "feature_group_count", "use_bias")
_PLACES = {name: place for place, name in enumerate(_ORDER)}
PLACE = "i"
"""What the place of a layer in a run is called."""


def render(tree: Tree, names: Mapping[int, str]) -> str:
    """The source of a tree.

    Args:
        tree: The tree.
        names: The argument that stands for a column, by the identity of the column; any other column has one value.
    """
    if isinstance(tree, Text):
        return tree.text
    if isinstance(tree, Column):
        return names.get(id(tree)) or literal(tree.known[0] if tree.known else None)
    if isinstance(tree, Items):
        items = [_item(item, names) for item in tree.items]
        inside = _repeated(items) if tree.between == ", " else _computed(items, tree.between)
        if tree.start.endswith("[") and inside.startswith("*[") and _closes(inside, 1) == len(inside) - 1:
            inside = inside[2:-1]  # the list is one comprehension
        return f"{tree.start}{inside}{tree.end}"
    if isinstance(tree, Either):
        flag = names.get(id(tree.flag))
        text = render(tree.then, names)
        return f"{text} if {flag} else {tree.otherwise}" if flag and tree.otherwise else text
    if isinstance(tree, Run):
        item, count = render(tree.item, names), render(tree.count, names)
        place = PLACE if re.search(rf"\b{PLACE}\b", item) else "_"
        return f"*[{item} for {place} in range({count})]"
    if isinstance(tree, Indexed):
        return _at_place(tree, [render(part, names) for part in tree.parts])
    if isinstance(tree, Numbered):
        raise TypeError("numbered layers are merged before they are written")
    if (short := _SHORT.get(tree.function)) is not None and not tree.kwargs:
        return _constant(short, tree.function, [render(arg, names) for arg in tree.args])
    keywords = []
    for name, value in sorted(tree.kwargs.items(), key=lambda item: _PLACES.get(item[0], len(_PLACES))):
        text = render(value, names)
        if name in tree.defaults and text == literal(tree.defaults[name]):
            continue
        keywords.append(f"{name}={text}")
    return (
        f"{tree.function}({', '.join([*(render(arg, names) for arg in tree.args), *keywords, *tree.ends])})"
    )


# The place of the number in calls that have a name of their own for 0 and 1, and that name.
_SHORT = {
    "jnp.full": (1, "jnp.{}"),
    "initializers.constant": (0, "initializers.{}"),
}


def _constant(short: tuple[int, str], function: str, args: list[str]) -> str:
    """``jnp.full(shape, 0.0)`` as ``jnp.zeros(shape)``, and the like."""
    at, name = short
    kind = {"0": "zeros", "0.0": "zeros", "False": "zeros", "1": "ones", "1.0": "ones", "True": "ones"}.get(
        args[at]
    )
    if kind is None:
        return f"{function}({', '.join(args)})"
    rest = [*args[:at], *args[at + 1 :]]
    return f"{name.format(kind)}({', '.join(rest)})" if rest else name.format(kind)


def _computed(items: list[str], operation: str) -> str:
    """A sum or a product without its neutral element; with any other operation, the items next to each other."""
    neutral = {" + ": ("0", "0.0"), " * ": ("1", "1.0")}.get(operation, ())
    kept = [item for item in items if item not in neutral] or items[:1]
    if operation == " * " and len(kept) > 1:
        kept = [f"({item})" if _binds_less(item) else item for item in kept]
    return operation.join(kept)


def _binds_less(text: str) -> bool:
    """Whether an expression needs brackets in a product."""
    match ast.parse(text, mode="eval").body:
        case ast.BinOp(op=ast.Add() | ast.Sub()) | ast.IfExp() | ast.BoolOp() | ast.Compare() | ast.Lambda():
            return True
    return False


def _item(tree: Tree, names: Mapping[int, str]) -> str:
    """An item of a list, or nothing where an instance lacks it."""
    if not isinstance(tree, Either):
        return render(tree, names)
    return f"*([{render(tree.then, names)}] if {names.get(id(tree.flag), 'True')} else [])"


def rendered_fields(
    fields: Mapping[str, Tree], names: Mapping[int, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The source of attributes; for layers under one name with numbers that of the layer ``i``, and their number.

    Args:
        fields: The attributes.
        names: As for `render`.
    """
    texts: dict[str, str] = {}
    counts: dict[str, str] = {}
    for name, tree in fields.items():
        inner = tree.then if isinstance(tree, Either) else tree
        if isinstance(inner, Run):
            texts[name], counts[name] = render(inner.item, names), render(inner.count, names)
        else:
            texts[name] = render(tree, names)
    return texts, counts


def _at_place(tree: Indexed, parts: list[str]) -> str:
    """A setting of the layer at the place ``i``."""
    if tree.kind == "listed":
        return f"{parts[0]}[{PLACE}]"
    if tree.kind == "first":
        known = {("True", "False"): f"{PLACE} == 0", ("False", "True"): f"{PLACE} > 0"}
        parts = [f"({part})" if part.startswith("lambda") else part for part in parts]
        otherwise = f"{parts[0]} and {PLACE} == 0" if parts[1] == "False" else ""
        otherwise = otherwise or f"{parts[0]} if {PLACE} == 0 else {parts[1]}"
        return known.get((parts[0], parts[1]), otherwise)
    factor = "" if abs(tree.step) == 1 else f"{abs(tree.step)} * "
    if parts[0] == "0" and tree.step > 0:
        return f"{factor}{PLACE}"
    return f"{parts[0]} {'+' if tree.step > 0 else '-'} {factor}{PLACE}"


def _closes(text: str, start: int) -> int:
    """Where the bracket at ``start`` closes; strings of settings hold no brackets."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth == 0:
            return place
    return len(text)


def _repeated(items: list[str]) -> str:
    """Equal items in a row as a comprehension."""
    found, start = [], 0
    while start < len(items):
        end = start
        while end < len(items) and items[end] == items[start]:
            end += 1
        is_class = items[start].endswith("rngs=rngs)") and not items[start].startswith("nnx.")
        is_one = items[start].endswith(")") and not items[start].startswith("*")
        if end - start >= (2 if is_class else 3) and is_one:
            found.append((f"{items[start]} for _ in range({end - start})", True))
        else:
            found += [(item, False) for item in items[start:end]]
        start = end
    return ", ".join(f"*[{text}]" if repeated else text for text, repeated in found)


def literal(value: Any) -> str:
    """A setting as source."""
    if isinstance(value, Code):
        return value.text
    if isinstance(value, str):
        return '"' + value.replace('"', '\\"') + '"'
    if isinstance(value, float):
        if not math.isfinite(value):
            return number_text(value)
        for bottom in range(2, 64):
            top = round(value * bottom)
            if top and top / bottom == value and len(f"{top} / {bottom}") < len(repr(value)):
                return f"{top} / {bottom}"
        return f"{value!r}"
    if isinstance(value, tuple):
        items = [literal(item) for item in value]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    return str(value) if type(value).__name__ == "Initializer" else repr(value)
