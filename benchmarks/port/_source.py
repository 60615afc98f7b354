"""Counts in the emitted source, and in the torch code that it replaces."""

import ast
import inspect

from torch import nn

__all__ = ["classes", "lines", "torch_lines", "transpositions"]

_TRANSPOSING = {"transpose", "swapaxes", "moveaxis", "permute_dims", "matrix_transpose"}


def lines(source: str) -> int:
    """Lines of the file, with its header, comments and blank lines."""
    return len(source.splitlines())


def classes(source: str) -> int:
    """Classes that it defines."""
    return sum(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(source)))


def transpositions(source: str) -> int:
    """Places that permute axes by name; an ``einsum``, or a reshape that moves nothing, is none."""
    found = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found += node.attr in _TRANSPOSING or node.attr in ("T", "mT")
    return found


def torch_lines(module: nn.Module) -> int:
    """Lines of the classes of a model, each counted once; torch's own are not."""
    kinds = {type(layer) for layer in module.modules()}
    return sum(
        len(inspect.getsource(kind).splitlines())
        for kind in kinds
        if kind.__module__.split(".")[0] != "torch"
    )
