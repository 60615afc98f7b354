"""Checks, on a GPU, that a conversion never makes the host wait for the device.

Two independent checks. A value is converted while the device still computes it, and it is still unfinished when
the conversion returns. And torch's profiler records no synchronising call meanwhile. The profiler sees the calls
of the CUDA runtime but only some of the driver's, which XLA uses; hence the first check.
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
from .._rehearsal import rehearsing
from .._setting import Setting
from .._timing import Spread
from ._routes import Direction, check_result

__all__ = ["no_host_wait"]

_CROSSINGS = 20
# Matrix products that take tens of milliseconds on the fastest GPUs of 2026, and longer on others.
_WIDTH, _STEPS = (64 if rehearsing() else 8192), 5
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


class _TooFast(Exception):  # noqa: N818 (not a user's error)
    """The device finished its work before the conversion began, so the check shows nothing."""


def no_host_wait(direction: Direction, setting: Setting) -> Findings:
    """Convert values that the device is still computing; count how often the host waited for them."""
    setting.progress(f"Does {direction.name} ever wait for the device?")
    begin = _torch_work(setting) if direction.name == "to_jax" else _jax_work(setting)
    direction.ours(begin().value)  # chooses the path and creates streams and events
    torch.cuda.synchronize()
    try:
        waited = sum(_waited(direction, begin) for _ in range(_CROSSINGS))
        calls = _synchronising_calls(direction, begin)
    except _TooFast as err:
        return Findings(facts=[f"Whether {direction.name} waits for the device could not be shown: {err}"])
    seen = f" ({', '.join(sorted(set(calls)))})" if calls else ""
    return Findings(
        promises=[
            _at_most_zero(f"{direction.name}: of {_CROSSINGS} unfinished values, those waited for", waited),
            _at_most_zero(
                f"{direction.name}: synchronising CUDA calls in {_CROSSINGS} crossings{seen}", len(calls)
            ),
        ]
    )


def _at_most_zero(text: str, count: int) -> Promise:
    value = float(count)
    return Promise(text, "at most", 0.0, "", Spread(value, value, value, value))


@dataclass(frozen=True)
class _Pending:
    """A value whose computation has been queued, and a function that tells whether it has finished."""

    value: Any
    done: Callable[[], bool]


def _torch_work(setting: Setting) -> Callable[[], _Pending]:
    start = torch.rand(_WIDTH, _WIDTH, device=setting.torch_device)

    def begin() -> _Pending:
        value = start
        for _ in range(_STEPS):
            value = value @ start / _WIDTH
        done_event = torch.cuda.Event()
        done_event.record()
        return _Pending(value, done_event.query)

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
    """Whether the value was ready when the conversion returned, which means that the conversion waited."""
    pending = begin()
    if pending.done():
        raise _TooFast("its work ended before the crossing began.")
    crossed = direction.ours(pending.value)
    ready = pending.done()
    torch.cuda.synchronize()
    check_result(pending.value, crossed, must_share=True)
    return ready


def _synchronising_calls(direction: Direction, begin: Callable[[], _Pending]) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        value = begin().value
        with record_function(_REGION):
            for _ in range(_CROSSINGS):
                direction.ours(value)
        torch.cuda.synchronize()
    events: Any = seen.events()
    # The profiler synchronises when it starts and stops, and so does this function. So count only inside the
    # region. The profiler records the region a second time on the device's clock.
    host = torch.autograd.DeviceType.CPU
    region = next((e.time_range for e in events if e.name == _REGION and e.device_type == host), None)
    if region is None:
        raise _TooFast("torch's profiler did not record the region.")
    return [
        event.name
        for event in events
        if event.name in _WAITS and region.start <= event.time_range.start <= region.end
    ]
