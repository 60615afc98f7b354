"""A program run on tensors that have memory: imported into JAX, computed, and the results exported.

**Memory.** JAX reads the tensors' memory during the run, and results have memory of their own. On the CPU JAX
computes in the background. A result is exported only when the computation has ended, so when a function of
this file returns, torch may write to everything. On CUDA the host does not wait: on import DLPack orders
JAX's stream after torch's, on export torch's after JAX's.
"""

from collections.abc import Sequence
from typing import Any

import jax
import torch

from torchjax_bridge.errors import ExchangeError, NarrowingError
from torchjax_bridge.exchange import array_to_torch, refuse_in_fork, tensor_to_jax

from .._settings import x64
from ._program import JaxProgram

__all__ = ["execute", "import_leaves", "run_arrays", "too_wide"]

_RUN = "run a JAX function"


def execute(program: JaxProgram, leaves: Sequence[Any]) -> list[Any]:
    """The results of ``program`` on tensors that have memory, whatever mode is active."""
    return run_arrays(program, import_leaves(program, leaves))


def run_arrays(program: JaxProgram, arrays: list[Any]) -> list[Any]:
    """Run the program, and export the results. The results as JAX arrays are appended to ``arrays``."""
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
        if program.exports_all:
            results = [array_to_torch(array) for array in found]
        else:
            results = [
                array_to_torch(array) if exportable else array
                for array, exportable in zip(found, program.exportable, strict=True)
            ]
    except ExchangeError as err:
        _raise_failure(program, found)
        err.add_note(f"in a result of {program.describe()}")
        raise
    if program.exports_none:
        # Exporting a result waits for the computation, and none was exported.
        jax.block_until_ready(found)
        jax.effects_barrier()
    arrays += found
    return results


def too_wide(name: str, number: int) -> NarrowingError:
    """The error for a Python integer that does not fit in JAX's integers."""
    bits, fix = (64, "Pass a float.") if x64() else (32, "Pass a float, or a tensor with x64 on.")
    return NarrowingError(f"cannot pass '{name}' to JAX: {number} does not fit in {bits} bits. {fix}")


def _raise_failure(program: JaxProgram, found: list[Any]) -> None:
    """If a result cannot be exported because computing it failed, raise the error of the computation."""
    try:
        jax.block_until_ready(found)
    except jax.errors.JaxRuntimeError as err:
        err.add_note(f"while running {program.describe()}")
        raise


def import_leaves(program: JaxProgram, leaves: Sequence[Any]) -> list[Any]:
    """The leaves in JAX. The error names a tensor that JAX cannot hold."""
    return [
        tensor_to_jax(leaf.detach(), path=(name,)) if isinstance(leaf, torch.Tensor) else leaf
        for leaf, name in zip(leaves, program.names, strict=True)
    ]
