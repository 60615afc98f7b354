"""The equation of an ``Einsum`` that stands for a dense layer.

It shows which axes of the kernel are summed over. An nnx module holds it, and the rule follows it. linen's
variables do not, so the axes that the plan took are checked here against the equation.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from ..layouts import Layout
from ..rules import axes_of_equation, dense_kernel, possible_axes
from ._difference import Difference
from ._layer import FlaxLayer

__all__ = ["einsum_differences"]


def einsum_differences(module: nn.Module, layer: FlaxLayer, layout: Layout | None) -> Iterator[Difference]:
    """Compare the equation with the layout that the plan chose for the kernel."""
    equation, kernel = layer["einsum_str"], layer["kernel_shape"] or layer["shape"]
    weight = getattr(module, "weight", None)
    if equation is None or layout is None or not isinstance(weight, Tensor) or weight.ndim != 2:
        return
    shape, sizes = tuple(weight.shape), tuple(kernel)
    filled = {dense_kernel(shape, sizes, axes): axes.inputs for axes in possible_axes(shape, sizes, None)}
    said = axes_of_equation(equation)
    if layout not in filled or (said is not None and dense_kernel(shape, sizes, said) == layout):
        return
    summed = filled[layout]
    axes = f"axis {summed[0]}" if len(summed) == 1 else f"axes {', '.join(map(str, summed))}"
    entry = 'Entry("weight", "kernel")' if summed == (0,) else 'Entry("weight", "kernel", Permute((1, 0)))'
    rule = f", or rules=[Rule(nn.Linear, [{entry}, ...])]" if len(sizes) == 2 else ""
    fix = "an equation such as 'ab,bc->ac'" if said is None else f"an equation that sums over {axes}{rule}"
    yield Difference("einsum_str", "the inputs", f"{axes} of the kernel", equation, None, "output", fix)
