"""Sharded arrays become the sharded tensors of a torch template, each process its own shards."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import torch
from jax.sharding import NamedSharding, PartitionSpec

from torchjax_bridge.errors import PlanError, ShareError, UnsupportedLeafError
from torchjax_bridge.exchange import Path, dtensor_class, dtensor_of_shard, jax_mesh, join_path, to_torch

from ..layouts import same_bits
from ..moving import WIDER, as_exchangeable, row_major_copies
from ..pairing import Move
from ._agreement import Place, agree, fingerprints
from ._laid_out import lay_out_arrays
from ._moves import whole
from ._spread import Spread, replicated, spread_of_array, spread_of_tensor
from ._step import Step

__all__ = ["tensors_of_sharded"]


def tensors_of_sharded(
    moves: Iterable[Move],
    arrays: Mapping[Path, Any],
    state: Mapping[str, torch.Tensor],
    ties: Mapping[str, str],
    device_mesh: Any,
    copy: bool | None,
    strict: bool,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The torch tensors of a plan whose torch side lies on a mesh, and what ``strict=False`` lost.

    Args:
        moves: The moves of the plan.
        arrays: The Flax leaves, sharded over the same devices or plain.
        state: The template's tensors, which say where each one lies. They may be on the meta device.
        ties: Keys of the same tensor as an earlier one.
        device_mesh: The whole mesh of the torch side.
        copy: As for ``to_state_dict``.
        strict: Likewise.

    Raises:
        PlanError: An array on other devices, processes that differ, ties with different values.
        ExchangeError: An array cannot become a tensor, or ``copy=False`` and one must move.

    Memory:
        The shards of this process, and one leaf where one must be whole.
    """
    everywhere = NamedSharding(jax_mesh(device_mesh), PartitionSpec())

    def prepare() -> tuple[list[Step], list[str], dict[Place, str]]:
        steps = []
        for one in sorted(moves, key=lambda one: one.flax_paths):
            steps.append(_prepare(one, arrays, state, everywhere, device_mesh))
            if copy is False:
                _refuse_moves(steps[-1])
        inputs = (
            (join_path(path), one)
            for step in steps
            for path, one in zip(step.move.flax_paths, step.inputs, strict=True)
        )
        return steps, list(map(str, steps)), fingerprints(inputs)

    locals_: dict[str, torch.Tensor] = {}
    views: list[str] = []
    lost: list[str] = []
    for step in agree(device_mesh, prepare):
        try:
            shards = list(_shards(step, state))
        except ValueError as err:  # by the values of a whole leaf, so in every process
            paths = "', '".join(join_path(path) for path in step.move.flax_paths)
            message = f"'{paths}' cannot be converted to torch: {err}."
            if strict or step.move.torch_keys:
                raise PlanError(message) from err
            lost.append(f"lost: {message}")
            continue
        for key, (local, is_new) in zip(step.move.torch_keys, shards, strict=True):
            if WIDER.get(local.dtype) == state[key].dtype:
                local, is_new = local.to(state[key].dtype), True
            locals_[key] = local
            if copy and not is_new:
                views.append(key)
    locals_ |= zip(views, row_major_copies([locals_[key] for key in views]), strict=True)
    _check_ties(locals_, ties, device_mesh)
    return {key: _as_in(state[key], local) for key, local in locals_.items()}, lost


def _prepare(
    one: Move,
    arrays: Mapping[Path, Any],
    state: Mapping[str, torch.Tensor],
    everywhere: NamedSharding,
    device_mesh: Any,
) -> Step:
    inputs: list[tuple[Any, Spread | None]] = []
    for path in one.flax_paths:
        array, name = arrays[path], join_path(path)
        if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
            if array.sharding.device_set != everywhere.device_set:
                raise PlanError(
                    f"'{name}' lies on {len(array.sharding.device_set)} devices, and the template on "
                    f"{len(everywhere.device_set)}, which are not the same: jax.device_put it to a NamedSharding "
                    "over jax_mesh(device_mesh) first."
                )
            inputs.append(
                (_shard(array, name, device_mesh), spread_of_array(array.sharding, array.shape, name))
            )
        else:
            inputs.append((to_torch({name: as_exchangeable(array)})[name], None))
    results = lay_out_arrays(one.layout, inputs, device_mesh)
    targets = []
    for key in one.torch_keys:
        old = state[key]
        if type(old) is dtensor_class():
            targets.append(spread_of_tensor(old.device_mesh, old.placements, old.shape))
        else:
            targets.append(replicated(everywhere, old.shape))
    return Step(one, tuple(inputs), results, tuple(targets))


def _shard(array: jax.Array, name: str, device_mesh: Any) -> Any:
    """An array as a ``DTensor`` over torch's mesh; where it lies on another one, only the shard of this process."""
    try:
        return to_torch({name: array}, mesh=device_mesh)[name]
    except UnsupportedLeafError:
        return to_torch({name: array.addressable_shards[0].data})[name]


def _refuse_moves(step: Step) -> None:
    for key, moves in zip(step.move.torch_keys, step.must_move(), strict=True):
        if moves or not step.move.layout.is_view:
            why = "it must move between processes" if moves else "its layout needs a copy"
            raise ShareError(f"cannot share '{key}' under copy=False: {why}. Pass copy=None to allow it.")


def _shards(step: Step, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, bool]]:
    """This process's shard of each tensor as it shall lie, and whether it is new row-major memory."""
    if (shards := step.shards()) is not None:
        yield from shards
        return
    tensors = [whole(tensor, spread) for tensor, spread in step.inputs]
    layout, before = step.move.layout, None
    old = [state[key] for key in step.move.torch_keys]
    if not layout.lossless and not any(tensor.is_meta for tensor in old):
        pairs = zip(old, step.targets, strict=True)
        sharded = dtensor_class()
        before = [whole(one.detach(), spread if type(one) is sharded else None) for one, spread in pairs]
    for result, target in zip(layout.inverse(tensors, before), step.targets, strict=True):
        yield result[target.here], False


def _as_in(old: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A shard as a tensor of the template's kind."""
    if type(old) is not dtensor_class():
        return local
    return dtensor_of_shard(local, old.device_mesh, old.placements, tuple(old.shape))


def _check_ties(filled: Mapping[str, torch.Tensor], ties: Mapping[str, str], device_mesh: Any) -> None:
    """Refuse, in every process, two keys of one torch tensor whose values differ in any."""
    both = [(key, first) for key, first in ties.items() if key in filled and first in filled]

    def compare() -> tuple[None, list[str], dict[Place, str]]:
        for key, first in both:
            if not same_bits(filled[key], filled[first]):
                raise PlanError(
                    f"'{key}' is the same tensor as '{first}' in torch, but Flax holds two values."
                )
        return None, [], {}

    if both:
        agree(device_mesh, compare)
