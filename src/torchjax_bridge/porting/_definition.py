"""One emitted class, before it is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ._body import Body
from ._rendering import PLACE
from ._statements import Written

__all__ = ["Definition"]


@dataclass
class Definition:
    """One emitted class.

    Attributes:
        name: Its name.
        kind: The torch class.
        paths: The modules that are its instances.
        body: The code of one of them.
        shapes: The docstring of ``__call__``.
        params: The arguments of ``__init__`` by name, with the value of each instance.
        defaults: The defaults of the last of them.
        fields: The attributes, as source.
        conditions: Under which condition, as source, an attribute is there.
        counts: How many layers, as source, an attribute with numbers stands for.
        base: The class that it derives from.
        needs_rngs: Whether ``__init__`` takes ``rngs``.
        is_linen: Whether it is a class of linen.
        has_mode: Whether ``__call__`` of a class of linen takes the mode.
        chosen: The parameters and buffers whose values in a new model are the port's choice, and which they are.
    """

    name: str
    kind: type[nn.Module]
    paths: list[str]
    written: Written
    body: Body
    shapes: str
    params: dict[str, list[Any]] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)
    counts: dict[str, str] = field(default_factory=dict)
    base: str = "nnx.Module"
    needs_rngs: bool = True
    is_linen: bool = False
    has_mode: bool = False
    chosen: dict[str, str] = field(default_factory=dict)

    def attribute_lines(
        self, assign: Callable[[str, str], Sequence[str]], expression: Callable[[str], str] = str
    ) -> list[str]:
        """The statements that make the attributes, each under its condition.

        Args:
            assign: Writes one attribute, of its name and source.
            expression: Writes an expression of the arguments.
        """
        lines: list[str] = []
        running = ""
        for name, text in self.fields.items():
            condition = self.conditions.get(name, "")
            if condition and condition != running:
                lines.append(f"        if {expression(condition)}:")
            running = condition
            indent = "            " if condition else "        "
            if name in self.counts:
                lines.append(f"{indent}for {PLACE} in range({expression(self.counts[name])}):")
                lines.append(f'{indent}    setattr(self, f"{name}", {expression(text)})')
            else:
                lines += [f"{indent}{line}" for line in assign(name, text)]
        return lines
