"""Sharded tensors and modules, which a wrapped call refuses: it runs in one process, and they need all of them.

torch's collectives have no order among those of a compiled JAX program, so processes would wait for each other.
And FSDP keeps the tensors of its first call, which would be those of a trace, without values.
"""

import sys

import torch

from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.exchange import dtensor_class

__all__ = ["refuse_sharded_module", "sharded_argument"]


def sharded_argument(name: str) -> ArgumentError:
    """The error for an argument of a JAX function that is a ``DTensor``."""
    return ArgumentError(
        f"{name} is a DTensor, of which this process holds a shard. Call the JAX function itself on "
        "to_jax(dtensor), which stays sharded; or pass dtensor.to_local() or dtensor.full_tensor()."
    )


def refuse_sharded_module(module: torch.nn.Module, verb: str) -> None:
    """Raise if a module holds ``DTensor``s or is under FSDP.

    Args:
        module: The module.
        verb: The public function that was called, for the message.
    """
    sharded = dtensor_class()
    if sharded is None:
        return
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    found = [name for name, part in module.named_modules() if isinstance(part, fsdp)]
    what = "is under fully_shard"
    if not found:
        tensors = (*module.named_parameters(), *module.named_buffers())
        found, what = [name for name, tensor in tensors if isinstance(tensor, sharded)], "is a DTensor"
    if found:
        raise ArgumentError(
            f"{verb} cannot run a sharded module: '{found[0] or type(module).__name__}' {what}, and a call from "
            "JAX runs in one process. Call the module itself, or take it to JAX with to_flax(module, template), "
            "which leaves every shard where it is."
        )
