"""The least that a conversion can cost: the private capsule functions alone.

This file holds every private name of jaxlib and torch in the benchmarks. If one is missing or has changed,
`raw_pair` returns the reason, and the rows that need it are left out.
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
    """The import and the export for one device, or a sentence on why they do not work here."""
    try:
        to_jax, to_torch = _on_cpu(setting) if setting.device == "cpu" else _on_cuda(setting)
        array = to_jax(torch.ones(2, 3, device=setting.torch_device))
        if not isinstance(array, jax.Array) or to_torch(array).sum() != 6:
            raise RuntimeError("the values did not survive")
    except PEER_ERRORS as err:
        return f"The raw capsule functions cannot be timed here: {type(err).__name__}: {err}"
    return to_jax, to_torch


def new_handle(array: jax.Array) -> jax.Array | None:
    """A new array on the same buffer with nothing cached, like a call's result; None if JAX cannot make one."""
    clone = getattr(array, "clone", None)
    return None if clone is None else clone()


def _on_cpu(setting: Setting) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    from jaxlib import _jax

    array_from_capsule = _jax.dlpack_managed_tensor_to_buffer
    capsule_from_array = _jax.buffer_to_dlpack_managed_tensor
    capsule_from_tensor: Any = torch._C._to_dlpack
    tensor_from_capsule: Any = torch._C._from_dlpack
    device = setting.jax_device

    def to_jax(tensor: torch.Tensor) -> jax.Array:
        return array_from_capsule(capsule_from_tensor(tensor), device, None, None, _KDL_CPU)

    def to_torch(array: jax.Array) -> torch.Tensor:
        return tensor_from_capsule(capsule_from_array(array))

    return to_jax, to_torch


def _on_cuda(setting: Setting) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    from jaxlib import _jax

    array_from_capsule = _jax.dlpack_managed_tensor_to_buffer
    capsule_from_array = _jax.buffer_to_dlpack_managed_tensor
    tensor_from_capsule: Any = torch._C._from_dlpack
    device: Any = setting.jax_device
    local = device.local_hardware_id

    def to_jax(tensor: torch.Tensor) -> jax.Array:
        # The consumer names its stream and the producer makes that stream wait: an event, no host wait.
        stream = device.get_stream_for_external_ready_events()
        return array_from_capsule(tensor.__dlpack__(stream=stream), device, stream, None, _KDL_CUDA)

    def to_torch(array: jax.Array) -> torch.Tensor:
        # DLPack writes the legacy default stream, which torch calls 0, as 1.
        stream = torch.cuda.current_stream(local).cuda_stream or 1
        return tensor_from_capsule(capsule_from_array(array, stream=stream))

    return to_jax, to_torch
