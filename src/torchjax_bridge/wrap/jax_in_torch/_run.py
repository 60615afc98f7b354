"""A program run on tensors of any kind, without derivatives.

Tensors that have memory go straight to JAX (``_execute``). Tensors without memory, and all tensors while a
mode watches operators, go through the operator of ``_op``. Batched tensors of torch's older vmap are unpacked
here, because no other hook sees them.
"""

from collections.abc import Sequence
from typing import Any

import torch

from torchjax_bridge.errors import ExchangeError
from torchjax_bridge.exchange import tensor_to_jax

from ._execute import import_leaves, run_arrays
from ._legacy_vmap import LegacyBatch
from ._program import JaxProgram
from ._state import has_no_memory, modes_active

__all__ = ["run", "run_with_arrays"]

_Tensor = torch.Tensor


def run(program: JaxProgram, leaves: Sequence[Any]) -> list[Any]:
    """The results of ``program`` on tensors (and arrays and numbers)."""
    return run_with_arrays(program, leaves)[0]


def run_with_arrays(program: JaxProgram, leaves: Sequence[Any]) -> tuple[list[Any], list[Any] | None]:
    """`run`, and the arguments and results as JAX arrays; None if JAX was not called directly."""
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
        return _run_fallback(program, leaves, err), None
    return run_arrays(program, arrays), arrays


def _run_fallback(program: JaxProgram, leaves: Sequence[Any], err: Exception) -> list[Any]:
    """Run on tensors that cannot be imported directly, or raise an error that names the one at fault."""
    batch = LegacyBatch.of(leaves)
    if batch is not None:
        batched = program.vmap(batch.axes, batch.size)
        return [batch.pack(result) for result in run(batched, batch.leaves)]
    if any(isinstance(leaf, _Tensor) and has_no_memory(leaf) for leaf in leaves):
        return _run_op(program, leaves)
    import_leaves(program, leaves)  # raises again, and names the leaf
    raise err


def _run_op(program: JaxProgram, leaves: Sequence[Any]) -> list[Any]:
    from ._op import run_op

    return run_op(program, leaves)
