"""Which layouts keep a shard a shard, so that each process can apply them to its own.

Permutations, divisible reshapes, stacks and sums do: torch applies them to its ``DTensor``. A layout that
reads across shards (a split, a flip, a caller's own) is applied to the whole leaf, which is gathered for it, alone.
What is decided here follows from what all processes know, so that they all decide alike.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from torchjax_bridge.errors import ExchangeError, PlanError
from torchjax_bridge.exchange import dtensor_class, dtensor_of_shard, local_tensor

from ..layouts import Each, Identity, Inverse, Layout, Parallel, Permute, Reshape, Stack, Sum, Then
from ._spread import Spread, spread_of_tensor

__all__ = ["lay_out_shards", "together"]

_OF_SHARDS = (Identity, Permute, Reshape, Sum, Then, Each, Parallel, Stack, Inverse)
_OF_UNEQUAL_SHARDS = (Identity, Permute, Each, Parallel)


def together(
    keys: Sequence[str], tensors: Sequence[torch.Tensor]
) -> tuple[list[Any], list[tuple[Any, Spread | None]]]:
    """The tensors of a move as ``DTensor``s over one mesh, and each as it is, with how it lies.

    A plain tensor beside a ``DTensor`` is replicated over that one's mesh.

    Raises:
        PlanError: A ``DTensor`` does not lie as its placements say, or these have no counterpart.
    """
    bare = [tensor.detach() for tensor in tensors]
    inputs: list[tuple[Any, Spread | None]] = []
    for key, tensor in zip(keys, bare, strict=True):
        if type(tensor) is not dtensor_class():
            inputs.append((tensor, None))
            continue
        try:
            spread = _spread(tensor)
        except ExchangeError as err:
            raise PlanError(f"'{key}' cannot be converted: {err}") from err
        _check_shards(tensor, spread, key)
        inputs.append((tensor, spread))
    meshes = [tensor.device_mesh for tensor, spread in inputs if spread is not None]
    return [as_dtensor(tensor, meshes[0]) if meshes else tensor for tensor in bare], inputs


def as_dtensor(tensor: Any, device_mesh: Any) -> Any:
    """A ``DTensor`` as it is, and a plain tensor replicated over a mesh."""
    if type(tensor) is dtensor_class():
        return tensor
    from torch.distributed.tensor import Replicate

    return dtensor_of_shard(tensor, device_mesh, [Replicate()] * device_mesh.ndim, tuple(tensor.shape))


def lay_out_shards(
    layout: Layout, tensors: Sequence[Any], back: bool = False
) -> list[tuple[torch.Tensor, Spread]] | None:
    """The results of a layout on ``DTensor``s: this process's shard of each, and how it is spread.

    Args:
        layout: The layout.
        tensors: ``DTensor``s over one mesh.
        back: Whether to apply its inverse.

    Returns:
        None where the leaf must be whole.
    """
    # torch would gather tensors that lie differently before it adds or stacks them.
    lies = {(tensor.device_mesh, tensor.placements) for tensor in tensors}
    even = all(_spread(tensor).is_even() for tensor in tensors)
    if len(lies) != 1 or not _keeps(layout, _OF_SHARDS if even else _OF_UNEQUAL_SHARDS):
        return None
    if back and not layout.lossless:  # it compares values
        return None
    try:
        results: Sequence[Any] = layout.inverse(tensors) if back else layout.forward(tensors)
        found = [(local_tensor(result), _spread(result)) for result in results]
        return found if all(tuple(local.shape) == lie.local_shape for local, lie in found) else None
    except (RuntimeError, ValueError, ExchangeError):
        return None  # torch would have to gather it, or lays it out in a way that JAX cannot express


def lay_out_arrays(
    layout: Layout, inputs: Sequence[tuple[Any, Spread | None]], device_mesh: Any
) -> list[tuple[torch.Tensor, Spread]] | None:
    """The results of the inverse of a layout, as `lay_out_shards` gives them.

    Args:
        layout: The layout.
        inputs: Tensors, and how each lies: a ``DTensor``, a shard of an array over another mesh, or a
            plain tensor (None).
        device_mesh: torch's mesh.
    """
    if all(spread is None for _, spread in inputs):
        return None
    if all(spread is None or type(tensor) is dtensor_class() for tensor, spread in inputs):
        return lay_out_shards(layout, [as_dtensor(tensor, device_mesh) for tensor, _ in inputs], back=True)
    if type(layout) not in (Identity, Permute):
        return None
    ((shard, spread),) = inputs
    if spread is None:
        return None
    axes = tuple(layout.axes if isinstance(layout, Permute) else range(shard.ndim))
    back = [axes.index(axis) for axis in range(len(axes))]
    return [(shard.permute(back), spread.permuted(back))]


def _keeps(layout: Layout, kinds: tuple[type, ...]) -> bool:
    """Whether a layout and those in it are all of these classes, themselves and not subclasses."""
    inner = [getattr(layout, field.name) for field in fields(layout)]
    inner = [one for value in inner for one in (value if isinstance(value, tuple) else (value,))]
    return type(layout) in kinds and all(_keeps(one, kinds) for one in inner if isinstance(one, Layout))


def _spread(tensor: Any) -> Spread:
    return spread_of_tensor(tensor.device_mesh, tensor.placements, tensor.shape)


def _check_shards(tensor: Any, spread: Spread, key: str) -> None:
    """Raise unless this process holds of a ``DTensor`` what its spread says, by torch's own account.

    Raises:
        PlanError: torch cuts unequal shards otherwise, or the shard has another shape.
    """
    held = tuple(local_tensor(tensor).shape)
    if held == () == spread.shape:
        return
    (chunk,) = tensor.__create_chunk_list__()
    empty = 0 in held
    if held == spread.local_shape == tuple(chunk.sizes) and (empty or tuple(chunk.offsets) == spread.offsets):
        return
    raise PlanError(
        f"'{key}' of shape {tuple(tensor.shape)} lies in torch as {tensor.placements}, and this rank holds {held} "
        f"of it, which should be {spread.local_shape} at {spread.offsets}. Redistribute it to equal shards first."
    )
