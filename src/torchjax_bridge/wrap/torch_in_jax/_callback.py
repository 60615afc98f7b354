"""The one place where XLA calls torch: an operation's tensors are laid over XLA's own buffers.

Owns the adapter over ``jax.experimental.buffer_callback`` (zero-copy views of the operands, one write of
each result, on XLA's stream on GPU), its fallback over the public ``jax.pure_callback`` (host copies), the
guard that keeps a tensor which outlives its call from dangling, and the box through which the eager path
gets the original exception. A callback runs torch and never JAX, so it cannot wait for XLA, and it takes no
lock of ours.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from torchjax_bridge.errors import TransformError
from torchjax_bridge.exchange import torch_dtype

from ._ops import Op

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # it is experimental: where it is gone, pure_callback does the same with host copies
    buffer_callback = None  # type: ignore[assignment]

__all__ = ["call_op", "call_op_eagerly"]

# Fills the carriers of the results from the carriers of the operands.
_Fill = Callable[[list[torch.Tensor], list[torch.Tensor]], None]


def call_op(op: Op, operands: Sequence[Any], box: "deque[BaseException] | None" = None) -> list[Any]:
    """Run an operation on JAX arrays or tracers, inside or outside ``jit``; ``box`` gets its exceptions."""
    structs = [port.struct() for port in op.outs]
    used = [operands[i] for i in op.used]
    if not structs:
        return []
    if buffer_callback is None:
        return list(jax.pure_callback(_with_autograd(_over_numpy(op, box)), structs, *used))
    return list(buffer_callback(_with_autograd(_over_buffers(op, box)), structs)(*used))


def call_op_eagerly(op: Op, operands: Sequence[Any]) -> list[Any]:
    """Run an operation on arrays, now; what torch raises is raised here, as it is."""
    jitted, box = op.once("eager", lambda: _eager(op))
    try:
        results = jitted(*operands)
        if op.device.type == "cpu":  # there is no device to keep busy meanwhile
            jax.block_until_ready(results)
        return results
    except (jax.errors.JaxRuntimeError, ValueError):  # ValueError: JAX's fast path, from the second call on
        if not box:
            raise
        error = box.pop()
        box.clear()
    # Not within the handler: the text that XLA made of this very error is no context of it.
    raise error


def _eager(op: Op) -> tuple[Callable[..., list[Any]], "deque[BaseException]"]:
    box: deque[BaseException] = deque(maxlen=64)
    # Held weakly by the compiled program, so that this cache of the operation does not keep it alive.
    return jax.jit(lambda *operands: call_op(op, operands, box)), box


# --- over XLA's buffers ---------------------------------------------------------------------------------


def _over_buffers(op: Op, box: "deque[BaseException] | None") -> Callable[..., None]:
    if op.device.type == "cpu":
        fill = _filler(op, op.device, box)

        def on_cpu(_: Any, outs: list[Any], *ins: Any) -> None:
            fill([from_dlpack(out.__dlpack__()) for out in outs], [from_dlpack(x.__dlpack__()) for x in ins])

        return on_cpu

    fillers: dict[int, _Fill] = {}
    # Closed-over tensors are written on torch's own stream, before and after; XLA's stream knows nothing of it.
    closes_over = op.closes_over

    def on_gpu(context: Any, outs: list[Any], *ins: Any) -> None:
        _, index = outs[0].__dlpack_device__()
        fill = fillers.get(index)
        if fill is None:
            fill = fillers[index] = _filler(op, torch.device(op.device.type, index), box)
        # Torch's kernels queue up on XLA's stream, behind what made the operands; the host waits for nothing.
        with torch.cuda.device(index):
            stream = torch.cuda.ExternalStream(context.stream, index)
            if closes_over:
                stream.wait_stream(torch.cuda.default_stream(index))
            with torch.cuda.stream(stream):
                fill([from_dlpack(o.__dlpack__()) for o in outs], [from_dlpack(x.__dlpack__()) for x in ins])
            if closes_over:
                torch.cuda.default_stream(index).wait_stream(stream)

    return on_gpu


def _filler(op: Op, device: torch.device, box: "deque[BaseException] | None") -> _Fill:
    run = op.run(device)
    ports = [op.ins[i] for i in op.used]
    decoded = any(port.carry != "plain" for port in ports)
    writers = [port.write for port in op.outs]

    def fill(outs: list[torch.Tensor], ins: list[torch.Tensor]) -> None:
        tensors = [port.decode(x) for port, x in zip(ports, ins, strict=True)] if decoded else ins
        results = run(*tensors)
        for write, out, result in zip(writers, outs, results, strict=True):
            write(out, result)

    guarded = _lending(fill) if op.lends else fill
    return guarded if box is None else _boxing(guarded, box)


def _with_autograd(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Torch code may differentiate inside, which an ``inference_mode`` around the call would forbid."""

    def allowing(*args: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return callback(*args)
        with torch.inference_mode(False):
            return callback(*args)

    return allowing


def _lending(fill: _Fill) -> _Fill:
    """User code sees XLA's memory for the length of the call: a tensor that it keeps gets memory of its own."""

    def guarded(outs: list[torch.Tensor], ins: list[torch.Tensor]) -> None:
        lent = [weakref.ref(tensor.untyped_storage()) for tensor in ins]
        try:
            fill(outs, ins)
        finally:
            ins.clear()
            for reference in lent:
                storage = reference()
                if storage is not None:
                    _rescue(storage)

    return guarded


def _rescue(storage: Any) -> None:
    """Move a storage, and so every tensor and view on it, off XLA's memory."""
    if storage.device.type == "cpu":
        storage.share_memory_()  # the public way to swap the memory under a storage in place: it copies
        return
    raise TransformError(
        "the torch function kept one of its input tensors after the call; that memory is JAX's and may be "
        "reused. Store tensor.clone() instead."
    )


def _boxing(fill: _Fill, box: "deque[BaseException]") -> _Fill:
    def boxed(outs: list[torch.Tensor], ins: list[torch.Tensor]) -> None:
        try:
            fill(outs, ins)
        except BaseException as err:
            box.append(err)
            raise

    return boxed


# --- over host copies -----------------------------------------------------------------------------------


def _over_numpy(op: Op, box: "deque[BaseException] | None") -> Callable[..., list[np.ndarray]]:
    cpu = torch.device("cpu")
    fill = _filler(op, cpu, box)
    structs = [port.struct() for port in op.outs]
    dtypes = [op.ins[i].struct().dtype for i in op.used]

    def on_host(*ins: Any) -> list[np.ndarray]:
        copies = [np.array(x, dtype=dtype, order="C") for x, dtype in zip(ins, dtypes, strict=True)]
        outs = [np.empty(struct.shape, struct.dtype) for struct in structs]
        fill([_as_tensor(out) for out in outs], [_as_tensor(copy) for copy in copies])
        return outs

    return on_host


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on numpy's memory, also for the dtypes that only JAX's numpy has."""
    plain = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
    return torch.from_numpy(plain).view(torch_dtype(array.dtype))
