"""`Link`: pushes the weights of a torch module to Flax and pulls them back, again and again, by one plan.

Every value is laid out before the first is set, so an error leaves both models as they were.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import torch
from jax.sharding import Sharding, SingleDeviceSharding

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import ExchangeError, PlanError
from torchjax_bridge.exchange import (
    Path,
    array_to_torch,
    join_path,
    refuse_in_fork,
    tensor_to_jax,
)

from .._plan import Plan
from ..moving import Together, as_exchangeable, cast_to, row_major_copies
from ..trees import place_on_sharding
from ._apart import in_memory_of, same_place
from ._flax_side import FlaxSide
from ._stale import stale
from ._steps import Step
from ._streams import side_streams
from ._torch_side import TorchSide
from ._tracing import refuse_in_trace
from ._views import Views
from ._watch import Watch
from ._writes import Writes

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
        self._watch = Watch(len(torch_side.slots), steps) if options.changed_only else None
        self._paths = [path for step in steps for path in step.move.flax_paths]
        self._shapes = [flax_side.leaves[path].shape for path in self._paths]
        self._shardings = [sharding for step in steps for sharding in step.shardings]
        self._devices = {slot.device for slot in torch_side.slots}
        self._views = Views(steps)
        self._together: Together | None = None

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
        reading = self._torch.read()
        steps: Sequence[Step] = self._steps
        arrays: dict[int, jax.Array] = {}
        if self._watch is None:
            self._flax.check()
        elif self._flax.in_place:
            steps = self._watch.changed(reading, self._flax.values(None))
        else:
            arrays = self._watch.arrays()
            steps = self._watch.changed(reading, list(map(arrays.get, range(len(self._paths)))))
        if not steps:
            return self._flax.put(arrays)
        self._torch.check(reading)
        laid_out, to_run = self._views.take(reading, steps)
        kept = not laid_out
        with side_streams(self._devices):
            for step in to_run:
                sources = [reading.tensors[place].detach() for place in step.places]
                laid_out.update(enumerate(step.forward(sources), step.first))
            if kept:
                self._views.keep(reading, steps, laid_out)
            arrays.update(self._new_arrays(laid_out))
        model = self._flax.put(arrays)
        if self._watch is not None:
            self._watch.note(steps, arrays)
        return model

    def _new_arrays(self, tensors: dict[int, torch.Tensor]) -> Iterator[tuple[int, jax.Array]]:
        """The arrays of tensors, by their places. Takes out those that are done."""
        for place in [*tensors] if self._share or any(self._shardings) else ():
            array = self._without_relayout(tensors[place], self._shardings[place], self._paths[place])
            if array is not None:
                del tensors[place]
                yield place, array
        if self._together is None:  # at the first push, which is of all
            self._together = Together(tensors, self._cast)
        for place, array in self._together.copy(tensors).items():
            del tensors[place]
            yield place, array
        copies = row_major_copies([*tensors.values()], self._cast)
        yield from zip(tensors, self._to_arrays([*tensors], copies), strict=True)

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
        reading = self._torch.read()
        self._torch.check(reading)
        if reading.pointers is None:
            raise PlanError(
                "cannot pull inside a transform of torch.func: its tensors have no memory of their own."
            )
        writes = Writes(cast=self._cast is not None)
        with side_streams(self._devices):
            given = [self._tensor(place, value) for place, value in enumerate(self._flax.values(values))]
            if [tensor.shape for tensor in given] != self._shapes:
                raise stale(self._other_shapes(given))
            shared = in_memory_of(reading, given)
            for step in self._steps:
                own = [reading.tensors[place].detach() for place in step.places]
                new = step.inverse([given[place] for place in step.leaves], own)
                if shared and not shared.isdisjoint(step.leaves):
                    new = tuple(
                        value if same_place(target, value) else value.clone()
                        for target, value in zip(own, new, strict=True)
                    )
                for slot, place, target, value in zip(step.slots, step.places, own, new, strict=True):
                    writes.add(slot.key, target, reading.pointers[place], value)
            writes.run()

    def _tensor(self, place: int, value: Any) -> torch.Tensor:
        path = self._paths[place]
        if type(value) is jax.ShapeDtypeStruct:
            raise PlanError(
                f"'{join_path(path)}' is a jax.ShapeDtypeStruct, which has no values: push first."
            )
        if not isinstance(value, jax.Array | np.ndarray):
            raise PlanError(f"'{join_path(path)}' is {what_kind(value)} in Flax, not an array.")
        if not isinstance(value, jax.Array) or not (
            type(value.sharding) is SingleDeviceSharding or value.is_deleted()
        ):
            value = as_exchangeable(value)
        return array_to_torch(value, path=path)

    def _other_shapes(self, given: Sequence[torch.Tensor]) -> Iterator[str]:
        for path, tensor, shape in zip(self._paths, given, self._shapes, strict=True):
            if tensor.shape != shape:
                yield f"'{join_path(path)}' had shape {shape} in Flax and has {tuple(tensor.shape)} now"
