"""The moments of a torch optimizer as arrays in the layouts of their weights, and back.

Refuses a weight whose layout no moment can take, such as the sum of two biases.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import torch

from torchjax_bridge.exchange import Path, join_path, to_jax, to_torch

from ..moving import row_major_copies
from ..pairing import Move
from ..sharded import arrays_of_sharded, mesh_of, tensors_of_sharded
from ._classes import Slot

__all__ = ["moments_to_jax", "moments_to_torch"]


def moments_to_jax(
    optimizer: torch.optim.Optimizer,
    slot: Slot,
    group: Mapping[str, Any],
    moves: Iterable[Move],
    names: Mapping[int, str],
    faults: list[str],
) -> dict[Path, jax.Array | None]:
    """The moments of one slot, by Flax leaf; None for a leaf that already has a fault."""
    parameters = {name: p for g in optimizer.param_groups for p in g["params"] for name in [names[id(p)]]}
    faulty: list[Path] = []
    taken: list[Move] = []
    moments: dict[str, torch.Tensor] = {}
    for move in moves:
        if not any(key in parameters for key in move.torch_keys):
            continue
        if (fault := _no_image(move)) is not None:
            faults.append(fault)
            faulty += move.flax_paths
            continue
        absent = [key for key in move.torch_keys if key not in parameters]
        if absent:
            faults.append(f"{absent} are not optimized, but they are one leaf with others that are")
            continue
        taken.append(move)
        for key in move.torch_keys:
            parameter = parameters[key]
            moment = optimizer.state.get(parameter, {}).get(slot.name)
            moment = torch.zeros_like(parameter) if moment is None else moment
            moments[key] = moment.detach() * slot.factor(group)
    return {**dict.fromkeys(faulty), **_arrays(taken, moments)}


def _arrays(moves: Iterable[Move], moments: Mapping[str, torch.Tensor]) -> dict[Path, jax.Array]:
    """The moments in the layouts of the weights, where the weights lie."""
    if (device_mesh := mesh_of(moments)) is not None:
        nowhere = {path: None for move in moves for path in move.flax_paths}
        return arrays_of_sharded(moves, moments, nowhere, device_mesh, True)
    laid_out: dict[Path, torch.Tensor] = {}
    for move in moves:
        results = move.layout.forward([moments[key] for key in move.torch_keys])
        laid_out.update(zip(move.flax_paths, row_major_copies(results), strict=True))
    arrays = to_jax({join_path(path): tensor for path, tensor in laid_out.items()})
    return {path: arrays[join_path(path)] for path in laid_out}


def moments_to_torch(
    arrays: Mapping[Path, jax.Array],
    slot: Slot,
    group: Mapping[str, Any],
    move: Move,
    parameters: Mapping[str, torch.Tensor],
    faults: list[str],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The moments of one move, by the name of the torch parameter; nothing where optax has none.

    They lie as the parameters do.
    """
    found = []
    for path in move.flax_paths:
        short = path[1:] if path[:1] == ("params",) else path
        array = arrays.get(path, arrays.get(short))
        if array is None:
            return
        found.append(array)
    if (fault := _no_image(move)) is not None:
        faults.append(fault)
        return
    if (device_mesh := mesh_of(parameters)) is not None:
        by_path = dict(zip(move.flax_paths, found, strict=True))
        moments, _ = tensors_of_sharded([move], by_path, parameters, {}, device_mesh, True, True)
    else:
        tensors = list(to_torch(dict(enumerate(found))).values())
        copies = row_major_copies(move.layout.inverse(tensors))
        moments = dict(zip(move.torch_keys, copies, strict=True))
    factor = slot.factor(group)
    for key, tensor in moments.items():
        yield key, tensor if factor == 1 else tensor / factor


def _no_image(move: Move) -> str | None:
    if move.layout.is_linear and move.layout.lossless:
        return None
    return (
        f"{' + '.join(move.torch_keys)}: Flax has one weight for these ({move.layout}), and their moments do not "
        "give its moments; go on with a fresh optimizer state"
    )
