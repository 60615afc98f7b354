"""Restores a torch model after a run: what its forward writes to, and the random states it draws from.

Owns every tensor of the modules (a parameter may be clipped in place, a table grown), their attributes and the
lists and dicts in them (a cache, a counter), and the global generators. What did not change is not written to.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from torchjax_bridge.recording import restored_random_states

__all__ = ["as_it_was"]


@contextmanager
def as_it_was(root: nn.Module) -> Iterator[None]:
    """Restore the modules and the random states afterwards.

    Memory:
        Holds a copy of every parameter and buffer.
    """
    cuda = sorted({p.device.index or 0 for p in root.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(cuda))
        stack.enter_context(restored_random_states())
        seen: dict[int, Any] = {}
        for module in root.modules():
            _keep(vars(module), stack, seen)
        yield


def _keep(thing: Any, stack: ExitStack, seen: dict[int, Any]) -> None:
    """Register callbacks that restore a thing and what it holds; the ones inside it run first."""
    if id(thing) in seen:
        return
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        if thing.layout == torch.strided and not thing.is_meta and not nn.parameter.is_lazy(thing):
            stack.callback(_put_tensor_back, thing, thing.data, thing.detach().clone())
    elif isinstance(thing, dict):
        stack.callback(_put_dict_back, thing, dict(thing))
        for item in list(thing.values()):
            _keep(item, stack, seen)
    elif isinstance(thing, list):
        stack.callback(_put_list_back, thing, list(thing))
        for item in list(thing):
            _keep(item, stack, seen)
    elif isinstance(thing, tuple):
        for item in thing:
            _keep(item, stack, seen)


def _put_tensor_back(tensor: torch.Tensor, memory: torch.Tensor, before: torch.Tensor) -> None:
    with torch.no_grad():
        if tensor.shape != memory.shape or tensor.data_ptr() != memory.data_ptr():
            tensor.data = memory
        if not torch.equal(
            tensor, before
        ):  # else not written to: the caller's autograd graph counts versions
            tensor.copy_(before)


def _put_dict_back(thing: dict[Any, Any], before: dict[Any, Any]) -> None:
    if not _same(list(thing.items()), list(before.items())):
        thing.clear()
        thing.update(before)


def _put_list_back(thing: list[Any], before: list[Any]) -> None:
    if len(thing) != len(before) or any(one is not other for one, other in zip(thing, before, strict=True)):
        thing[:] = before


def _same(items: list[tuple[Any, Any]], before: list[tuple[Any, Any]]) -> bool:
    return len(items) == len(before) and all(
        key is name and one is other for (key, one), (name, other) in zip(items, before, strict=True)
    )
