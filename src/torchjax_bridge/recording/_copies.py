"""Copies of modules, of which what runs is one."""

import copy
import functools
from collections.abc import Iterator
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

from torchjax_bridge.errors import ArgumentError

from ._frames import tensors_of

__all__ = ["copy_module"]


def copy_module(module: nn.Module, *, share: bool = False) -> nn.Module:
    """A copy of a module.

    Args:
        module: The module. What it kept of earlier calls, and a weight that its hooks compute, lose the history
            of their gradients, which torch cannot copy.
        share: Whether the copy has the same parameters.

    Raises:
        ArgumentError: It cannot be copied.
    """
    known = dict[int, torch.Tensor]()
    if share:
        known |= {id(tensor): tensor for tensor in module.parameters()}
    for part in module.modules():
        for tensor in tensors_of(vars(part), torch.Tensor):
            if not tensor.is_leaf:
                known[id(tensor)] = tensor.detach().clone()
    cells = _copied_functions(module, known)
    try:
        copied = copy.deepcopy(module, known)
        for cell, value in cells:
            cell.cell_contents = copy.deepcopy(value, known)
        return copied
    except (RuntimeError, TypeError, AssertionError) as err:  # FSDP asserts it
        raise ArgumentError(
            f"cannot copy {type(module).__name__}, which is recorded on a copy: {err}"
        ) from err


def _copied_functions(module: nn.Module, known: dict[int, Any]) -> list[tuple[CellType, Any]]:
    """Copies of functions among the attributes that hold modules, which `copy.deepcopy` takes as they are.

    Args:
        module: What will be copied.
        known: What has been copied, by identity; the functions are added.

    Returns:
        The empty cells of the copies, each with what the copy of is to be put in.
    """
    cells = list[tuple[CellType, Any]]()
    for part in module.modules():
        for function in _functions(list(vars(part).values())):
            if id(function) in known or not any(map(_holds_module, function.__closure__ or ())):
                continue
            own = tuple(CellType() for _ in function.__closure__ or ())
            copied = FunctionType(
                function.__code__, function.__globals__, function.__name__, function.__defaults__, own
            )
            copied.__kwdefaults__ = function.__kwdefaults__
            copied.__dict__.update(function.__dict__)
            known[id(function)] = copied
            cells += zip(own, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
    return cells


def _functions(tree: Any) -> Iterator[FunctionType]:
    if isinstance(tree, FunctionType):
        yield tree
    elif isinstance(tree, functools.partial):
        yield from _functions(tree.func)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _functions(item)
    elif isinstance(tree, dict):
        yield from _functions(list(tree.values()))


def _holds_module(cell: CellType) -> bool:
    try:
        return isinstance(cell.cell_contents, nn.Module)
    except ValueError:  # it is empty
        return False
