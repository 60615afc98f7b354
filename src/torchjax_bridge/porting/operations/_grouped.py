"""Experts: how many rows go to each, and the product of each row with the matrix of its group."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError
from ._products import matmul
from ._table import operation

__all__: list[str] = []


@operation("histc")
def count(at: Lowering, node: Node, input: Value, bins: Any = 100, min: Any = 0, max: Any = 0) -> Placed:
    if min == max:
        raise RefusedError("torch.histc takes its borders from the values; give it min= and max=")
    borders = f"bins={at.number(bins)}, range=({at.number(min)}, {at.number(max)})"
    made = f"jnp.histogram({at.in_torch_order(input)}, {borders})[0]"
    return Placed(f"{made}.astype({at.number(node.result.dtype)})", (0,))


@operation("grouped_mm", "_grouped_mm")
def grouped_product(
    at: Lowering,
    node: Node,
    mat_a: Value,
    mat_b: Value,
    *,
    offs: Value | None = None,
    bias: Value | None = None,
    out_dtype: Any = None,
) -> Placed:
    if bias is not None or out_dtype not in (None, mat_a.dtype):
        raise RefusedError("grouped_mm with a bias or another dtype; add and convert after it")
    if offs is None:
        return matmul(at, node, mat_a, mat_b)
    if (len(mat_a.shape), len(mat_b.shape)) != (2, 3):
        raise RefusedError("grouped_mm whose groups are no rows of one matrix; write a loop over the groups")
    a, b = at.in_torch_order(mat_a), at.in_torch_order(mat_b)
    return Placed(f"jax.lax.ragged_dot({a}, {b}, jnp.diff({at.in_torch_order(offs)}, prepend=0))", (0, 1))
