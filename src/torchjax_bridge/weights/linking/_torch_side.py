"""The torch side of a link: where the tensors of the plan live in the module, and whether they still do.

The tensors are read from the module each time, so a parameter that was replaced by one of its shape is seen. This
is the only file of the link that reads ``_parameters``, ``_buffers`` and ``_modules``: ``named_parameters`` would
take longer than the copies of small tensors. So would a loop of Python over their attributes; all are compared at
once, by functions of C.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import dtensor_class

from ._stale import changed, raise_if_stale

__all__ = ["Reading", "Slot", "TorchSide"]

_SHAPE, _DTYPE, _DEVICE = map(operator.attrgetter, ("shape", "dtype", "device"))
_HELD = operator.attrgetter("_parameters", "_buffers", "_modules")


class Slot(NamedTuple):
    """The place of one parameter or buffer in its module, and what the plan was made for."""

    key: str
    """Its key in the module's ``state_dict``."""
    holder: dict[str, Any]
    """The dict that holds the tensor, under ``name``."""
    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    is_buffer: bool

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


class Reading(NamedTuple):
    """The module's own tensors at one time, in the order of the slots."""

    tensors: list[torch.Tensor]
    pointers: list[int] | None
    """Where their memory starts; None if one has none of its own, as inside ``torch.func``."""


