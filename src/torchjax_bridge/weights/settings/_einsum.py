"""The equation of an ``Einsum`` that stands for a dense layer.

It says which axis of the kernel is summed over. The rule follows it where it can be read, which is in an nnx
module; in linen's variables it is not, so what the plan took is compared here.
"""

from collections.abc import Iterator

from .._layout import Identity, Layout, Permute
from ..rules import summed_axis
from ._difference import Difference
from ._layer import FlaxLayer

__all__ = ["einsum_differences"]

# The layouts of a Linear's weight (out, in), by the axis of the kernel that its inputs are.
_AXES = {Permute((1, 0)): 0, Identity(): 1}


def einsum_differences(layer: FlaxLayer, layout: Layout | None) -> Iterator[Difference]:
    """Compare an equation with the layout in which the plan fills the kernel."""
    equation, filled = layer["einsum_str"], _AXES.get(layout) if layout else None
    if equation is None or filled is None or summed_axis(equation) == filled:
        return
    entry = 'Entry("weight", "kernel")' if filled == 0 else 'Entry("weight", "kernel", Permute((1, 0)))'
    fix = (
        "an equation such as 'ab,bc->ac'"
        if summed_axis(equation) is None
        else f"an equation that sums over axis {filled}, or rules=[Rule(nn.Linear, [{entry}, ...])]"
    )
    ours = ("the inputs", f"axis {filled} of the kernel")
    yield Difference("einsum_str", *ours, equation, None, "output", fix)
