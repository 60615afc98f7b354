"""Finds names of the torch side that are the same tensor: by memory, or by identity where they have none.

Tensors on the meta device have none, and a ``DTensor`` has only that of its shard, which may be empty.

Owns the meaning of "the same tensor". ``_tied_places`` decides what a tie becomes in Flax.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchjax_bridge.exchange import dtensor_class, local_tensor

__all__ = ["find_ties", "ties_of", "ties_without_memory"]


def find_ties(state: dict[str, Any]) -> dict[str, str]:
    """Maps each key to an earlier key with the same elements in memory."""
    first: dict[int, list[str]] = {}
    ties = {}
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or not tensor.numel():
            continue
        if tensor.layout is not torch.strided or tensor.is_quantized:
            continue  # cannot cross; the exchange refuses it
        before = first.setdefault(_address(tensor), [])
        twin = next((other for other in before if _same_elements(state[other], tensor)), None)
        if twin is None:
            before.append(key)
        else:
            ties[key] = twin
    return ties


def ties_of(model: nn.Module) -> dict[str, str]:
    """Maps names of parameters and buffers to an earlier name of the same object."""
    first: dict[int, str] = {}
    ties = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        known = first.setdefault(id(tensor), name)
        if known != name:
            ties[name] = known
    return ties


def ties_without_memory(module: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
    """The ties of tensors without memory of their own whose names are both in the ``state_dict``."""
    if not any(_has_no_memory(value) for value in state.values()):
        return {}
    ties = ties_of(module).items()
    return {key: one for key, one in ties if key in state and one in state and _has_no_memory(state[key])}


def _has_no_memory(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_meta or type(value) is dtensor_class())


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor starts; for a ``DTensor`` its shard, or a place of its own if that is empty."""
    if type(tensor) is not dtensor_class():
        return tensor.data_ptr()
    return local_tensor(tensor).data_ptr() or -id(tensor)


def _same_elements(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors with the same address are the same tensor."""
    return _elements(one) == _elements(other)


def _elements(tensor: torch.Tensor) -> tuple[Any, ...]:
    # A conjugate or negative view has the same address and other values.
    lies = getattr(tensor, "placements", None)
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.is_conj(), tensor.is_neg(), lies
