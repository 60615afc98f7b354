"""Products of matrices. Operands in another order than torch's are contracted by name of axis, not moved."""

from typing import Any

from torch import nn

from torchjax_bridge.recording import Node, Parameter, Value

from .._layers import call_layer
from .._lowering import Lowering
from .._placed import Placed, RefusedError, torch_order
from ._elementwise import aligned
from ._table import operation

__all__ = ["as_layer"]


@operation("matmul", "bmm", "mm", "mv", "dot", "imatmul")
def matmul(at: Lowering, node: Node, input: Value, other: Value, *, out: None = None) -> Placed:
    ranks = len(input.shape), len(other.shape)
    left, right = at.in_torch_map_order(input), at.in_torch_map_order(other)
    if ranks[1] == 2 and ranks[0] >= 2 and left.order[-1] == ranks[0] - 1:
        return left.with_text(f"({left.text} @ {at.in_torch_order(other)})")
    plain = left.order == torch_order(ranks[0]) and right.order == torch_order(ranks[1])
    if plain or ranks[0] != ranks[1] or ranks[0] < 3 or input.shape[:-2] != other.shape[:-2]:
        text = f"({at.in_torch_order(input)} @ {at.in_torch_order(other)})"
        return Placed(text, torch_order(len(node.result.shape)))
    lead = "bhgj"[: ranks[0] - 2]
    names = [f"{lead}qd", f"{lead}dk", f"{lead}qk"]
    # A product with the values of an attention gives back their layout; the scores stay in torch's order.
    keeps = right.order[-1] == ranks[1] - 1 and left.order == torch_order(ranks[0])
    order = right.order if keeps else torch_order(ranks[0])
    equation = [
        "".join(letters[axis] for axis in axes)
        for letters, axes in zip(names, (left.order, right.order, order), strict=True)
    ]
    text = f"jnp.einsum('{equation[0]},{equation[1]}->{equation[2]}', {left.text}, {right.text})"
    return Placed(text, order)


@operation("rmatmul")
def matmul_reflected(at: Lowering, node: Node, input: Value, other: Value) -> Placed:
    return matmul(at, node, other, input)


@operation("addmm", "baddbmm", "addbmm")
def addmm(
    at: Lowering, node: Node, input: Value, mat1: Value, mat2: Value, *, beta: Any = 1, alpha: Any = 1
) -> Placed:
    if node.function.endswith("addbmm"):
        raise RefusedError(f"no translation of {node.function}")
    product = f"{at.in_torch_order(mat1)} @ {at.in_torch_order(mat2)}"
    scaled = product if alpha == 1 else f"{at.number(alpha)} * ({product})"
    order = torch_order(len(node.result.shape))
    if beta == 0:
        return Placed(f"({scaled})", order)
    start = aligned(at, input, order) if beta == 1 else f"{at.number(beta)} * {aligned(at, input, order)}"
    return Placed(f"({start} + {scaled})", order)


@operation("einsum")
def einsum(at: Lowering, node: Node, equation: str, *operands: Any) -> Placed:
    values = (
        list(operands[0]) if len(operands) == 1 and isinstance(operands[0], tuple | list) else list(operands)
    )
    terms, arrow, result = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    texts = []
    for place, value in enumerate(values):
        placed = at.in_torch_map_order(value)
        if "..." in names[place]:
            texts.append(at.in_torch_order(value))
        else:
            names[place] = "".join(names[place][axis] for axis in placed.order)
            texts.append(placed.text)
    if not arrow:
        letters = terms.replace(",", "")
        result = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    text = f"jnp.einsum('{','.join(names)}->{result}', {', '.join(texts)})"
    return Placed(text, torch_order(len(node.result.shape)))


@operation("outer")
def outer(at: Lowering, node: Node, input: Value, vec2: Value) -> Placed:
    return Placed(f"jnp.outer({at.read(input)}, {at.read(vec2)})", (0, 1))


@operation("linear")
def linear(
    at: Lowering, node: Node, input: Value, weight: Value, bias: Value | None = None
) -> Placed | list[Placed]:
    layer = as_layer(at, nn.Linear, weight, bias)
    if layer is not None:
        path, owner = layer
        called = Node((input,), {}, node.source, node.result, module=owner, path=path)
        return call_layer(at, called)
    rank = len(input.shape)
    placed = at.in_torch_map_order(input)
    order = placed.order if placed.order[-1] == rank - 1 else torch_order(rank)
    product = f"{at.read(input, order)} @ {at.read(weight, (1, 0))}"
    return Placed(f"({product}{'' if bias is None else f' + {at.read(bias)}'})", order)


def as_layer(
    at: Lowering, kind: type[nn.Module], weight: Value, bias: Value | None
) -> tuple[str, nn.Module] | None:
    """The layer whose own tensors a function is called with, and its path."""
    if not isinstance(weight.origin, Parameter):
        return None
    owner, path = weight.origin.owner, weight.origin.path.rpartition(".")[0]
    own_bias = isinstance(bias, Value) and isinstance(bias.origin, Parameter) and bias.origin.owner is owner
    matches = isinstance(owner, kind) and (own_bias or (bias is None and owner.bias is None))
    if not matches or path == at.frame.path or not at.model.is_layer(path):
        return None
    if at.frame.path and not path.startswith(at.frame.path + "."):
        return None
    at.model.called_layers.add(path)
    return path, owner
