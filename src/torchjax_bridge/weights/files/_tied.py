"""Whether a file has one value for the names that are one tensor in a torch model.

A file may hold such a tensor under each of its names. Where the values differ, either choice would drop some of
them (``load_state_dict`` lets the last win without a word), so nothing is chosen here.
"""

from collections.abc import Iterator, Mapping

from ..layouts import same_bits
from ._leaf import Leaf

__all__ = ["parted"]


def parted(leaves: Mapping[str, Leaf], ties: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The keys whose values are not those of the key that they are tied to, each with that key.

    Args:
        leaves: By torch key; only those that are there twice are read, two at a time.
        ties: For a key, the earlier one that is the same tensor.
    """
    for key, first in ties.items():
        one, other = leaves.get(key), leaves.get(first)
        if one is None or other is None or (one.twin or one.name) == (other.twin or other.name):
            continue
        if not same_bits(*(leaf.read().detach().resolve_conj().resolve_neg() for leaf in (one, other))):
            yield key, first
