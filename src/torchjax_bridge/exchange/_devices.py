"""The device map: ``torch.device`` <-> ``jax.Device``, for devices that hold the same memory.

``cuda:i`` is the JAX GPU whose ``local_hardware_id`` is ``i``; DLPack numbers devices in the same way. The CPU is
one device to torch. To JAX it may be several (``jax_num_cpu_devices``) on the same memory. torch's CPU maps to the
first of them; ``"cpu:i"`` names the ``i``-th. A device that the other framework does not see is a `DeviceError`.
"""

from typing import Any

import jax
import torch

from torchjax_bridge.errors import DeviceError

__all__ = ["jax_device", "torch_device"]


def jax_device(device: Any) -> jax.Device:
    """The JAX device that is the same piece of hardware as a torch device.

    Args:
        device: A ``torch.device``, its name (``"cpu"``, ``"cuda:1"``; ``"cuda"`` is torch's current
            device), or a ``jax.Device``, returned as it is.

    Returns:
        A ``jax.Device``. For ``"cpu"`` the first host device of this process, for ``"cpu:i"`` the ``i``-th.

    Raises:
        DeviceError: torch cannot parse the name, or JAX does not see the device.

    >>> jax_device("cpu").platform
    'cpu'
    """
    if isinstance(device, jax.Device):
        return device
    wanted = _parse(device)
    if wanted.type == "cpu":
        return _host_device(wanted.index or 0)
    if wanted.type != "cuda":
        raise DeviceError(
            f"JAX shares no memory with torch device '{wanted}'; only cpu and cuda cross. "
            "Move the tensor to the CPU first."
        )
    index = _with_tensor_index(wanted).index
    for candidate in _jax_gpus():
        if candidate.local_hardware_id == index:
            return candidate
    raise DeviceError(
        f"JAX does not see torch device 'cuda:{index}'; it sees {_visible_devices()}. Install the CUDA build of "
        'JAX (pip install "jax[cuda13]") and let CUDA_VISIBLE_DEVICES and JAX_PLATFORMS admit the device, or '
        "move the tensor to the CPU first."
    )


def torch_device(device: Any) -> torch.device:
    """The torch device that is the same piece of hardware as a JAX device.

    Args:
        device: A ``jax.Device``; or a ``torch.device`` or its name, returned as a ``torch.device``.

    Returns:
        A ``torch.device``, equal to the ``.device`` of the tensors there: CUDA has an index, the CPU has none.

    Raises:
        DeviceError: torch has no such device (a TPU), or was built without CUDA.

    >>> import jax
    >>> torch_device(jax.devices("cpu")[0])
    device(type='cpu')
    """
    if not isinstance(device, jax.Device):
        return _with_tensor_index(_parse(device))
    if device.platform == "cpu":
        return torch.device("cpu")
    if device.platform in ("gpu", "cuda") and device.local_hardware_id is not None:
        if device.local_hardware_id < torch.cuda.device_count():
            return torch.device("cuda", device.local_hardware_id)
        raise DeviceError(
            f"torch does not see JAX device {device}: it counts {torch.cuda.device_count()} CUDA devices. "
            "Install a CUDA build of torch, or call jax.device_put(array, jax.devices('cpu')[0]) first."
        )
    raise DeviceError(
        f"torch shares no memory with JAX device {device}. "
        "Call jax.device_put(array, jax.devices('cpu')[0]) first."
    )


def _parse(device: Any) -> torch.device:
    if isinstance(device, torch.device):
        return device
    if not isinstance(device, str):
        raise DeviceError(f"{device!r} is no device: pass a torch.device, a jax.Device or a name like 'cpu'.")
    try:
        return torch.device(device)
    except RuntimeError as err:
        raise DeviceError(f"{device!r} is no device: pass 'cpu', 'cuda' or 'cuda:0'.") from err


def _with_tensor_index(device: torch.device) -> torch.device:
    """The device as ``tensor.device`` gives it: the CPU without an index, CUDA with one."""
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda" or device.index is not None:
        return device
    try:
        return torch.device("cuda", torch.cuda.current_device())
    except (RuntimeError, AssertionError) as err:  # AssertionError: torch was built without CUDA
        raise DeviceError(
            f"torch has no current device for 'cuda': {err}. JAX sees {_visible_devices()}. Install a CUDA build "
            "of torch, or name another device."
        ) from err


# What JAX raises for a missing backend. AssertionError: JAX_PLATFORMS names only backends that are not installed.
_NO_BACKEND = (RuntimeError, AssertionError)


def _host_device(index: int) -> jax.Device:
    try:
        hosts = jax.local_devices(backend="cpu")
    except _NO_BACKEND as err:  # JAX_PLATFORMS leaves the CPU out
        raise DeviceError(
            f"JAX does not see the CPU; it sees {_visible_devices()}. Add cpu to JAX_PLATFORMS "
            "(JAX_PLATFORMS=cuda,cpu)."
        ) from err
    index %= 256  # torch keeps a signed 8-bit index: 'cpu:255' arrives as -1
    if index < len(hosts):
        return hosts[index]
    raise DeviceError(
        f"JAX does not see 'cpu:{index}': it has {len(hosts)} host devices. Set "
        f"jax.config.update('jax_num_cpu_devices', {index + 1}) before the first computation, or pass 'cpu'."
    )


def _jax_gpus() -> list[jax.Device]:
    try:
        return jax.local_devices(backend="gpu")
    except _NO_BACKEND:
        return []


def _visible_devices() -> str:
    try:
        return ", ".join(sorted({str(device) for device in jax.local_devices()}))
    except _NO_BACKEND:
        return "no device at all"
