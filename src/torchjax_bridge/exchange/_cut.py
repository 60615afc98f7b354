"""One plain tensor as an array over several devices: each device gets its part, as a view where it can be one.

The devices are host devices of one process (``jax_num_cpu_devices``), whose memory is the tensor's own, or
any devices of a job in which every process has the whole tensor. Parts that are rows lie as they are in the
tensor. JAX wants the shards of one array alike in memory, so others are copied, and all are row-major.
"""

from typing import Any

import jax
import torch
from jax.sharding import Sharding

from . import _dlpack
from ._memory import why_not_shareable, with_row_major_strides
from ._numpy import is_number_or_string
from ._paths import Path
from ._refusals import cannot_share, refuse
from ._tensors import array_to_torch, tensor_to_jax

__all__ = ["leaf_over_devices"]


def leaf_over_devices(leaf: Any, *, copy: bool | None = None, device: Sharding, path: Path = ()) -> Any:
    """A leaf with this sharding.

    Args:
        leaf: A plain tensor, a NumPy array or a ``jax.Array``; a number or a string is passed through.
        copy: As for `tensor_to_jax`, for each part.
        device: The sharding.
        path: Where the leaf sits in its tree, for errors.

    Raises:
        UnsupportedLeafError: Also if the sharding does not divide the shape.
        ShareError: ``copy=False`` and a part cannot be shared.
    """
    if is_number_or_string(leaf):
        return leaf
    if isinstance(getattr(device, "mesh", None), jax.sharding.AbstractMesh):
        refuse(
            path,
            "JAX",
            f"to lie as {device}, which has no devices",
            "Make the sharding of a jax.sharding.Mesh.",
        )
    if any(_platform(one) != "cpu" for one in device.addressable_devices):
        refuse(
            path,
            "JAX",
            f"to lie as {device}, not on host devices",
            "Call jax.device_put(to_jax(tree), sharding).",
        )
    if isinstance(leaf, jax.Array):
        if copy is False and leaf.sharding != device:
            cannot_share(path, "JAX", f"it lies as {leaf.sharding}")
        return jax.block_until_ready(jax.device_put(leaf, device, may_alias=not copy))
    # What the tensor is, and what its dtype becomes, is decided for the whole.
    whole = array_to_torch(tensor_to_jax(leaf, copy=copy, path=path))
    shape = tuple(whole.shape)
    try:
        if len(getattr(device, "spec", ())) > len(shape):
            raise ValueError("its spec names more axes than there are")
        parts = device.addressable_devices_indices_map(shape)
        device.shard_shape(shape)
    except ValueError as err:
        refuse(
            path, "JAX", f"of shape {shape}, which {device} does not divide", f"Pass another sharding: {err}"
        )
    shards = []
    for one, index in parts.items():
        part = whole[index or ()]
        reason = why_not_shareable(part) if part.is_contiguous() else "it is no run of rows"
        if reason:
            if copy is False:
                cannot_share(path, "JAX", f"of its part for {one}, {reason}")
            part = part.clone(memory_format=torch.contiguous_format)
        part = with_row_major_strides(part)
        shards.append(_dlpack.import_cpu(part, one))
        if copy is False and part.numel() and shards[-1].unsafe_buffer_pointer() != part.data_ptr():
            cannot_share(path, "JAX", f"this release of JAX has no way to give {one} memory of torch's")
    return jax.make_array_from_single_device_arrays(shape, device, shards)


def _platform(device: Any) -> str:
    return device.platform
