"""The device map: ``torch.device`` <-> ``jax.Device``, for devices that hold the same memory.

CPU is CPU, and ``cuda:i`` is JAX's GPU whose ``local_hardware_id`` is ``i`` (the same numbering that
DLPack uses). Refuses to guess: a device that the other framework does not see is a `DeviceError`.
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
        A ``jax.Device``. For ``"cpu"`` the first host device of this process.

    Raises:
        DeviceError: torch cannot parse the name, or JAX does not see the device.

    >>> jax_device("cpu").platform
    'cpu'
    """
    if isinstance(device, jax.Device):
        return device
    torch_side = _parse(device)
    if torch_side.type == "cpu":
        return jax.local_devices(backend="cpu")[0]
    if torch_side.type != "cuda":
        raise DeviceError(
            f"JAX shares no memory with torch device '{torch_side}'; only cpu and cuda cross. "
            "Move the tensor to the CPU first."
        )
    index = torch.cuda.current_device() if torch_side.index is None else torch_side.index
    for candidate in _jax_gpus():
        if candidate.local_hardware_id == index:
            return candidate
    raise DeviceError(
        f"JAX does not see torch device 'cuda:{index}'; it sees {_seen()}. Install the CUDA build of JAX "
        '(pip install "jax[cuda13]") and let CUDA_VISIBLE_DEVICES and JAX_PLATFORMS admit the device, or '
        "move the tensor to the CPU first."
    )


def torch_device(device: Any) -> torch.device:
    """The torch device that is the same piece of hardware as a JAX device.

    Args:
        device: A ``jax.Device``; or a ``torch.device`` or its name, returned as a ``torch.device``.

    Returns:
        A ``torch.device``, with an index unless it is the CPU.

    Raises:
        DeviceError: torch has no such device (a TPU), or was built without CUDA.

    >>> import jax
    >>> torch_device(jax.devices("cpu")[0])
    device(type='cpu')
    """
    if not isinstance(device, jax.Device):
        return _parse(device)
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


def _jax_gpus() -> list[jax.Device]:
    try:
        return jax.local_devices(backend="gpu")
    except RuntimeError:  # what JAX raises when no GPU backend was found
        return []


def _seen() -> str:
    return ", ".join(sorted({str(device) for device in jax.local_devices()}))
