"""The one place where XLA calls torch, on tensors that are views of XLA's own buffers.

Owns the adapter over ``jax.experimental.buffer_callback`` (views of the operands, one write of each result,
on XLA's stream on the GPU), and its fallback over the public ``jax.pure_callback`` (host copies). Gives
memory of its own to a tensor that outlives its call, and the original exception to the eager path. A callback
runs torch and never JAX, so it cannot wait for XLA, and it takes no lock of ours.
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
except ImportError:  # it is experimental; without it, pure_callback does the same with host copies
    buffer_callback = None  # type: ignore[assignment]

__all__ = ["call_op", "call_op_eagerly"]

# Fills JAX's memory of the results from JAX's memory of the operands.
_Fill = Callable[[list[torch.Tensor], list[torch.Tensor]], None]


def call_op(op: Op, operands: Sequence[Any], errors: "deque[BaseException] | None" = None) -> list[Any]:
    """Run an operation on JAX arrays or tracers, inside or outside ``jit``; ``errors`` gets its exceptions."""
    structs = [encoding.struct() for encoding in op.outs]
    used = [operands[i] for i in op.used]
    if not structs:
        return []
    if buffer_callback is None:
        return list(jax.pure_callback(_with_autograd(_over_numpy(op, errors)), structs, *used))
    return list(buffer_callback(_with_autograd(_over_buffers(op, errors)), structs)(*used))


def call_op_eagerly(op: Op, operands: Sequence[Any]) -> list[Any]:
    """Run an operation on arrays, now. An exception of torch's is raised here unchanged."""
    jitted, errors = op.memoized("eager", lambda: _eager(op))
    try:
        results = jitted(*operands)
        if op.device.type == "cpu":  # there is no other device to work meanwhile
            jax.block_until_ready(results)
        return results
    except (jax.errors.JaxRuntimeError, ValueError):  # ValueError: JAX's fast path, from the second call on
        if not errors:
            raise
        error = errors.pop()
        errors.clear()
    # Outside the handler, because XLA's error only repeats this one and should not be its context.
    raise error


def _eager(op: Op) -> tuple[Callable[..., list[Any]], "deque[BaseException]"]:
    errors: deque[BaseException] = deque(maxlen=64)
    # The compiled program holds the operation weakly, so that this cache of the operation does not keep it alive.
    return jax.jit(lambda *operands: call_op(op, operands, errors)), errors


# --- over XLA's buffers ---------------------------------------------------------------------------------


def _over_buffers(op: Op, errors: "deque[BaseException] | None") -> Callable[..., None]:
    if op.device.type == "cpu":
        fill = _filler(op, op.device, errors)

        def on_cpu(_: Any, outs: list[Any], *ins: Any) -> None:
            fill([from_dlpack(out.__dlpack__()) for out in outs], [from_dlpack(x.__dlpack__()) for x in ins])

        return on_cpu

    fillers: dict[int, _Fill] = {}
    # Closed-over tensors are written on the caller's stream, before and after. XLA's stream does not wait for that.
    closes_over = op.closes_over

    def on_gpu(context: Any, outs: list[Any], *ins: Any) -> None:
        _, index = outs[0].__dlpack_device__()
        fill = fillers.get(index)
        if fill is None:
            fill = fillers[index] = _filler(op, torch.device(op.device.type, index), errors)
        caller = torch.cuda.current_stream(index)  # before the guards below
        # torch's kernels queue on XLA's stream, behind those that compute the operands. The host does not wait.
        with torch.cuda.device(index):
            stream = torch.cuda.ExternalStream(context.stream, index)
            if closes_over:
                stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                fill([from_dlpack(o.__dlpack__()) for o in outs], [from_dlpack(x.__dlpack__()) for x in ins])
            if closes_over:
                caller.wait_stream(stream)

    return on_gpu


def _filler(op: Op, device: torch.device, errors: "deque[BaseException] | None") -> _Fill:
    run = op.run(device)
    encodings = [op.ins[i] for i in op.used]
    decoded = any(encoding.form != "plain" for encoding in encodings)
    writers = [encoding.write for encoding in op.outs]

    def fill(outs: list[torch.Tensor], ins: list[torch.Tensor]) -> None:
        tensors = [encoding.decode(x) for encoding, x in zip(encodings, ins, strict=True)] if decoded else ins
        results = run(*tensors)
        for write, out, result in zip(writers, outs, results, strict=True):
            write(out, result)

    guarded = _rescuing_kept(fill) if op.runs_user_code else fill
    return guarded if errors is None else _recording_errors(guarded, errors)


def _with_autograd(callback: Callable[..., Any]) -> Callable[..., Any]:
    """The callback without the ``inference_mode`` around it, so that torch code may differentiate inside."""

    def allowing(*args: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return callback(*args)
        with torch.inference_mode(False):
            return callback(*args)

    return allowing


def _rescuing_kept(fill: _Fill) -> _Fill:
    """Give a tensor that user code keeps memory of its own, because XLA's memory is valid only during the call."""

    def guarded(outs: list[torch.Tensor], ins: list[torch.Tensor]) -> None:
        storages = [weakref.ref(tensor.untyped_storage()) for tensor in ins]
        try:
            fill(outs, ins)
        finally:
            ins.clear()
            for reference in storages:
                storage = reference()
                if storage is not None:
                    _rescue(storage)

    return guarded


def _rescue(storage: Any) -> None:
    """Move a storage, with every tensor and view on it, out of XLA's memory."""
    if storage.device.type == "cpu":
        storage.share_memory_()  # the public way to replace the memory of a storage: it copies
        return
    raise TransformError(
        "the torch function kept one of its input tensors after the call; that memory is JAX's and may be "
        "reused. Store tensor.clone() instead."
    )


def _recording_errors(fill: _Fill, errors: "deque[BaseException]") -> _Fill:
    def recording(outs: list[torch.Tensor], ins: list[torch.Tensor]) -> None:
        try:
            fill(outs, ins)
        except BaseException as err:
            errors.append(err)
            raise

    return recording


# --- over host copies -----------------------------------------------------------------------------------


def _over_numpy(op: Op, errors: "deque[BaseException] | None") -> Callable[..., list[np.ndarray]]:
    cpu = torch.device("cpu")
    fill = _filler(op, cpu, errors)
    structs = [encoding.struct() for encoding in op.outs]
    dtypes = [op.ins[i].struct().dtype for i in op.used]

    def on_host(*ins: Any) -> list[np.ndarray]:
        copies = [np.array(x, dtype=dtype, order="C") for x, dtype in zip(ins, dtypes, strict=True)]
        outs = [np.empty(struct.shape, struct.dtype) for struct in structs]
        fill([_as_tensor(out) for out in outs], [_as_tensor(copy) for copy in copies])
        return outs

    return on_host


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on numpy's memory, also for the dtypes that only JAX adds to numpy."""
    plain = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
    return torch.from_numpy(plain).view(torch_dtype(array.dtype))
