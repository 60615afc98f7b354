"""Constructors in linen's form: no ``rngs``, plain lists and dicts, parameters and buffers that ask the scope.

Works on constructor trees. The library is still called ``nnx`` in them; the file names it ``nn``.
"""

from collections.abc import Mapping
from dataclasses import replace

from ._constructors import Call, Column, Items, Numbered, Start, Tree
from ._linen_calls import Modes
from ._linen_starts import linen_start

__all__ = ["SEQUENTIAL", "linen_fields"]

SEQUENTIAL = "ModeSequential"  # the class of the file that tells its layers whether the model trains


def linen_fields(fields: Mapping[str, Tree], modes: Modes) -> dict[str, Tree]:
    """The attributes of a class in linen's form.

    Args:
        fields: Their constructors by name.
        modes: Of the model.
    """
    state = ("rngs", "deterministic")  # linen hands both to each call
    return {name: _in_linen(name, tree, modes) for name, tree in fields.items() if name not in state}


def _in_linen(name: str, tree: Tree, modes: Modes) -> Tree:
    if isinstance(tree, Call):
        args = [_in_linen(name, arg, modes) for arg in tree.args]
        if tree.function == "nnx.Sequential":
            return Items("nnx.Sequential([", args, "])")
        ends = tuple(end for end in tree.ends if end != "rngs=rngs")
        return _typed(replace(tree, args=args, ends=ends))
    if isinstance(tree, Numbered):
        return replace(tree, items=[_in_linen(name, item, modes) for item in tree.items])
    if not isinstance(tree, Items):
        return tree
    if isinstance(tree, Start):
        return linen_start(name, tree)
    items = [
        _in_linen(inside, item, modes) for inside, item in zip(_names(name, tree), tree.items, strict=True)
    ]
    if tree.start == "nnx.Sequential(":
        is_plain = items and not modes.has_mode(tree.path)  # linen's refuses to be empty
        return Items("nnx.Sequential([" if is_plain else f"{SEQUENTIAL}([", items, "])")
    if tree.start == "nnx.List([":
        return Items("[", items, "]")
    return Items("{", items, "}") if tree.start == "nnx.Dict({" else Items(tree.start, items, tree.end)


def _names(name: str, tree: Items) -> list[str]:
    """What the parameters in a list or a dict are called, as linen calls layers in these."""
    if tree.start == "nnx.List([":
        return [f"{name}_{place}" for place in range(len(tree.items))]
    if tree.start == "nnx.Dict({":
        keys = (item.start.strip('": ') if isinstance(item, Items) else "" for item in tree.items)
        return [f"{name}_{key}" for key in keys]
    return [name] * len(tree.items)


def _typed(call: Call) -> Call:
    """The strides of a transposed convolution as linen annotates them, one for each axis."""
    strides = call.kwargs.get("strides")
    if call.function != "nnx.ConvTranspose" or not isinstance(strides, Column):
        return call
    rank = max(
        len(value)
        for arg in call.args
        if isinstance(arg, Column)
        for value in arg.known
        if isinstance(value, tuple)
    )
    values = [(value,) * rank if isinstance(value, int) else value for value in strides.values]
    return replace(call, kwargs={**call.kwargs, "strides": replace(strides, values=values)})
