"""Which inputs of four axes are images: their channels come last in the port, and everything else is as in torch.

An input that a convolution, a pooling or a norm of maps reads is one. A mask of attention, a cache of keys and
features ``(N, H, W, C)`` are none: where that takes fewer transpositions, they keep torch's order.
"""

import re
from collections.abc import Callable, Iterator

from torch import nn

from torchjax_bridge.recording import Frame, Node, Recording, Value, tensors_of

from ._model import Model
from .operations import table_name

__all__ = ["no_images"]

_LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
# They take features from the last axis, and batches from the first ones.
_FEATURES = {"bmm", "einsum", "layer_norm", "linear", "matmul", "scaled_dot_product_attention"}
_FUNCTIONS = re.compile(
    r"(conv(_transpose)?|\w*_pool|batch_norm|instance_norm|group_norm)\d?d?|interpolate|pad|grid_sample"
)
_TRANSPOSED = re.compile(r"jnp\.(transpose|swapaxes)\(")


def no_images(recording: Recording, translate: Callable[[frozenset[int]], Model]) -> frozenset[int]:
    """The places, among all inputs, of those of four axes that are better left in torch's order.

    Args:
        recording: What the model did.
        translate: What translates it, with these places.
    """
    inputs = [value for _, tree in recording.top.inputs for value in tensors_of(tree)]
    readers = {
        place: list(_readers(recording.top, value))
        for place, value in enumerate(inputs)
        if len(value.shape) == 4 and value.dtype is not None and value.dtype.is_floating_point
    }
    undecided = frozenset(place for place, found in readers.items() if not any(map(_is_map, found)))
    if not undecided:
        return undecided
    calls = [reader for frame in recording.top.walk() for node in frame.nodes if (reader := _reader(node))]
    if any(map(_is_map, calls)):
        features = frozenset(place for place in undecided if any(map(_takes_features, readers[place])))
    else:
        features = undecided if any(map(_takes_features, calls)) else frozenset()
    ways = dict.fromkeys((features, frozenset[int](), undecided))  # the first of equal ones is taken
    return min(ways, key=lambda way: _transpositions(translate(way)))


def _transpositions(model: Model) -> int:
    """How many transpositions the code has; more faults weigh more."""
    texts = (
        text
        for body in model.bodies.values()
        for text in (*(one.text for one in body.statements), body.result)
    )
    return sum(len(_TRANSPOSED.findall(text)) for text in texts) + 1000 * len(model.faults)


def _readers(frame: Frame, value: Value) -> Iterator[nn.Module | str]:
    """What reads a value, inside of modules, too."""
    for node in frame.nodes:
        if value not in tensors_of((node.args, node.kwargs)):
            continue
        if node.frame is None:
            yield _reader(node)
            continue
        for (_, outer), (_, inner) in zip(node.named, node.frame.inputs, strict=False):
            for one, two in zip(tensors_of(outer), tensors_of(inner), strict=False):
                if one is value:
                    yield from _readers(node.frame, two)


def _reader(node: Node) -> nn.Module | str:
    return node.module if node.module is not None else table_name(node.function)


def _takes_features(reader: nn.Module | str) -> bool:
    if isinstance(reader, nn.Module):
        return isinstance(reader, nn.Linear | nn.LayerNorm | nn.MultiheadAttention)
    return reader in _FEATURES


def _is_map(reader: nn.Module | str) -> bool:
    if isinstance(reader, nn.Module):
        return isinstance(reader, _LAYERS)
    return _FUNCTIONS.fullmatch(reader) is not None
