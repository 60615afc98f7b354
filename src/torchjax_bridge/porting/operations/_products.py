"""Products of matrices. Operands in another order than torch's are contracted by name of axis, not moved."""

from typing import Any

from torch import nn

from torchjax_bridge.recording import Node, Parameter, Value, tensors_of

from .._layers import call_layer
from .._lowering import Lowering
from .._placed import Placed, RefusedError, torch_order
from ._operands import aligned, operands, remaining
from ._own_layer import is_own_layer
from ._table import Translation, operation

__all__ = ["as_layer", "matmul"]


@operation("matmul", "bmm", "mm", "spmm", "mv", "dot", "vdot", "imatmul")  # torch.mm is torch.spmm
def matmul(at: Lowering, node: Node, input: Value, other: Value) -> Placed:
    ranks = len(input.shape), len(other.shape)
    left, right = at.in_torch_map_order(input), at.in_torch_map_order(other)
    if ranks[1] == 2 and ranks[0] >= 2 and left.order[-1] == ranks[0] - 1:
        return left.with_text(f"({left.text} @ {at.in_torch_order(other)})")
    plain = left.order == torch_order(ranks[0]) and right.order == torch_order(ranks[1])
    same_batch = ranks[0] == ranks[1] and 3 <= ranks[0] <= 6 and input.shape[:-2] == other.shape[:-2]
    if plain or not same_batch:
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


def _product_and_sum(template: str) -> Translation:
    def translate(
        at: Lowering, node: Node, input: Value, first: Value, second: Value, *, beta: Any = 1, alpha: Any = 1
    ) -> Placed:
        product = template.format(at.in_torch_order(first), at.in_torch_order(second))
        scaled = product if alpha == 1 else f"{at.number(alpha)} * {product}"
        order = torch_order(len(node.result.shape))
        if beta == 0:
            return Placed(f"({scaled})", order)
        at.in_torch_map_order(input)
        start = aligned(at, input, order)
        return Placed(f"({start if beta == 1 else f'{at.number(beta)} * {start}'} + {scaled})", order)

    return translate


operation("addmm", "baddbmm", "addmv")(_product_and_sum("({} @ {})"))
operation("addbmm")(_product_and_sum("({} @ {}).sum(0)"))
operation("addr")(_product_and_sum("jnp.outer({}, {})"))


@operation("einsum")
def einsum(at: Lowering, node: Node, equation: Any, *tensors: Any) -> Placed:
    if not isinstance(equation, str):
        raise RefusedError("torch.einsum with lists of axes; write the equation as a string")
    values = list(tensors_of(tensors))
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
        letters = terms.replace(",", "").replace(".", "")
        once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        result = ("..." if "..." in terms else "") + "".join(once)
    text = f"jnp.einsum('{','.join(names)}->{result}', {', '.join(texts)})"
    return Placed(text, torch_order(len(node.result.shape)))


@operation("outer", "ger", "linalg.outer")
def outer(at: Lowering, node: Node, input: Value, other: Value) -> Placed:
    return Placed(f"jnp.outer({at.read(input)}, {at.read(other)})", (0, 1))


def _in_torch_order(function: str) -> Translation:
    def translate(at: Lowering, node: Node, input: Value, other: Value) -> Placed:
        text = f"{function}({at.in_torch_order(input)}, {at.in_torch_order(other)})"
        return Placed(text, torch_order(len(node.result.shape)))

    return translate


for _name in ("inner", "kron"):
    operation(_name)(_in_torch_order(f"jnp.{_name}"))


@operation("cross", "linalg.cross")
def cross(at: Lowering, node: Node, input: Value, other: Value, dim: Any = None) -> Placed:
    if dim is None:  # torch.cross takes the first axis of three elements
        dim = -1 if node.function == "torch.linalg.cross" else input.shape.index(3)
    if len(input.shape) != len(other.shape):
        raise RefusedError(f"{node.function} of tensors with another number of axes; expand them first")
    for value in (input, other):
        at.in_torch_map_order(value)
    (x, y), placed = operands(at, [input, other])
    return placed.with_text(f"jnp.cross({x}, {y}, axis={placed.place(int(dim))})")


@operation("linalg.vecdot")
def vecdot(at: Lowering, node: Node, input: Value, other: Value, dim: Any = -1) -> Placed:
    rank = max(len(input.shape), len(other.shape))
    for value in (input, other):
        at.in_torch_map_order(value)
    (x, y), placed = operands(at, [input, other])
    axis = int(dim) % rank
    return Placed(f"({x} * {y}).sum({placed.place(axis)})", remaining(placed.order, (axis,), keepdim=False))


@operation("tensordot")
def tensordot(at: Lowering, node: Node, a: Value, b: Value, dims: Any = 2) -> Placed:
    if isinstance(dims, Value):
        raise RefusedError("torch.tensordot with a tensor of axes; pass a list")
    text = f"jnp.tensordot({at.in_torch_order(a)}, {at.in_torch_order(b)}, {at.number(dims)})"
    return Placed(text, torch_order(len(node.result.shape)))


@operation("chain_matmul", "linalg.multi_dot")
def chain(at: Lowering, node: Node, *matrices: Any) -> Placed:
    texts = map(at.in_torch_order, tensors_of(matrices))
    return Placed(f"({' @ '.join(texts)})", torch_order(len(node.result.shape)))


@operation("bilinear")
def bilinear(
    at: Lowering, node: Node, input1: Value, input2: Value, weight: Value, bias: Value | None = None
) -> Placed:
    texts = ", ".join(map(at.in_torch_order, (input1, weight, input2)))
    text = f"jnp.einsum('...i,oij,...j->...o', {texts})"
    order = torch_order(len(node.result.shape))
    return Placed(text if bias is None else f"({text} + {at.read(bias)})", order)


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
    if len(weight.shape) != 2:
        raise RefusedError("F.linear with a weight of one axis; write x @ weight")
    placed = at.in_torch_map_order(input)
    order = placed.order if placed.order[-1] == rank - 1 else torch_order(rank)
    if is_own_layer(at, nn.Linear, {}, weight, bias):
        at.model.note_map(at.frame.path, None)
        return Placed(f"super().__call__({at.read(input, order)})", order)
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
