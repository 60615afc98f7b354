"""All processes agree on the moves, before the first of them.

JAX's collectives are matched by their order alone. Two processes with other plans would not hang: they would mix
values. So each process writes down what it is about to do, in sorted order, and all compare a hash of that. Plain
tensors beside sharded ones are taken to be the same in every process; their hashes are compared too.

What one process refuses, all refuse: one that raised alone would leave the others waiting.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from torchjax_bridge.errors import BridgeError, PlanError
from torchjax_bridge.exchange import dtensor_class, gather_from_ranks, whole_mesh

__all__ = ["agree", "fingerprint", "mesh_of"]

Result = TypeVar("Result")
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


def agree(device_mesh: Any, prepare: Callable[[], tuple[Result, Sequence[str], Mapping[str, str]]]) -> Result:
    """What ``prepare`` gives, once every process has prepared the same.

    Args:
        device_mesh: The mesh whose processes take part.
        prepare: Returns its result, a line for everything that will be done, and a fingerprint for each tensor that
            must be the same everywhere. It must not communicate.

    Raises:
        BridgeError: What ``prepare`` raised here.
        PlanError: It raised elsewhere, or processes differ.
    """
    result: Result | None = None
    lines: Sequence[str] = ()
    prints: Mapping[str, str] = {}
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
        if differ := [key for key, value in said[first][2].items() if said[rank][2].get(key) != value]:
            raise PlanError(
                f"'{differ[0]}' is not sharded, and rank {rank} has other values of it than rank {first}: call "
                "torch.distributed.broadcast on it first."
            )
    return result  # type: ignore[return-value]  # no error, so there is a result


def fingerprint(tensor: torch.Tensor) -> str:
    """A hash of the values of a plain tensor, with its dtype and shape."""
    if tensor.is_meta:
        return "meta"  # the exchange refuses it
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    found = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)}".encode(), digest_size=16)
    found.update(plain.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
