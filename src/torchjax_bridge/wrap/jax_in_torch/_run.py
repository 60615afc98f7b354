"""A program run on tensors of any kind, with no thought of derivatives.

Tensors that have memory go straight to JAX (``_execute``). Tensors without memory (fake ones, and any tensor while
a mode watches operators) go through the operator of ``_op``. Batched tensors of torch's older vmap are unpacked
here, because no other hook sees them.
"""

from collections.abc import Sequence
from typing import Any

import torch

from torchjax_bridge.errors import ExchangeError
from torchjax_bridge.exchange import tensor_to_jax

from ._execute import lend, run_arrays
from ._legacy_vmap import LegacyBatch
from ._program import JaxProgram
from ._state import lies_elsewhere, modes_active

__all__ = ["run", "run_keeping"]

_Tensor = torch.Tensor


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
    return run_arrays(program, arrays), arrays


def _run_otherwise(program: JaxProgram, leaves: Sequence[Any], err: Exception) -> list[Any]:
    """Run on tensors that cannot be lent as they are; or raise, and name the one at fault."""
    batch = LegacyBatch.of(leaves)
    if batch is not None:
        batched = program.vmap(batch.axes, batch.size)
        return [batch.pack(result) for result in run(batched, batch.leaves)]
    if any(isinstance(leaf, _Tensor) and lies_elsewhere(leaf) for leaf in leaves):
        return _run_op(program, leaves)
    lend(program, leaves)  # raises again, and names the leaf
    raise err


def _run_op(program: JaxProgram, leaves: Sequence[Any]) -> list[Any]:
    from ._op import run_op

    return run_op(program, leaves)
