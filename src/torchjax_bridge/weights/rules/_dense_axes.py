"""Kernels of dense layers with any number of axes: which of them are the inputs, which the outputs.

torch's weight is ``(out, in)``, both flat. A Flax kernel may split each into several axes, as attention does
with its heads: ``(in, heads, head)``. An equation such as ``"BTNH,NHD->BTD"`` shows which axes are summed over.
torch flattens those in the order of the input, and the others in the order of the output. Without an equation,
the inputs of a kernel are adjacent, and shapes show which they are.
"""

from collections.abc import Sequence
from itertools import combinations
from math import prod
from typing import NamedTuple

from ..layouts import Layout, Permute, Reshape, then

__all__ = ["DenseAxes", "axes_of_equation", "dense_kernel", "possible_axes"]


class DenseAxes(NamedTuple):
    """The axes of a kernel, in the order in which torch flattens them."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def axes_of_equation(equation: str) -> DenseAxes | None:
    """The kernel's axes in an einsum of an input and a kernel; None if it is not a dense layer.

    >>> axes_of_equation("BTD,NDH->BTNH")
    DenseAxes(inputs=(1,), outputs=(0, 2))
    """
    operands, arrow, result = equation.replace(" ", "").partition("->")
    given, comma, kernel = operands.partition(",")
    given, result = given.replace("...", ""), result.replace("...", "")
    if not (arrow and comma and kernel.isalpha()):
        return None
    if any(len(set(letters)) < len(letters) for letters in (given, kernel, result)):
        return None
    summed, kept = set(kernel) & set(given), set(kernel) & set(result)
    whole = summed | kept == set(kernel) and not summed & kept
    if not (whole and summed and kept) or (set(given) ^ set(kernel)) != set(result):
        return None
    return DenseAxes(
        tuple(kernel.index(letter) for letter in given if letter in summed),
        tuple(kernel.index(letter) for letter in result if letter in kept),
    )


def possible_axes(
    weight: tuple[int, ...], kernel: tuple[int, ...], bias: tuple[int, ...] | None
) -> list[DenseAxes]:
    """The readings of a kernel with adjacent inputs that give different values, the usual one first.

    Args:
        weight: torch's ``(out, in)``.
        kernel: The shape of the Flax kernel.
        bias: The shape of the Flax bias (the output axes); None where there is none.
    """
    out, width = weight
    found: dict[Layout, DenseAxes] = {}
    for first, end in combinations(range(len(kernel) + 1), 2):
        inputs = tuple(range(first, end))
        axes = DenseAxes(inputs, tuple(axis for axis in range(len(kernel)) if axis not in inputs))
        outputs = tuple(kernel[axis] for axis in axes.outputs)
        fits = prod(outputs) == out and prod(kernel[first:end]) == width
        if fits and outputs and (bias is None or _without_ones(bias) == _without_ones(outputs)):
            found.setdefault(dense_kernel(weight, kernel, axes), axes)
    return list(found.values())


def dense_kernel(weight: tuple[int, ...], kernel: tuple[int, ...], axes: DenseAxes) -> Layout:
    """The layout of a weight ``(out, in)`` as a kernel with these axes; equal layouts give equal values.

    Raises:
        ValueError: The sizes do not fit.
    """
    outputs, inputs = ([axis for axis in side if kernel[axis] > 1] for side in (axes.outputs, axes.inputs))
    sizes = tuple(kernel[axis] for axis in (*outputs, *inputs))
    if tuple(prod(kernel[axis] for axis in side) for side in (axes.outputs, axes.inputs)) != weight:
        raise ValueError(f"{weight} does not divide into a kernel {kernel}")
    order = [(*outputs, *inputs).index(axis) for axis in sorted((*outputs, *inputs))]
    wide = tuple(sizes[place] for place in order)
    return then(
        *([Reshape(weight, sizes)] if sizes != weight else []),
        *([Permute(tuple(order))] if order != sorted(order) else []),
        *([Reshape(wide, kernel)] if wide != kernel else []),
    )


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size > 1]
