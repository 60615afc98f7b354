"""The floor of a crossing: the two capsule functions and nothing around them.

Every private name of jaxlib and torch in the benchmarks is in this file. Where they are gone or changed,
`raw_pair` says so, and the rows that need them are left out.
"""

from collections.abc import Callable
from typing import Any

import jax
import torch

from ._peers import PEER_ERRORS
from ._setting import Setting

__all__ = ["new_handle", "raw_pair"]

_KDL_CPU, _KDL_CUDA = 1, 2


def raw_pair(
    setting: Setting,
) -> tuple[Callable[[torch.Tensor], jax.Array], Callable[[jax.Array], torch.Tensor]] | str:
    """The import and the export for one device; or a sentence on why there is none here."""
    try:
        to_jax, to_torch = _on_cpu(setting) if setting.device == "cpu" else _on_cuda(setting)
        there = to_jax(torch.ones(2, 3, device=setting.torch_device))
        if not isinstance(there, jax.Array) or to_torch(there).sum() != 6:
            raise RuntimeError("the values did not survive")
    except PEER_ERRORS as err:
        return f"The raw capsule functions cannot be timed here: {type(err).__name__}: {err}"
    return to_jax, to_torch


def new_handle(array: jax.Array) -> jax.Array | None:
    """Another array on the same buffer, which nothing has asked anything yet, as a call returns one; or None."""
    clone = getattr(array, "clone", None)
    return None if clone is None else clone()


def _on_cpu(setting: Setting) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    from jaxlib import _jax

    take, give = _jax.dlpack_managed_tensor_to_buffer, _jax.buffer_to_dlpack_managed_tensor
    pack: Any = torch._C._to_dlpack
    unpack: Any = torch._C._from_dlpack
    device = setting.jax_device

    def to_jax(tensor: torch.Tensor) -> jax.Array:
        return take(pack(tensor), device, None, None, _KDL_CPU)

    def to_torch(array: jax.Array) -> torch.Tensor:
        return unpack(give(array))

    return to_jax, to_torch


def _on_cuda(setting: Setting) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    from jaxlib import _jax

    take, give = _jax.dlpack_managed_tensor_to_buffer, _jax.buffer_to_dlpack_managed_tensor
    unpack: Any = torch._C._from_dlpack
    device: Any = setting.jax_device
    local = device.local_hardware_id

    def to_jax(tensor: torch.Tensor) -> jax.Array:
        # The consumer names its stream and the producer makes that stream wait: an event, no host wait.
        stream = device.get_stream_for_external_ready_events()
        return take(tensor.__dlpack__(stream=stream), device, stream, None, _KDL_CUDA)

    def to_torch(array: jax.Array) -> torch.Tensor:
        # DLPack writes the legacy default stream, which torch calls 0, as 1.
        stream = torch.cuda.current_stream(local).cuda_stream or 1
        return unpack(give(array, stream=stream))

    return to_jax, to_torch
