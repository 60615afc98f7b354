"""The arguments of an emitted class: equal columns are one argument, named as the author named it.

Reads the source of the torch class's ``__init__`` as a hint for names. Without source the names are Flax's.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ._constructors import MISSING, Column, Tree, columns

__all__ = ["Arguments", "argument_names"]

_RESERVED = {"self", "rngs", "jax", "jnp", "nnx"}
# What torch calls the settings of its layers, by Flax's name; the positions are those of torch's constructors.
_TORCH_NAMES = {
    "in_features": ("in_channels", "in_features", 0),
    "out_features": ("out_channels", "out_features", 1),
    "kernel_size": ("kernel_size", "kernel_size", 2),
    "strides": ("stride", "stride", 3),
    "padding": ("padding", "padding", 4),
    "kernel_dilation": ("dilation", "dilation", 5),
    "feature_group_count": ("groups", "groups", 6),
    "num_features": ("num_features", "normalized_shape", 0),
    "rate": ("p", "p", 0),
    "num_heads": ("num_heads", "num_heads", 1),
}
_GENERIC = {"feature_group_count": "groups", "num_features": "features", "kernel_dilation": "dilation"}


@dataclass
class Arguments:
    """The arguments of a class.

    Attributes:
        params: By name, the value of each instance.
        by_column: The argument that stands for a column, by the identity of the column.
    """

    params: dict[str, list[Any]] = field(default_factory=dict)
    by_column: dict[int, str] = field(default_factory=dict)


def argument_names(kind: type[nn.Module], fields: Mapping[str, Tree]) -> Arguments:
    """Join equal columns of the attributes of a class and name them.

    Args:
        kind: The torch class.
        fields: Its attributes.
    """
    every = [(name, column) for name, tree in fields.items() for column in columns(tree)]
    varying = [(name, column) for name, column in every if column.varies]
    groups: list[list[tuple[str, Column]]] = []
    for name, column in sorted(varying, key=lambda item: len(item[1].values) - len(item[1].known)):
        for group in groups:
            if _agree(group, column):
                group.append((name, column))
                break
        else:
            groups.append([(name, column)])
    order = {id(column): place for place, (_, column) in enumerate(every)}
    groups.sort(key=lambda group: min(order[id(column)] for _, column in group))
    written = _written_arguments(kind)
    found = Arguments()
    for group in groups:
        name = _name(group, written, found.params)
        merged = [
            next((v for _, c in group if (v := c.values[i]) is not MISSING), MISSING)
            for i in range(len(group[0][1].values))
        ]
        found.params[name] = merged
        for _, column in group:
            found.by_column[id(column)] = name
    return found


def _agree(group: list[tuple[str, Column]], column: Column) -> bool:
    both = False
    for _, other in group:
        for one, two in zip(other.values, column.values, strict=True):
            if one is not MISSING and two is not MISSING:
                both = True
                if type(one) is not type(two) or one != two:
                    return False
    return both


def _name(
    group: list[tuple[str, Column]], written: Mapping[tuple[str, str], str], taken: Mapping[str, Any]
) -> str:
    group = sorted(group, key=lambda item: item[1].place == "")
    wanted = [written[name, column.setting] for name, column in group if (name, column.setting) in written]
    wanted += [column.setting for name, column in group if column.setting == name]
    first, column = group[0]
    generic = _GENERIC.get(column.setting, column.setting)
    wanted += [generic, f"{first}_{generic}"]
    for name in wanted:
        if name.isidentifier() and name not in taken and name not in _RESERVED:
            return name
    return next(name for name in (f"{generic}{i}" for i in range(2, 1000)) if name not in taken)


def _written_arguments(kind: type[nn.Module]) -> dict[tuple[str, str], str]:
    """For each attribute and Flax setting, the argument of ``__init__`` that the author passed as it is."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.__init__)))
    except (OSError, SyntaxError, TypeError):
        return {}
    found: dict[tuple[str, str], str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            attribute = node.targets[0].attr
            for call in ast.walk(node.value):
                if isinstance(call, ast.Call):
                    for setting, argument in _settings(call):
                        found.setdefault((attribute, setting), argument)
            if isinstance(node.value, ast.Name):
                found.setdefault((attribute, attribute), node.value.id)
    return found


def _settings(call: ast.Call) -> Iterator[tuple[str, str]]:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    for setting, (*names, place) in _TORCH_NAMES.items():
        value = next((keywords[name] for name in names if name in keywords), None)
        if value is None and isinstance(place, int) and place < len(call.args):
            value = call.args[place]
        if isinstance(value, ast.Name):
            yield setting, value.id
