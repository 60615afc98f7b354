"""The CPU plays the GPU, to rehearse the proof: ``install()`` changes torch and JAX for the whole process.

Tensors "on cuda" are on the CPU, streams and events remember nothing, and what a GPU alone can show fails or is not
shown. So a rehearsal proves that every line runs with the versions that are installed, and nothing else.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from .._rehearsal import VARIABLE

__all__ = ["install"]


class Stream:
    """A stream on which everything is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0
        self.device_index = 0

    def wait_stream(self, other: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Any = None) -> "Event":
        """An event that has passed."""
        return event or Event()

    def query(self) -> bool:
        """All is done."""
        return True


class Event:
    """An event that has passed, and knows when it was recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        self._at = time.perf_counter()

    def query(self) -> bool:
        """It has passed."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, other: "Event") -> float:
        """Milliseconds to a later event."""
        return 1e3 * (other._at - self._at)


_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
)
_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")


def install() -> None:
    """Let the CPU play the GPU from now on; before anything else imports torch or JAX."""
    os.environ[VARIABLE] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import torch

    _stand_in_for_capsules()
    _stand_in_for_streams(torch.cuda)
    for name in (*_FACTORIES, *_LIKE):
        setattr(torch, name, _on_the_cpu(getattr(torch, name)))
    for owner, name in (
        (torch.Tensor, "to"),
        (torch.Tensor, "new_empty"),
        (torch.nn.Module, "to"),
        (torch.nn.Module, "to_empty"),
    ):
        setattr(owner, name, _on_the_cpu(getattr(owner, name)))
    for owner, name in ((torch.Tensor, "cuda"), (torch.Tensor, "pin_memory"), (torch.nn.Module, "cuda")):
        setattr(owner, name, lambda self, *_, **__: self)
    for name in ("devices", "local_devices"):
        setattr(jax, name, _on_the_host(getattr(jax, name)))


def _on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the CPU wherever an argument is a CUDA device."""
    import torch

    def there(value: Any) -> Any:
        is_device = isinstance(value, torch.device) and value.type == "cuda"
        is_name = isinstance(value, str) and value.split(":")[0] == "cuda"
        return torch.device("cpu") if is_device or is_name else value

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(
            *(there(one) for one in args), **{name: there(value) for name, value in kwargs.items()}
        )

    return call


def _on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.devices``, with the CPU's for the GPU's."""

    def call(*args: Any, **kwargs: Any) -> Any:
        gpu = ("gpu", "cuda")
        return function(
            *("cpu" if one in gpu else one for one in args),
            **{name: "cpu" if value in gpu else value for name, value in kwargs.items()},
        )

    return call


def _stand_in_for_capsules() -> None:
    """The two functions of jaxlib, with no stream and with CPU memory whatever they are told."""
    from jaxlib import _jax

    array_from_capsule: Any = _jax.dlpack_managed_tensor_to_buffer
    capsule_from_array: Any = _jax.buffer_to_dlpack_managed_tensor

    def to_array(capsule: Any, device: Any, stream: Any, copy: Any = None, *kind: Any) -> Any:
        return array_from_capsule(capsule, device, None, copy, *(1 for _ in kind))

    to_array.__doc__ = array_from_capsule.__doc__  # which tells what it takes
    _jax.dlpack_managed_tensor_to_buffer = to_array
    _jax.buffer_to_dlpack_managed_tensor = lambda array, stream=None: capsule_from_array(array)


def _stand_in_for_streams(cuda: Any) -> None:
    now = Stream()

    # A function of its own for every name, since torch.compile keeps rules by function.
    def entering() -> Callable[..., Any]:
        @contextlib.contextmanager
        def entered(*_: Any) -> Iterator[None]:
            yield

        return entered

    def nothing() -> Callable[..., None]:
        return lambda *_, **__: None

    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "the CPU, standing in",
        "get_device_properties": lambda *_: SimpleNamespace(
            name="the CPU, standing in", total_memory=1 << 34, memory_clock_rate=0, memory_bus_width=0
        ),
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *_: (1 << 34, 1 << 34),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": nothing(),
        "empty_cache": nothing(),
        "synchronize": nothing(),
        "_sleep": nothing(),
        "set_sync_debug_mode": nothing(),
        "manual_seed": nothing(),
        "current_stream": lambda *_: now,
        "default_stream": lambda *_: now,
        "Stream": Stream,
        "ExternalStream": type("ExternalStream", (Stream,), {}),
        "Event": Event,
        "device": entering(),
        "stream": entering(),
    }.items():
        setattr(cuda, name, value)
