"""Copies of modules, of which what runs is one."""

import copy

import torch
from torch import nn

from torchjax_bridge.errors import ArgumentError

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
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                known[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(module, known)
    except (RuntimeError, TypeError) as err:
        raise ArgumentError(
            f"cannot copy {type(module).__name__}, which is recorded on a copy: {err}"
        ) from err
