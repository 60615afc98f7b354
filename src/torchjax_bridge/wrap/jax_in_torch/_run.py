"""A program run on tensors, with no thought of derivatives: what crosses, and what waits for what.

**Memory.** Tensors are lent to JAX for the time of the run, and results are memory of their own. On the CPU
JAX computes in the background, reading torch's memory; a result is exported only when the computation has
ended, so when `run` returns, torch may write to everything. On CUDA nothing waits on the host: DLPack orders
JAX's stream after torch's on the way in and torch's after JAX's on the way out.

Tensors without memory (fake ones, and any tensor while a mode watches operators) go through the operator of
``_op`` instead, and batched tensors of torch's older vmap are unpacked here, because no other hook sees
them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import torch

from torchjax_bridge.errors import ExchangeError, NarrowingError
from torchjax_bridge.exchange import array_to_torch, refuse_in_fork, tensor_to_jax

from .._settings import x64
from ._legacy_vmap import LegacyBatch
from ._program import JaxProgram
from ._state import lies_elsewhere, modes_active

__all__ = ["execute", "run", "run_keeping", "too_wide"]

_Tensor = torch.Tensor
_RUN = "run a JAX function"


def run(program: JaxProgram, leaves: Sequence[Any]) -> list[Any]:
    """The results of ``program`` on tensors (and arrays and numbers)."""
    return run_keeping(program, leaves)[0]


def run_keeping(program: JaxProgram, leaves: Sequence[Any]) -> tuple[list[Any], list[Any] | None]:
    """`run`, and the arguments and results as JAX holds them; None where JAX was not called directly."""
    if modes_active():
        return _run_op(program, leaves), None
    try:
        arrays = [
            tensor_to_jax(leaf.detach() if leaf.requires_grad else leaf)
            if isinstance(leaf, _Tensor)
            else leaf
            for leaf in leaves
        ]
    except (ExchangeError, RuntimeError) as err:
        return _run_otherwise(program, leaves, err), None
    return _run_arrays(program, arrays), arrays


def execute(program: JaxProgram, leaves: Sequence[Any]) -> list[Any]:
    """`run` for tensors that have memory, whatever mode is active."""
    return _run_arrays(program, _lend(program, leaves))


def _run_arrays(program: JaxProgram, arrays: list[Any]) -> list[Any]:
    """Run, export the results, and add them to ``arrays``."""
    refuse_in_fork(_RUN)
    try:
        found = program.run(*arrays)
    except OverflowError as err:
        width = 63 if program.x64 else 31
        for name, value in zip(program.names, arrays, strict=True):
            if type(value) is int and not -(2**width) <= value < 2**width:
                raise too_wide(name, value) from err
        raise
    except jax.errors.JaxRuntimeError as err:
        err.add_note(f"while running {program.describe()}")
        raise
    try:
        if program.lends_all:
            results = [array_to_torch(array) for array in found]
        else:
            results = [
                array_to_torch(array) if lent else array
                for array, lent in zip(found, program.lendable, strict=True)
            ]
    except ExchangeError as err:
        _raise_failure(program, found)
        err.add_note(f"in a result of {program.describe()}")
        raise
    if program.lends_none:
        # No result was exported, which would have waited for the computation.
        jax.block_until_ready(found)
        jax.effects_barrier()
    arrays += found
    return results


def too_wide(name: str, number: int) -> NarrowingError:
    """The error for a Python integer that JAX's integers do not hold."""
    bits, fix = (64, "Pass a float.") if x64() else (32, "Pass a float, or a tensor with x64 on.")
    return NarrowingError(f"cannot pass '{name}' to JAX: {number} does not fit in {bits} bits. {fix}")


def _raise_failure(program: JaxProgram, found: list[Any]) -> None:
    """If a result cannot be exported because computing it failed, raise that failure."""
    try:
        jax.block_until_ready(found)
    except jax.errors.JaxRuntimeError as err:
        err.add_note(f"while running {program.describe()}")
        raise


def _run_otherwise(program: JaxProgram, leaves: Sequence[Any], err: Exception) -> list[Any]:
    """Run on tensors that cannot be lent as they are; or raise, and name the one at fault."""
    batch = LegacyBatch.of(leaves)
    if batch is not None:
        batched = program.vmap(batch.axes, batch.size)
        return [batch.pack(result) for result in run(batched, batch.leaves)]
    if any(isinstance(leaf, _Tensor) and lies_elsewhere(leaf) for leaf in leaves):
        return _run_op(program, leaves)
    _lend(program, leaves)  # raises again, and names the leaf
    raise err


def _run_op(program: JaxProgram, leaves: Sequence[Any]) -> list[Any]:
    from ._op import run_op

    return run_op(program, leaves)


def _lend(program: JaxProgram, leaves: Sequence[Any]) -> list[Any]:
    return [
        tensor_to_jax(leaf.detach(), path=(name,)) if isinstance(leaf, _Tensor) else leaf
        for leaf, name in zip(leaves, program.names, strict=True)
    ]
