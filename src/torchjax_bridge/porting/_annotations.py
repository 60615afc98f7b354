"""Annotations of attributes whose inferred type says too little to call or to index them.

No item of a list can be called that holds layers and functions, or ``None`` too. A layer may have no bias.
"""

import ast
import re
from collections.abc import Iterator

__all__ = ["linen_annotation", "nnx_annotation"]

_HOLDERS = ("nnx.List", "nnx.Dict")


def nnx_annotation(name: str, text: str, code: str) -> str:
    """The annotation of an attribute of a class of nnx, or nothing.

    Args:
        name: The attribute.
        text: Its value.
        code: The code of the class that reads it.
    """
    value = ast.parse(text, mode="eval").body
    function = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
    if isinstance(value, ast.Call) and function in _HOLDERS:
        differ = len(set(_kinds(value.args[0]))) > 1
        reads = re.search(rf"\bself\.{name}\[[^]]+\]\.\w+\[\.\.\.\]", code)
        return f": {function}[Any]" if differ or reads else ""
    # Flax says of these that they may be None, and of what a Sequential holds that it is called.
    reads = re.search(rf"\bself\.{name}(\.layers\[\w+\]\.\w+|\.bias|\.scale)\[\.\.\.\]", code)
    return ": Any" if reads and function.startswith("nnx.") else ""


def linen_annotation(text: str) -> str:
    """The annotation of a list of layers of different classes, which have no call in common."""
    value = ast.parse(text, mode="eval").body
    if not isinstance(value, ast.List):
        return ""
    kinds = {ast.unparse(item.func) if isinstance(item, ast.Call) else "" for item in value.elts}
    return ": list[Any]" if len(kinds) > 1 else ""


def _kinds(node: ast.expr) -> Iterator[str]:
    """What the items of a list are: layers, which nnx can call, functions, parameters, or nothing."""
    match node:
        case ast.List(elts=items) | ast.Dict(values=items):
            for item in items:
                yield from _kinds(item)
        case ast.Starred(value=inner) | ast.ListComp(elt=inner):
            yield from _kinds(inner)
        case ast.IfExp(body=yes, orelse=no):
            yield from (*_kinds(yes), *_kinds(no))
        case ast.Constant(value=None):
            yield "None"
        case ast.Call(func=function, args=args) if ast.unparse(function) in _HOLDERS:
            yield f"{ast.unparse(function)} {sorted(set(_kinds(args[0])))}"
        case ast.Call(func=function):
            name = ast.unparse(function).rpartition(".")[2]
            is_layer = name[:1].isupper() and name not in ("Param", "Variable", "BatchStat")
            yield "layer" if is_layer else name
        case _:
            yield "function"
