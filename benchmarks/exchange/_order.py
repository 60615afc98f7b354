"""Proof, on a GPU, that a crossing never makes the host wait for the device.

Two independent witnesses. A value crosses while the device is still computing it, and it is still
unfinished when the crossing has returned. And torch's profiler sees no synchronising call meanwhile (it
records the CUDA runtime's calls; of the driver's, which XLA uses, it knows some; hence the first witness).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .._case import Findings
from .._record import Promise
from .._setting import Setting
from .._timing import Spread
from ._routes import Direction, check_crossed

__all__ = ["no_host_wait"]

_CROSSINGS = 20
# Some tens of milliseconds of matrix products on the fastest cards of today, more on others.
_WIDTH, _STEPS = 8192, 5
_REGION = "crossings under the profiler"
# CUDA calls that block the host until the device, a stream or an event is done.
_WAITS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoD_v2",
)


class _TooFast(Exception):  # noqa: N818 (it is no error of the user's)
    """The device had finished its work before the crossing began, so nothing can be shown."""


def no_host_wait(direction: Direction, setting: Setting) -> Findings:
    """Cross values that the device is still computing; count how often the host waited for them."""
    setting.progress(f"Does {direction.name} ever wait for the device?")
    begin = _torch_work(setting) if direction.name == "to_jax" else _jax_work(setting)
    direction.ours(begin().value)  # chooses the path, makes streams and events
    torch.cuda.synchronize()
    try:
        waited = sum(_waited(direction, begin) for _ in range(_CROSSINGS))
        calls = _synchronising_calls(direction, begin)
    except _TooFast as err:
        return Findings(facts=[f"Whether {direction.name} waits for the device could not be shown: {err}"])
    seen = f" ({', '.join(sorted(set(calls)))})" if calls else ""
    return Findings(
        promises=[
            _none(f"{direction.name}: of {_CROSSINGS} unfinished values, those waited for", waited),
            _none(f"{direction.name}: synchronising CUDA calls in {_CROSSINGS} crossings{seen}", len(calls)),
        ]
    )


def _none(text: str, count: int) -> Promise:
    value = float(count)
    return Promise(text, "at most", 0.0, "", Spread(value, value, value, value))


@dataclass(frozen=True)
class _Pending:
    """A value whose computation has been queued, and a look at whether it has ended."""

    value: Any
    done: Callable[[], bool]


def _torch_work(setting: Setting) -> Callable[[], _Pending]:
    start = torch.rand(_WIDTH, _WIDTH, device=setting.torch_device)

    def begin() -> _Pending:
        value = start
        for _ in range(_STEPS):
            value = value @ start / _WIDTH
        behind = torch.cuda.Event()
        behind.record()
        return _Pending(value, behind.query)

    begin()  # cuBLAS starts, kernels load
    torch.cuda.synchronize()
    return begin


def _jax_work(setting: Setting) -> Callable[[], _Pending]:
    start = jax.device_put(np.random.default_rng(0).random((_WIDTH, _WIDTH), dtype=np.float32))

    @jax.jit
    def chain(value: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _STEPS, lambda _, now: now @ value / _WIDTH, value)

    def begin() -> _Pending:
        value = chain(start)
        return _Pending(value, value.is_ready)

    begin().value.block_until_ready()  # compiles
    return begin


def _waited(direction: Direction, begin: Callable[[], _Pending]) -> bool:
    """Whether the value was ready when the crossing returned: then the crossing must have waited."""
    pending = begin()
    if pending.done():
        raise _TooFast("its work ended before the crossing began.")
    crossed = direction.ours(pending.value)
    ready = pending.done()
    torch.cuda.synchronize()
    check_crossed(pending.value, crossed, must_share=True)
    return ready


def _synchronising_calls(direction: Direction, begin: Callable[[], _Pending]) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        value = begin().value
        with record_function(_REGION):
            for _ in range(_CROSSINGS):
                direction.ours(value)
        torch.cuda.synchronize()
    events: Any = seen.events()
    # The profiler synchronises when it starts and stops, and so do we: count inside the region alone. The
    # region is recorded a second time on the device's own clock.
    host = torch.autograd.DeviceType.CPU
    region = next((e.time_range for e in events if e.name == _REGION and e.device_type == host), None)
    if region is None:
        raise _TooFast("torch's profiler did not record the region.")
    return [
        event.name
        for event in events
        if event.name in _WAITS and region.start <= event.time_range.start <= region.end
    ]
