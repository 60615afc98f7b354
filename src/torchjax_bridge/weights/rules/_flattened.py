"""The order of flattened features: torch's has the channels first, that of a channels-last model last.

Which layers stand behind a flatten is for the caller to say (`Flatten`) and for the plan to ask.
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
    """The layout of one axis, flattened from ``(C, *space)`` in torch and from ``(*space, C)`` in Flax.

    Args:
        features: The ``(C, *space)``.
        before: The sizes of the axes before the one that is flattened.
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
    """The entries of a layer that keeps one number a feature, where its features were flattened."""

    def in_order(layer: Layer) -> Iterable[Entry]:
        for entry in entries(layer):
            if layer.features is None or not entry.torch_names:
                yield entry
            else:
                yield replace(entry, layout=then(channels_last(layer.features), entry.layout))

    return in_order
