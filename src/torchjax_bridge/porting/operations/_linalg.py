"""Linear algebra of matrices that stand in the last two axes, in torch's order."""

from functools import cache
from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError, torch_order
from ._table import Translation, operation

__all__: list[str] = []


@cache
def _of_matrices(template: str) -> Translation:
    def translate(at: Lowering, node: Node, input: Value) -> Placed:
        text = template.format(at.in_torch_order(input))
        return Placed(text, torch_order(len(node.result.shape)))

    return translate


for _name, _template in (
    ("inverse", "jnp.linalg.inv({})"),
    ("linalg.inv", "jnp.linalg.inv({})"),
    ("det", "jnp.linalg.det({})"),
    ("linalg.det", "jnp.linalg.det({})"),
    ("logdet", "jnp.linalg.slogdet({})[1]"),
    ("matrix_exp", "jax.scipy.linalg.expm({})"),
    ("linalg.matrix_exp", "jax.scipy.linalg.expm({})"),
    ("linalg.eigvalsh", "jnp.linalg.eigvalsh({})"),
    ("linalg.svdvals", "jnp.linalg.svd({}, compute_uv=False)"),
):
    operation(_name)(_of_matrices(_template))


@operation("cholesky", "linalg.cholesky")
def cholesky(at: Lowering, node: Node, input: Value, upper: bool = False) -> Placed:
    text = f"jnp.linalg.cholesky({at.in_torch_order(input)}{', upper=True' if upper else ''})"
    return Placed(text, torch_order(len(input.shape)))


@operation("linalg.solve")
def solve(at: Lowering, node: Node, input: Value, B: Value, *, left: bool = True) -> Placed:  # noqa: N803
    if not left or len(B.shape) != len(input.shape):
        raise RefusedError("torch.linalg.solve is translated for A @ X = B with as many axes in A as in B")
    text = f"jnp.linalg.solve({at.in_torch_order(input)}, {at.in_torch_order(B)})"
    return Placed(text, torch_order(len(node.result.shape)))


@operation("linalg.solve_triangular")
def solve_triangular(
    at: Lowering,
    node: Node,
    input: Value,
    B: Value,  # noqa: N803
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Placed:
    if not left or len(B.shape) != len(input.shape):
        raise RefusedError(
            "torch.linalg.solve_triangular is translated for A @ X = B with as many axes in A as in B"
        )
    settings = f"lower={not upper}, unit_diagonal={bool(unitriangular)}"
    text = (
        f"jax.scipy.linalg.solve_triangular({at.in_torch_order(input)}, {at.in_torch_order(B)}, {settings})"
    )
    return Placed(text, torch_order(len(node.result.shape)))


@operation("slogdet", "linalg.slogdet")
def slogdet(at: Lowering, node: Node, input: Value) -> list[Placed]:
    order = torch_order(len(input.shape) - 2)
    return [Placed(f"jnp.linalg.slogdet({at.in_torch_order(input)})[{place}]", order) for place in (0, 1)]


@operation("matrix_power", "linalg.matrix_power")
def matrix_power(at: Lowering, node: Node, input: Value, n: Any) -> Placed:
    text = f"jnp.linalg.matrix_power({at.in_torch_order(input)}, {at.number(n)})"
    return Placed(text, torch_order(len(input.shape)))
