"""Axes of the inputs: in which two examples differ, and what a condition calls them."""

from collections.abc import Collection, Iterator, Sequence

import torch

from torchjax_bridge._words import listed
from torchjax_bridge.recording import Recording, tensors_of

from ._inputs import Example

__all__ = ["InputAxis", "axes_text", "differing_axes", "larger_in_one"]

InputAxis = tuple[int, int]  # the place of a tensor among all, and its axis


def differing_axes(example: Example, others: Sequence[Example]) -> frozenset[InputAxis]:
    """The axes of which some other example has another size."""
    return frozenset(
        (place, axis)
        for other in others
        for place, (one, two) in enumerate(zip(example.tensors(), other.tensors(), strict=True))
        for axis, size in enumerate(one.shape)
        if two.shape[axis] != size
    )


def larger_in_one(example: Example, larger: Example, axis: InputAxis) -> Example:
    """An example with the size of a larger one along one axis."""
    sizes = [list(tensor.shape) for tensor in example.tensors()]
    tensors = larger.tensors()
    sizes[axis[0]][axis[1]] = tensors[axis[0]].shape[axis[1]]
    known = {id(tensor): tuple(map(slice, own)) for tensor, own in zip(tensors, sizes, strict=True)}
    return larger.mapped(lambda tensor: tensor[known[id(tensor)]])


def axes_text(recording: Recording, example: Example, axes: Collection[InputAxis]) -> str:
    """Inputs for which a port holds that is made for the sizes of some axes: "inputs where ... has ...".

    Args:
        recording: The recording of the module, which has the names of the inputs.
        example: The example.
        axes: The axes, of one tensor at least.
    """
    tensors, names = example.tensors(), dict(_names(recording, example))
    parts = []
    for place in sorted({place for place, _ in axes}):
        own = [str(axis) for other, axis in sorted(axes) if other == place]
        word = "axis" if len(own) == 1 else "axes"
        text = f"{word} {listed(own)} of torch's '{names[id(tensors[place])]}'"
        parts.append(text if len(tensors) > 1 else f"torch's {word} {listed(own)}")
    sizes = [str(tensors[place].shape[axis]) for place, axis in sorted(axes)]
    sizes = sizes[:1] if len(set(sizes)) == 1 else sizes
    has = "has" if len(axes) == 1 else "have"
    return f"inputs where {listed(parts)} {has} the example's size{'s' * (len(sizes) > 1)} of {listed(sizes)}"


def _names(recording: Recording, example: Example) -> Iterator[tuple[int, str]]:
    """The name of each tensor, by its identity: that of its argument, with a number where that holds several."""
    for name, tree in recording.arguments(example.args, example.kwargs).items():
        held = list(tensors_of(tree, torch.Tensor))
        yield from ((id(one), name if len(held) == 1 else f"{name}[{i}]") for i, one in enumerate(held))
