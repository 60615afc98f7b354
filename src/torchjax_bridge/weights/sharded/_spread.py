"""How a tensor is spread over the processes of a mesh, in equal shards or not, in a form that XLA can move.

JAX wants equal shards. Unequal ones are padded to the length of the longest; the padding belongs to no element. The
spread of a JAX array has none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec, Sharding

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import device_of_this_rank, jax_sharding

__all__ = ["Spread", "replicated", "spread_of_array", "spread_of_tensor"]


@dataclass(frozen=True, repr=False)
class Spread:
    """Where the elements of a tensor lie.

    Attributes:
        sharding: The sharding of the padded tensor.
        shape: The shape without padding.
        lengths: For each axis the number of elements in each of its shards, in the order of the axis.
        local_shape: The shape of this process's shard, without padding.
        offsets: Where this process's shard starts, on each axis.
    """

    sharding: NamedSharding
    shape: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    local_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    def __repr__(self) -> str:
        """What is the same in every process."""
        mesh = self.sharding.mesh
        return f"{self.shape} in {self.lengths} by {self.sharding.spec} over {dict(mesh.shape)} {self.order}"

    @property
    def padded(self) -> tuple[int, ...]:
        """The shape with padding."""
        return tuple(len(of_axis) * max(of_axis) for of_axis in self.lengths)

    @property
    def local_padded(self) -> tuple[int, ...]:
        """The shape of every shard, with padding."""
        return tuple(max(of_axis) for of_axis in self.lengths)

    @property
    def here(self) -> tuple[slice, ...]:
        """What this process holds of the tensor."""
        return tuple(
            slice(start, start + size) for start, size in zip(self.offsets, self.local_shape, strict=True)
        )

    @property
    def order(self) -> tuple[int, ...]:
        """The devices in the order in which programs number them."""
        return tuple(device.id for device in self.sharding.mesh.devices.flat)

    def is_even(self) -> bool:
        """Whether nothing is padded."""
        return self.padded == self.shape

    def is_replicated(self) -> bool:
        """Whether another process holds what this one does."""
        return math.prod(map(len, self.lengths)) < self.sharding.mesh.size

    def is_like(self, other: "Spread") -> bool:
        """Whether both are even, and every process holds the same elements in both."""
        same = self.sharding.is_equivalent_to(other.sharding, len(self.shape))
        return self.shape == other.shape and self.is_even() and other.is_even() and same

    def permuted(self, axes: Sequence[int]) -> "Spread":
        """That of the tensor with its axes in another order."""
        spec = (*self.sharding.spec, *[None] * (len(self.shape) - len(self.sharding.spec)))
        sharding = NamedSharding(self.sharding.mesh, PartitionSpec(*(spec[axis] for axis in axes)))
        of_axes = (self.shape, self.lengths, self.local_shape, self.offsets)
        return Spread(sharding, *(tuple(one[axis] for axis in axes) for one in of_axes))  # type: ignore[arg-type]

    def without_unequal_shards(self, name: str) -> "Spread":
        """The same, with every axis replicated whose shards are not equal."""
        if self.is_even():
            return self
        spec = [
            part if len(set(of_axis)) == 1 else None
            for part, of_axis in zip(self.sharding.spec, self.lengths, strict=True)
        ]
        return spread_of_array(NamedSharding(self.sharding.mesh, PartitionSpec(*spec)), self.shape, name)


def spread_of_tensor(device_mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> Spread:
    """The spread of a ``DTensor``. Its unequal shards are those that torch makes.

    Raises:
        ExchangeError: The placements have no counterpart.
    """
    sharding = jax_sharding(device_mesh, placements, len(shape))
    mesh = sharding.mesh
    device = device_of_this_rank(device_mesh)
    own = next(at for at, other in enumerate(mesh.devices.flat) if other == device)
    coordinate = dict(zip(mesh.axis_names, _unravel(own, mesh.devices.shape), strict=True))
    lengths, local_shape, offsets = [], [], []
    for size, part in zip(shape, (*sharding.spec, *[None] * (len(shape) - len(sharding.spec))), strict=True):
        counts, place = [size], 0
        for name in (part,) if isinstance(part, str) else tuple(part or ()):
            # From the outermost axis inwards, each shard is cut as torch.chunk cuts.
            counts = [one for count in counts for one in _chunks(count, mesh.shape[name])]
            place = place * mesh.shape[name] + coordinate[name]
        lengths.append(tuple(counts))
        local_shape.append(counts[place])
        offsets.append(sum(counts[:place]))
    return Spread(sharding, tuple(shape), tuple(lengths), tuple(local_shape), tuple(offsets))


def replicated(everywhere: NamedSharding, shape: Sequence[int]) -> Spread:
    """The spread of a tensor that every process holds."""
    shape = tuple(shape)
    return Spread(everywhere, shape, tuple((size,) for size in shape), shape, (0,) * len(shape))


def spread_of_array(sharding: Sharding, shape: Sequence[int], name: str) -> Spread:
    """The spread of an array with this sharding.

    Raises:
        PlanError: It is no ``NamedSharding``, does not divide the shape, or has not one device of each process.
    """
    shape = tuple(shape)
    if not isinstance(sharding, NamedSharding):
        raise PlanError(
            f"'{name}' is to lie as {sharding}, and its torch side lies on many processes: give the template a "
            "jax.sharding.NamedSharding over jax_mesh(device_mesh)."
        )
    try:
        part = sharding.shard_shape(shape)
        (index,) = sharding.addressable_devices_indices_map(shape).values()
    except ValueError as err:
        raise PlanError(f"'{name}' of shape {shape} cannot lie as {sharding}: {err}") from err
    offsets = tuple(of_axis.indices(size)[0] for of_axis, size in zip(index or (), shape, strict=True))
    lengths = tuple((own,) * (size // own if own else 1) for own, size in zip(part, shape, strict=True))
    return Spread(sharding, shape, lengths, part, offsets)


def _chunks(count: int, parts: int) -> list[int]:
    step = math.ceil(count / parts)
    return [max(min(step, count - place * step), 0) for place in range(parts)]


def _unravel(place: int, shape: Sequence[int]) -> list[int]:
    found = []
    for size in reversed(shape):
        found.append(place % size)
        place //= size
    return found[::-1]
