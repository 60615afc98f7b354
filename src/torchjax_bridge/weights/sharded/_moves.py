"""Moves shards between processes, by XLA, as unsigned integers.

XLA's collectives change some NaNs of bfloat16 and float8 on the CPU. An integer has no NaN, so bits are moved:
torch views the shard as unsigned integers, XLA moves those, and torch views the result as what it was. Values of
more than four bytes are several integers each, so x64 does not matter.

A move is collective: every process must make the same ones in the same order, which ``_agreement`` sees to.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec

from torchjax_bridge.exchange import dtensor_class, local_tensor, to_jax, to_torch

from ._spread import Spread, replicated

__all__ = ["move", "whole"]

_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def move(local: torch.Tensor, source: Spread, target: Spread) -> torch.Tensor:
    """This process's shard in the target spread, in new memory.

    Args:
        local: Its shard in the source spread, of any strides.
        source: How the values lie.
        target: How they shall lie, over the same devices.

    Returns:
        A row-major tensor of ``target.local_shape``, on the device of ``local``.

    Memory:
        The shard and its result; where XLA gathers an axis to cut it anew, the gathered leaf.
    """
    bits = _as_bits(local)
    words = bits.shape[-1]
    padded = bits
    if not source.is_even():
        padded = bits.new_zeros(*source.local_padded, words)
        padded[tuple(slice(0, size) for size in bits.shape)] = bits
    array = jax.make_array_from_single_device_arrays(
        (*source.padded, words), source.sharding, [to_jax(padded)]
    )
    if source.order != target.order:  # a program has one order of devices
        array = jax.device_put(array, NamedSharding(target.sharding.mesh, PartitionSpec()))
    steps = tuple(
        (axis, of_axis, to_axis)
        for axis, (of_axis, to_axis) in enumerate(zip(source.lengths, target.lengths, strict=True))
    )
    moved = _program(steps, target.sharding)(array)
    part = to_torch(moved.addressable_shards[0].data)
    return _from_bits(part[tuple(slice(0, size) for size in target.local_shape)], local.dtype)


def whole(tensor: Any, spread: Spread | None) -> torch.Tensor:
    """All of a tensor, in every process: a plain one as it is, a ``DTensor`` or a shard gathered."""
    if spread is None:
        return tensor
    local = local_tensor(tensor) if type(tensor) is dtensor_class() else tensor
    everywhere = NamedSharding(spread.sharding.mesh, PartitionSpec())
    return move(local, spread, replicated(everywhere, spread.shape))


@lru_cache(maxsize=1024)
def _program(steps: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...], sharding: NamedSharding) -> Any:
    """The compiled move: removes the padding of the source and puts in that of the target."""

    def relay(array: jax.Array) -> jax.Array:
        for axis, source, target in steps:
            array = jnp.take(array, _places(source), axis) if _is_padded(source) else array
            if _is_padded(target):
                inverse = np.zeros(len(target) * max(target), np.int32)  # padding repeats the first element
                inverse[_places(target)] = np.arange(sum(target))
                array = jnp.take(array, inverse, axis)
        return array

    return jax.jit(relay, out_shardings=sharding)


def _is_padded(lengths: tuple[int, ...]) -> bool:
    return len(set(lengths)) > 1


def _places(lengths: tuple[int, ...]) -> np.ndarray:
    """Where the elements of an axis are, once each shard is padded to the longest."""
    longest = max(lengths)
    found = [shard * longest + np.arange(length) for shard, length in enumerate(lengths)]
    return np.concatenate(found).astype(np.int32)


def _as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Unsigned integers of at most four bytes, with a last axis of those that are one value."""
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor.unsqueeze(-1)
    return tensor.view(_BITS[min(tensor.itemsize, 4)])


def _from_bits(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    bits = bits.clone(memory_format=torch.contiguous_format)  # JAX's memory is not to be written to
    if dtype.is_complex:
        return torch.view_as_complex(bits.view(dtype.to_real()))
    return bits.view(dtype).squeeze(-1)
