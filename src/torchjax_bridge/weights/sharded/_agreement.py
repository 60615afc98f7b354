"""All processes agree on the moves, before the first of them.

JAX's collectives are matched by their order alone. Two processes with other plans would not hang: they would mix
values. So each process writes down what it is about to do, in sorted order, and all compare a hash of that. Plain
tensors beside sharded ones are taken to be the same in every process, and so are the replicas of a shard. Their
hashes are compared too.

What one process refuses, all refuse: one that raised alone would leave the others waiting.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from torchjax_bridge.errors import BridgeError, PlanError
from torchjax_bridge.exchange import dtensor_class, gather_from_ranks, local_tensor, whole_mesh

from ..layouts import as_bytes
from ._spread import Spread

__all__ = ["Place", "agree", "fingerprints", "mesh_of"]

Result = TypeVar("Result")

Place = tuple[str, tuple[int, ...] | None]
"""The name of a tensor, and where a shard of it starts; None for a plain one."""

# What torch and JAX raise when an operation fails.
_ERRORS = (RuntimeError, ValueError, TypeError)


def mesh_of(state: Mapping[str, Any]) -> Any:
    """The whole ``DeviceMesh`` on which the ``DTensor``s of a ``state_dict`` lie; None if it has none.

    Raises:
        PlanError: They lie on several meshes.
    """
    kind = dtensor_class()
    if kind is None:
        return None
    sharded = {key: value for key, value in state.items() if type(value) is kind}
    meshes: dict[Any, str] = {}
    for key, value in sharded.items():
        meshes.setdefault(whole_mesh(value.device_mesh), key)
    if len(meshes) > 1:
        words = " and ".join(f"'{key}' on {mesh}" for mesh, key in list(meshes.items())[:2])
        raise PlanError(f"the weights lie on several meshes, {words}: convert the parts one after the other.")
    return next(iter(meshes), None)


def agree(
    device_mesh: Any, prepare: Callable[[], tuple[Result, Sequence[str], Mapping[Place, str]]]
) -> Result:
    """What ``prepare`` gives, once every process has prepared the same.

    Args:
        device_mesh: The mesh whose processes take part.
        prepare: Returns its result, a line for everything that will be done, and `fingerprints`. It must not
            communicate.

    Raises:
        BridgeError: What ``prepare`` raised here.
        PlanError: It raised elsewhere, or processes differ.
    """
    result: Result | None = None
    lines: Sequence[str] = ()
    prints: Mapping[Place, str] = {}
    error: BaseException | None = None
    try:
        result, lines, prints = prepare()
    except (BridgeError, *_ERRORS) as err:
        error = err
    plan = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    said = gather_from_ranks(device_mesh, (None if error is None else str(error), plan, prints))
    if error is not None:
        raise error
    first, *others = sorted(said)
    for rank in (first, *others):
        if said[rank][0] is not None:
            raise PlanError(f"rank {rank} refused: {said[rank][0]}")
    for rank in others:  # with the same rank in every process, so that all raise
        if said[rank][1] != said[first][1]:
            raise PlanError(
                f"ranks {first} and {rank} do not plan the same moves, and would mix values: build the same model, "
                "the same template and the same rules in every process."
            )
    seen: dict[Place, tuple[int, str]] = {}
    for rank in (first, *others):
        for place, value in said[rank][2].items():
            before, known = seen.setdefault(place, (rank, value))
            if known != value:
                name, offsets = place
                what = "is not sharded" if offsets is None else "is replicated"
                raise PlanError(
                    f"'{name}' {what}, and rank {rank} has other values of it than rank {before}: call "
                    "torch.distributed.broadcast on it first."
                )
    return result  # type: ignore[return-value]  # no error, so there is a result


def fingerprints(inputs: Iterable[tuple[str, tuple[Any, Spread | None]]]) -> dict[Place, str]:
    """A hash of each tensor of which another process holds the same: a plain one, or a replica of a shard.

    Args:
        inputs: The name of each tensor, and how it lies; None for a plain one.
    """
    found: dict[Place, str] = {}
    for name, (tensor, spread) in inputs:
        if spread is None:
            found[name, None] = _fingerprint(tensor)
        elif spread.is_replicated():
            sharded = type(tensor) is dtensor_class()
            found[name, spread.offsets] = _fingerprint(local_tensor(tensor) if sharded else tensor)
    return found


def _fingerprint(tensor: torch.Tensor) -> str:
    """A hash of the values, the dtype and the shape."""
    if tensor.is_meta:
        return "meta"  # the exchange refuses it
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    found = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)}".encode(), digest_size=16)
    found.update(as_bytes(plain).numpy().data)
    return found.hexdigest()
