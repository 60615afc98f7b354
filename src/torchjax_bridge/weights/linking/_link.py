"""`Link`: pushes the weights of a torch module to Flax and pulls them back, again and again, by one plan.

Every value is laid out before the first is set, so an error leaves both models as they were.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import torch
from jax.sharding import Sharding, SingleDeviceSharding

from torchjax_bridge.errors import ExchangeError, PlanError
from torchjax_bridge.exchange import (
    Path,
    array_to_torch,
    join_path,
    refuse_in_fork,
    tensor_to_jax,
)

from .._plan import Plan
from ..layouts import same_bits
from ..moving import WIDER, as_exchangeable, cast_to, copy_into, row_major_copies
from ..trees import place_on_sharding
from ._apart import apart
from ._flax_side import FlaxSide
from ._stale import stale
from ._steps import Step
from ._streams import side_streams
from ._torch_side import TorchSide
from ._tracing import refuse_in_trace
from ._watch import Watch

__all__ = ["Link", "Options"]


class Options(NamedTuple):
    """What the caller of `link` chose."""

    cast: torch.dtype | None
    share: bool
    changed_only: bool


class Link:
    """What `link` gives: two models, the plan between them, and the two verbs.

    Attributes:
        plan: The plan; print it to see what crosses. What is frozen is listed under ``torch_only``.

    A link is not for several threads at once. It is not copied or pickled, since it is about two live models.
    """

    def __init__(
        self, plan: Plan, torch_side: TorchSide, flax_side: FlaxSide, steps: list[Step], options: Options
    ) -> None:
        self.plan = plan
        self._torch = torch_side
        self._flax = flax_side
        self._steps = steps
        self._cast, self._share = options.cast, options.share
        self._watch = Watch(list(torch_side.slots.values()), steps) if options.changed_only else None
        self._paths = [path for step in steps for path in step.move.flax_paths]
        self._devices = {slot.device for slot in torch_side.slots.values()}

    def __repr__(self) -> str:
        return f"Link({len(self._steps)} moves, {self.plan.flavour})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Link is about two live models, so it is not copied or pickled: copy the models, and make a link of "
            "the copies."
        )

    def push(self) -> Any:
        """Give the weights of the module to Flax.

        Returns:
            The nnx module of the link, with new arrays in its Variables; or a new state or new variables, with the
            leaves of the link's own tree where torch has none. Shapes, dtypes and shardings are the same at each
            push, so nothing is traced again. The arrays are committed to their device, as all that cross. So a
            function that was compiled for a model with uncommitted arrays is compiled (not traced) again after the
            first push.

        Raises:
            PlanError: A module, a parameter, a buffer or a Variable was added, removed or replaced by one that does
                not fit, since the link was made. The message names it.
            ExchangeError: A value cannot cross, such as an integer beyond 32 bits with x64 off.
            TransformError: JAX is tracing.

        Memory:
            New arrays each time, unless shared. Arrays of earlier pushes keep their values. While a push runs,
            there are the weights of the module, those of the last push and the new ones.
        """
        refuse_in_fork("push weights")
        refuse_in_trace("push")
        self._torch.check()
        steps: Sequence[Step] = self._steps
        arrays: list[jax.Array | None] = [None] * len(self._paths)
        if self._watch is None:
            self._flax.check()
        elif self._flax.in_place:
            steps, _ = self._watch.changed(self._flax.values(None))
        else:
            steps, arrays = self._watch.changed(None)
        places: list[int] = []
        tensors: list[torch.Tensor] = []
        read: list[list[torch.Tensor]] = []
        with side_streams(self._devices):
            for step in steps:
                read.append([slot.read() for slot in step.slots])
                for place, tensor in enumerate(step.forward(read[-1]), step.first):
                    array = self._without_relayout(
                        tensor, step.shardings[place - step.first], self._paths[place]
                    )
                    if array is None:
                        places.append(place)
                        tensors.append(tensor)
                    else:
                        arrays[place] = array
            copies = row_major_copies(tensors, self._cast)
            for place, array in zip(places, self._to_arrays(places, copies), strict=True):
                arrays[place] = array
        model = self._flax.put(arrays)
        if self._watch is not None:
            for step, sources in zip(steps, read, strict=True):
                self._watch.note(step, sources, arrays)
        return model

    def _without_relayout(
        self, tensor: torch.Tensor, sharding: Sharding | None, path: Path
    ) -> jax.Array | None:
        """The array of a leaf that is shared, or that lies where its sharding says; None if it is to be copied."""
        if sharding is None and not self._share:
            return None
        dtype = cast_to(tensor.dtype, self._cast)
        if sharding is not None:
            return place_on_sharding(tensor.to(dtype), sharding, join_path(path), True)
        if tensor.is_contiguous() and dtype is tensor.dtype:
            return tensor_to_jax(tensor, path=path)
        return None

    def _to_arrays(self, places: Sequence[int], copies: Sequence[torch.Tensor]) -> list[jax.Array]:
        try:
            return [tensor_to_jax(copy) for copy in copies]
        except ExchangeError:  # repeated with names, for the message
            for place, copy in zip(places, copies, strict=True):
                tensor_to_jax(copy, path=self._paths[place])
            raise

    def pull(self, values: Any = None) -> None:
        """Write the weights of Flax into the module's own parameters and buffers, in place.

        Their versions rise, and the optimizers that hold them stay valid. A tied tensor is written once.

        Args:
            values: The ``nnx.State`` or the linen variables to read, of the structure that the link was made with.
                None for an nnx module.

        Raises:
            PlanError: As for `push`; or a leaf has another shape or dtype than the plan says, or two leaves hold
                different values for one tied tensor. Nothing is written then.
            ExchangeError: An array cannot become a tensor.
            TransformError: JAX is tracing.
            TypeError: ``values`` is missing, or given for an nnx module.

        Memory:
            Writes into the module's memory. Where parts are concatenated, also one copy of them.
        """
        refuse_in_fork("pull weights")
        refuse_in_trace("pull")
        self._torch.check()
        arrays = self._flax.values(values)
        writes: dict[object, tuple[str, torch.Tensor, torch.Tensor]] = {}
        faults: list[str] = []
        with side_streams(self._devices):
            for step in self._steps:
                tensors = [
                    self._tensor(path, arrays[place])
                    for place, path in enumerate(step.move.flax_paths, step.first)
                ]
                own = [slot.read() for slot in step.slots]
                for slot, target, tensor in zip(step.slots, own, step.inverse(tensors, own), strict=True):
                    if tensor.dtype is not target.dtype:
                        faults += self._misfit(slot.key, target, tensor)
                    if not target.is_contiguous() and _is_expanded(target):
                        faults.append(
                            f"'{slot.key}' was expanded: several of its elements are one in memory. Replace it by "
                            "its clone"
                        )
                    # By memory, so that a tied tensor is written once. Views may begin at the same address.
                    first = writes.setdefault(target.data_ptr() or slot.key, (slot.key, target, tensor))
                    if first[1] is target:
                        continue
                    if (first[1].shape, first[1].stride()) == (target.shape, target.stride()):
                        faults += _two_values(first, slot.key, tensor)
                    else:
                        writes[slot.key] = (slot.key, target, tensor)
            if faults:
                listed = "\n".join(f"  {line}" for line in faults)
                raise PlanError(f"cannot pull these weights to torch:\n{listed}")
            pairs = [(target, tensor) for _, target, tensor in writes.values()]
            for (target, _), tensor in zip(pairs, apart(pairs), strict=True):
                _write(target, tensor)

    def _tensor(self, path: Path, value: Any) -> torch.Tensor:
        if type(value) is jax.ShapeDtypeStruct:
            raise PlanError(
                f"'{join_path(path)}' is a jax.ShapeDtypeStruct, which has no values: push first."
            )
        if type(getattr(value, "sharding", None)) is not SingleDeviceSharding:
            value = as_exchangeable(value)
        tensor = array_to_torch(value, path=path)
        if tensor.shape != (shape := self._flax.leaves[path].shape):
            raise stale([f"'{join_path(path)}' had shape {shape} in Flax and has {tuple(tensor.shape)} now"])
        return tensor

    def _misfit(self, key: str, target: torch.Tensor, tensor: torch.Tensor) -> Iterable[str]:
        if WIDER.get(tensor.dtype) is target.dtype:
            return
        if self._cast is None or not (tensor.is_floating_point() and target.is_floating_point()):
            yield (
                f"'{key}' is {target.dtype} in torch and {tensor.dtype} in Flax: pass dtype= to link() to have "
                "floating-point values cast"
            )


_SMALL_BYTES = 1 << 18  # `copy_into` leaves smaller tensors to copy_


def _two_values(
    first: tuple[str, torch.Tensor, torch.Tensor], key: str, tensor: torch.Tensor
) -> Iterable[str]:
    """The fault of two keys of one tensor with different values."""
    if not same_bits(first[2], tensor):
        yield f"'{key}' is the same tensor as '{first[0]}' in torch, but Flax holds two values"


def _is_expanded(tensor: torch.Tensor) -> bool:
    return any(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _write(target: torch.Tensor, tensor: torch.Tensor) -> None:
    if target.nbytes >= _SMALL_BYTES and target.is_cpu and tensor.is_cpu and target.is_contiguous():
        copy_into(target, tensor)
    else:
        target.copy_(tensor)
