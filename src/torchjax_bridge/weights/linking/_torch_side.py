"""The torch side of a link: where the tensors of the plan live in the module, and whether they still do.

A `Slot` reads its tensor from the module each time, so a parameter that was replaced by one of its shape is seen.
This is the only file of the link that reads ``_parameters``, ``_buffers`` and ``_modules``: ``named_parameters``
would take longer than the copies of small tensors.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import dtensor_class

from ._stale import changed, raise_if_stale, stale

__all__ = ["Slot", "TorchSide"]


class Slot:
    """The place of one parameter or buffer in its module.

    Attributes:
        key: Its key in the module's ``state_dict``.
        holder: The dict that holds the tensor, under ``name``.
        name: Its own name in its module.
        shape: The shape that the plan was made for.
        dtype: The dtype at that time.
        device: The device at that time.
    """

    __slots__ = ("device", "dtype", "holder", "key", "name", "shape")

    def __init__(self, key: str, holder: dict[str, Any], name: str) -> None:
        self.key = key
        self.holder = holder
        self.name = name
        tensor = holder[name]
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device

    def read(self) -> torch.Tensor:
        """The tensor that is there now, detached; it shares memory and version with the module's own.

        Raises:
            PlanError: It is missing, has no memory, or has another shape, dtype or device than the plan was made
                for.
        """
        tensor = self.holder.get(self.name)
        if tensor is None or tensor.shape != self.shape or tensor.dtype is not self.dtype:
            raise stale(self.faults())
        alias = tensor.detach()
        if alias.device != self.device:
            raise stale(self.faults())
        if isinstance(alias, dtensor_class() or ()):
            raise PlanError(
                f"'{self.key}' is a DTensor, and a link holds plain tensors. Convert the module each time: "
                "to_flax(module, template), to_state_dict(flax, module)."
            )
        if _has_no_memory(alias):
            raise PlanError(
                f"'{self.key}' has no memory: it is a meta tensor, or its storage was freed. Give it values first, "
                "such as by module.to_empty() or by gathering it."
            )
        return alias

    def faults(self) -> Iterator[str]:
        """What is not as it was, one line each."""
        tensor = self.holder.get(self.name)
        if tensor is None:
            yield f"parameter or buffer '{self.key}' was removed"
            return
        for what in ("shape", "dtype", "device"):
            before, now = getattr(self, what), getattr(tensor, what)
            if before != now:
                said = (tuple(before), tuple(now)) if what == "shape" else (before, now)
                yield f"'{self.key}' had {what} {said[0]} and has {said[1]} now"


class TorchSide:
    """The slots of a module, and what its structure was when they were found.

    Args:
        module: The live module.
        ties: Pairs of keys that are one tensor.
        keys: The keys of all tensors in the ``state_dict``.

    Raises:
        PlanError: A key is no parameter or buffer of the module.
    """

    def __init__(self, module: nn.Module, keys: Iterable[str], ties: Iterable[tuple[str, str]]) -> None:
        self._module = module
        self.slots = {key: _slot(module, key) for key in keys}
        self._ties = [(self.slots[key], self.slots[twin]) for key, twin in ties]
        self._keys = _keys(module)
        self._children = _children(module)
        self._structure = list(_structure(module))

    def check(self) -> None:
        """Raise a `PlanError` that names every module, parameter or buffer that was added, removed or replaced."""
        for holder, names, children in self._structure:
            if tuple(holder) != names or (children is not None and tuple(holder.values()) != children):
                self._explain()
                break
        for slot, twin in self._ties:
            if slot.read().data_ptr() != twin.read().data_ptr():
                raise_if_stale([f"'{slot.key}' was the same tensor as '{twin.key}' and is another now"])

    def _explain(self) -> None:
        """Raise, unless the change does not touch the weights, as a buffer that is not persistent."""
        children = _children(self._module)
        faults = [*changed(self._children, children, "module")]
        faults += [
            f"module '{name}' was replaced"
            for name, one in self._children.items()
            if children.get(name, one) is not one
        ]
        raise_if_stale([*faults, *changed(self._keys, _keys(self._module), "parameter or buffer")])
        self._structure = list(_structure(self._module))


def _has_no_memory(tensor: torch.Tensor) -> bool:
    try:
        return not tensor.data_ptr() and tensor.numel() > 0
    except RuntimeError:  # inside torch.func, where a leaf that crosses is refused
        return False


def _keys(module: nn.Module) -> dict[str, None]:
    return dict.fromkeys(module.state_dict(keep_vars=True))


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: one for name, one in module.named_modules(remove_duplicate=False) if name}


def _structure(module: nn.Module) -> Iterator[tuple[dict[str, Any], tuple[str, ...], tuple[Any, ...] | None]]:
    """Every dict of children, parameters or buffers, with its names; of children also the modules."""
    for part in module.modules():
        yield part._modules, tuple(part._modules), tuple(part._modules.values())
        yield part._parameters, tuple(part._parameters), None
        yield part._buffers, tuple(part._buffers), None


def _slot(module: nn.Module, key: str) -> Slot:
    path, _, name = key.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = None
    for holder in () if owner is None else (owner._parameters, owner._buffers):
        if holder.get(name) is not None:
            return Slot(key, holder, name)
    raise PlanError(
        f"cannot link '{key}': the state_dict has it, but the module has no such parameter or buffer (a hook makes "
        "it). Convert with to_flax and to_state_dict each time."
    )
