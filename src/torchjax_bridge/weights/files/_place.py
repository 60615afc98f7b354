"""A leaf of a checkpoint as an array over several devices: a process reads its own parts and no others."""

import jax
import numpy as np
import torch
from jax.sharding import Sharding

from torchjax_bridge.errors import PlanError, ShareError
from torchjax_bridge.exchange import to_jax

from ..layouts import as_bytes
from ._leaf import Leaf

__all__ = ["place_leaf"]


def place_leaf(leaf: Leaf, sharding: Sharding, copy: bool | None) -> jax.Array:
    """The leaf with this sharding.

    Args:
        leaf: Any leaf; replicas of a part are read once.
        sharding: Over several devices, of this process or of all.
        copy: As for `to_jax`.

    Raises:
        ExchangeError: JAX cannot hold the dtype, or ``copy=False`` was asked.
        PlanError: The shape cannot be cut this way.

    Memory:
        The parts of this process, once on the host and once on the devices.
    """
    if copy is False:
        raise ShareError(
            f"cannot share '{leaf.name}' under copy=False: the template has it on {len(sharding.device_set)} "
            "devices. Pass copy=None or copy=True to have it copied there."
        )
    # Refuses what JAX cannot hold.
    dtype = to_jax({leaf.name: torch.empty(0, dtype=leaf.dtype)})[leaf.name].dtype
    parts: dict[str, np.ndarray] = {}

    def values(index: tuple[slice, ...] | None) -> np.ndarray:
        if str(index) not in parts:
            part = leaf.slice(index or ())
            # Row-major in every process: XLA compiles one program for all. Not the file's memory map.
            part = part.clone(memory_format=torch.contiguous_format) if leaf.read_box is None else part
            array = as_bytes(part.resolve_conj().resolve_neg().contiguous()).numpy()
            parts[str(index)] = array.view(dtype).reshape(tuple(part.shape))
        return parts[str(index)]

    try:
        return jax.make_array_from_callback(leaf.shape, sharding, values, dtype=dtype)
    except ValueError as err:
        raise PlanError(f"'{leaf.name}' cannot be placed as the template has it: {err}") from err
