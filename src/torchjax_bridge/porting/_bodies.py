"""Bodies of the instances of a class: whether they are alike, and the numbers that they differ in.

Works on syntax trees.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ._statements import Written

__all__ = ["abstract", "alike", "numbers", "returned", "with_attributes"]


def alike(one: Written, other: Written) -> bool:
    """Whether two bodies are equal but for numbers."""
    return one.params == other.params and abstract(one) == abstract(other)


def numbered(lines: Written) -> Iterator[ast.Constant]:
    for tree in lines.lines:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and type(node.value) in (int, float):
                yield node


def numbers(lines: Written) -> list[Any]:
    return [node.value for node in numbered(lines)]


def abstract(lines: Written) -> list[str]:
    copied = copy.deepcopy(lines)
    for node in numbered(copied):
        node.value = 0
    return [ast.dump(tree) for tree in copied.lines]


def with_attributes(lines: Written, names: dict[int, str]) -> Written:
    """The code with some of its numbers replaced by attributes."""
    copied = copy.deepcopy(lines)
    constants = list(numbered(copied))
    chosen = {id(constants[place]): name for place, name in names.items()}

    class Change(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.AST:
            name = chosen.get(id(node))
            return node if name is None else ast.parse(f"self.{name}", mode="eval").body

    change = Change()
    return replace(copied, lines=[change.visit(line) for line in copied.lines])


def returned(lines: list[ast.stmt]) -> list[ast.stmt]:
    """``x = f(x)`` and ``return x`` as one statement."""
    match lines:
        case [
            *before,
            ast.Assign(targets=[ast.Name(id=name)], value=value),
            ast.Return(value=ast.Name(id=given)),
        ]:
            if name == given:
                return [*before, ast.Return(value)]
    return lines
