"""The order of flattened features: channels first in torch, channels last in a channels-last model.

The caller says which layers follow a flatten (`Flatten`), and the plan asks.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import prod

from ..layouts import Layout, Permute, Reshape, then
from ._rule import Entry, Layer

__all__ = ["channels_last", "per_feature"]


def channels_last(
    features: tuple[int, ...], *, before: tuple[int, ...] = (), after: tuple[int, ...] = ()
) -> Layout:
    """The layout of one axis that is flattened from ``(C, *space)`` in torch and from ``(*space, C)`` in Flax.

    Args:
        features: The ``(C, *space)``.
        before: The sizes of the axes in front of it.
        after: The sizes of the axes behind it.
    """
    channels, *space = features
    first, rank = len(before), len(features)
    axes = (
        *range(first),
        *range(first + 1, first + rank),
        first,
        *range(first + rank, first + rank + len(after)),
    )
    flat = (*before, prod(features), *after)
    return then(
        Reshape(flat, (*before, channels, *space, *after)),
        Permute(axes),
        Reshape((*before, *space, channels, *after), flat),
    )


def per_feature(entries: Callable[[Layer], Iterable[Entry]]) -> Callable[[Layer], Iterable[Entry]]:
    """Decorate the entries of a layer that keeps one number a feature: flattened features are reordered."""

    def in_order(layer: Layer) -> Iterable[Entry]:
        for entry in entries(layer):
            if layer.features is None or not entry.torch_names:
                yield entry
            else:
                yield replace(entry, layout=then(channels_last(layer.features), entry.layout))

    return in_order