class TorchSide:
    """The slots of a module, and what its structure was when they were found.

    Args:
        module: The live module.
        ties: Pairs of keys that are one tensor.
        keys: The keys of all tensors in the ``state_dict``.

    Raises:
        PlanError: A key is no parameter or buffer of the module, or names a ``DTensor``.
    """

    def __init__(self, module: nn.Module, keys: Iterable[str], ties: Iterable[tuple[str, str]]) -> None:
        self._module = module
        state = _state(module)
        self.slots = [_slot(module, key, state.get(key)) for key in dict.fromkeys(keys)]
        self.places = {slot.key: place for place, slot in enumerate(self.slots)}
        self._ties = list(ties)
        self._shapes, self._dtypes, self._devices = (
            [getattr(slot, what) for slot in self.slots] for what in ("shape", "dtype", "device")
        )
        self._refuse_dtensors({type(slot.holder[slot.name]) for slot in self.slots})
        self._keys = dict.fromkeys(state)
        self._children = _children(module)
        self._note()

    def _note(self) -> None:
        """Note where each tensor is held, every dict of a module with its names, and the children."""
        self._holders = [slot.holder for slot in self.slots]
        self._names = [slot.name for slot in self.slots]
        self._parts = list(self._module.modules())
        self._kinds = list(map(type, self._parts))
        self._held: list[dict[str, Any]] = list(chain.from_iterable(map(_HELD, self._parts)))
        self._empty = [one for one in self._held if not one]
        self._dicts = [one for one in self._held if one]
        equal: dict[tuple[str, ...], tuple[str, ...]] = {}  # kept once: less memory to read at each push
        self._dict_names = [equal.setdefault(names, names) for names in map(tuple, self._dicts)]
        self._child_dicts = [part._modules for part in self._parts if part._modules]
        self._all_children = list(self._every_child())
        ours = {(id(slot.holder), slot.name) for slot in self.slots}
        others: list[tuple[dict[str, Any], str]] = [
            (one, name)
            for part in self._parts
            for one in (part._parameters, part._buffers)
            for name in one
            if (id(one), name) not in ours
        ]
        self._other_holders: list[dict[str, Any]] = [one for one, _ in others]
        self._other_names = [name for _, name in others]
        self._absent = list(self._others_absent())

    def _every_child(self) -> Iterator[nn.Module | None]:
        return chain.from_iterable(map(dict.values, self._child_dicts))

    def _others_absent(self) -> Iterator[bool]:
        """Whether each parameter and buffer that does not cross is None, as the bias of a layer without one."""
        return map(operator.is_, map(dict.get, self._other_holders, self._other_names), repeat(None))

    def read(self) -> Reading:
        """The tensors that are there now.

        Raises:
            PlanError: A module, parameter or buffer was added, removed or replaced, a tie was cut, or a tensor has
                no memory. The message names it.
        """
        if (
            any(self._empty)
            or not all(map(operator.eq, map(tuple, self._dicts), self._dict_names))
            or not all(map(operator.is_, self._every_child(), self._all_children))
            or list(self._others_absent()) != self._absent
            or list(map(type, self._parts)) != self._kinds
            or not all(map(operator.is_, chain.from_iterable(map(_HELD, self._parts)), self._held))
        ):
            self._explain()
        tensors: list[Any] = list(map(dict.get, self._holders, self._names))
        try:
            pointers: list[int] | None = list(map(torch.Tensor.data_ptr, tensors))
        except (RuntimeError, TypeError, ValueError):  # without memory of its own; None; lazy
            pointers = None
            self._refuse_other_tensors(tensors)
        reading = Reading(tensors, pointers)
        if pointers is None or 0 in pointers:
            self.check(reading)
            self._refuse_no_memory(reading)
        for key, twin in self._ties:
            one, other = (self.places[name] for name in (key, twin))
            if tensors[one] is not tensors[other] and (pointers is None or pointers[one] != pointers[other]):
                raise_if_stale([f"'{key}' was the same tensor as '{twin}' and is another now"])
        return reading

    def check(self, reading: Reading) -> None:
        """Check what was read against the plan.

        Raises:
            PlanError: A tensor has another shape, dtype or device, or is a ``DTensor``. The message names it.
        """
        tensors = reading.tensors
        try:
            fits = (
                list(map(_SHAPE, tensors)) == self._shapes
                and list(map(_DTYPE, tensors)) == self._dtypes
                and list(map(_DEVICE, tensors)) == self._devices
            )
        except AttributeError:  # one is None
            fits = False
        if not fits:
            raise_if_stale(fault for slot in self.slots for fault in slot.faults())
        self._refuse_dtensors(set(map(type, tensors)))

    def _refuse_dtensors(self, kinds: Iterable[type]) -> None:
        sharded: Any = dtensor_class() or ()
        if any(issubclass(kind, sharded) for kind in kinds):
            key = next(slot.key for slot in self.slots if isinstance(slot.holder.get(slot.name), sharded))
            raise PlanError(
                f"'{key}' is a DTensor, and a link holds plain tensors. Convert the module each time: "
                "to_flax(module, template), to_state_dict(flax, module)."
            )

    def _refuse_other_tensors(self, tensors: Sequence[torch.Tensor | None]) -> None:
        for slot, tensor in zip(self.slots, tensors, strict=True):
            if tensor is None:
                continue
            lazy = is_lazy(tensor)
            if lazy or tensor.layout is not torch.strided:
                what = "not initialized yet" if lazy else f"a sparse tensor ({tensor.layout})"
                raise PlanError(
                    f"'{slot.key}' is {what}, and a link holds dense tensors: put the values into the dense tensor "
                    "that was there."
                )

    def _refuse_no_memory(self, reading: Reading) -> None:
        for slot, tensor, pointer in zip(self.slots, reading.tensors, reading.pointers or (), strict=False):
            if not pointer and tensor.numel():
                raise PlanError(
                    f"'{slot.key}' has no memory: it is a meta tensor, or its storage was freed. Give it values "
                    "first, such as by module.to_empty() or by gathering it."
                )

    def _explain(self) -> None:
        """Raise, unless the change does not touch the weights, as a buffer that is not persistent."""
        self._refuse_dtensors({type(slot.holder.get(slot.name)) for slot in self.slots})
        children = _children(self._module)
        faults = [*changed(self._children, children, "module")]
        faults += [
            f"module '{name}' was replaced"
            for name, one in self._children.items()
            if children.get(name, one) is not one
        ]
        faults += [
            f"a {kind.__name__} has become {what_kind(part)}"
            for part, kind in zip(self._parts, self._kinds, strict=True)
            if type(part) is not kind
        ]
        state = _state(self._module)
        raise_if_stale([*faults, *changed(self._keys, state, "parameter or buffer")])
        self.slots = [
            slot._replace(holder=_slot(self._module, slot.key, state[slot.key]).holder) for slot in self.slots
        ]
        self._note()


def _state(module: nn.Module) -> dict[str, Any]:
    """What the module would save, as its own tensors."""
    return module.state_dict(keep_vars=True)


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: one for name, one in module.named_modules(remove_duplicate=False) if name}


def _slot(module: nn.Module, key: str, listed: torch.Tensor | None) -> Slot:
    path, _, name = key.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = None
    holders = () if owner is None else ((owner._parameters, False), (owner._buffers, True))
    for holder, is_buffer in holders:
        if (tensor := holder.get(name)) is not None and tensor is listed:
            return Slot(key, holder, name, tensor.shape, tensor.dtype, tensor.device, is_buffer)
    raise PlanError(
        f"cannot link '{key}': what the state_dict has under this name is no parameter or buffer of the module (a "
        "hook makes it). Convert with to_flax and to_state_dict each time."
    )
