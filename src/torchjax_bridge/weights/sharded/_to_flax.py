"""Sharded torch weights become sharded arrays, each process its own shards."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import torch
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from torchjax_bridge.errors import PlanError, ShareError
from torchjax_bridge.exchange import Path, array_of_shard, jax_mesh, join_path, to_jax, to_torch, x64

from ..moving import row_major_copies
from ..pairing import Move
from ._agreement import Place, agree, fingerprints
from ._laid_out import lay_out_shards, together
from ._moves import whole
from ._spread import Spread, replicated, spread_of_array
from ._step import Step

__all__ = ["arrays_of_sharded"]


def arrays_of_sharded(
    moves: Iterable[Move],
    state: Mapping[str, torch.Tensor],
    shardings: Mapping[Path, Sharding | None],
    device_mesh: Any,
    copy: bool | None,
) -> dict[Path, jax.Array]:
    """The Flax leaves of a plan whose torch side lies on a mesh.

    Args:
        moves: The moves of the plan.
        state: The torch tensors, some of them ``DTensor``s.
        shardings: Where the template wants each leaf; None where it does not say. Then a leaf stays as it lies in
            torch. A leaf that is plain there, or must be whole for its layout, is replicated; so is an axis of
            unequal shards.
        device_mesh: The whole mesh of the torch side.
        copy: As for ``to_flax``.

    Raises:
        PlanError: A sharding that the mesh cannot give, or processes that differ.
        ExchangeError: A tensor cannot become an array, or ``copy=False`` and a leaf must move.

    Memory:
        The shards of this process, and one leaf where one must be whole.
    """
    everywhere = NamedSharding(jax_mesh(device_mesh), PartitionSpec())

    def prepare() -> tuple[list[Step], list[str], dict[Place, str]]:
        steps = []
        for one in sorted(moves, key=lambda one: one.flax_paths):
            step = _prepare(one, state, shardings, everywhere)
            steps.append(step)
            if copy is False:
                _refuse_moves(step)
        inputs = (pair for step in steps for pair in zip(step.move.torch_keys, step.inputs, strict=True))
        return steps, list(map(str, steps)), fingerprints(inputs)

    device = torch.device(device_mesh.device_type)
    laid_out: dict[Path, tuple[torch.Tensor, Spread]] = {}
    views: list[Path] = []
    for step in agree(device_mesh, prepare):
        for path, (local, is_new), target in zip(
            step.move.flax_paths, _shards(step, device), step.targets, strict=True
        ):
            laid_out[path] = local, target
            if copy and not is_new:
                views.append(path)
    for path, local in zip(views, row_major_copies([laid_out[path][0] for path in views]), strict=True):
        laid_out[path] = local, laid_out[path][1]
    return {
        path: array_of_shard(local, target.sharding, target.shape, copy=None if copy else copy, path=path)
        for path, (local, target) in laid_out.items()
    }


def _prepare(
    one: Move,
    state: Mapping[str, torch.Tensor],
    shardings: Mapping[Path, Sharding | None],
    everywhere: NamedSharding,
) -> Step:
    tensors, inputs = together(one.torch_keys, [state[key] for key in one.torch_keys])
    results = lay_out_shards(one.layout, tensors) if any(spread for _, spread in inputs) else None
    if results is not None:
        results = [
            (_narrowed(local, path), spread)
            for path, (local, spread) in zip(one.flax_paths, results, strict=True)
        ]
    structs = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor, _ in inputs]
    shapes = [tuple(struct.shape) for struct in one.layout.forward(structs)]
    targets = []
    for place, path in enumerate(one.flax_paths):
        name = join_path(path)
        if (sharding := shardings[path]) is not None:
            if sharding.device_set != everywhere.device_set:
                raise PlanError(
                    f"'{name}' of the template lies on {len(sharding.device_set)} devices, and its torch side on "
                    f"{len(everywhere.device_set)}, which are not the same: make the template over "
                    "jax_mesh(device_mesh)."
                )
            targets.append(spread_of_array(sharding, shapes[place], name))
        elif results is not None:
            targets.append(results[place][1].without_unequal_shards(name))
        else:
            targets.append(replicated(everywhere, shapes[place]))
    return Step(one, tuple(inputs), results, tuple(targets))


def _refuse_moves(step: Step) -> None:
    for path, moves in zip(step.move.flax_paths, step.must_move(), strict=True):
        if moves:
            raise ShareError(
                f"cannot share '{join_path(path)}' under copy=False: it must move between processes. Pass "
                "copy=None to allow it, or give the template the sharding that jax_sharding shows for the DTensor."
            )
        if not step.move.layout.is_view:
            raise ShareError(
                f"cannot share '{join_path(path)}' under copy=False: its layout needs a copy. Pass copy=None to "
                "allow it."
            )


def _shards(step: Step, device: torch.device) -> Iterator[tuple[torch.Tensor, bool]]:
    """This process's shard of each leaf as it shall lie, and whether it is new row-major memory."""
    if (shards := step.shards()) is not None:
        yield from shards
        return
    tensors = [whole(tensor, spread) for tensor, spread in step.inputs]
    # A constant, which has no source, is made where the weights are.
    with nullcontext() if tensors else device:
        results = step.move.layout.forward(tensors)
    for path, result, target in zip(step.move.flax_paths, results, step.targets, strict=True):
        yield _narrowed(result, path)[target.here], False


def _narrowed(local: torch.Tensor, path: Path) -> torch.Tensor:
    """The values as JAX holds them; with x64 off, 64-bit integers become 32-bit ones, or raise."""
    if local.dtype not in (torch.int64, torch.uint64) or x64():
        return local
    name = join_path(path)
    return to_torch(to_jax({name: local}))[name]
