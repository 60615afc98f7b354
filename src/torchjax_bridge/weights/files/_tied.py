"""Finds the names of one tied tensor that have different values in a file.

A file may hold a tied tensor under each of its names. If the values differ, one of them would be lost (in
``load_state_dict``, all but the last), so such a file is refused.
"""

from collections.abc import Iterator, Mapping

from ..layouts import same_bits
from ._leaf import Leaf

__all__ = ["conflicting_ties"]


def conflicting_ties(leaves: Mapping[str, Leaf], ties: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Every key whose value differs from that of the key that it is tied to, with that key.

    Args:
        leaves: The leaves by torch key. Only tied leaves are read, two at a time.
        ties: For a key, the earlier key of the same tensor.
    """
    for key, first in ties.items():
        one, other = leaves.get(key), leaves.get(first)
        if one is None or other is None or (one.twin or one.name) == (other.twin or other.name):
            continue
        if not same_bits(*(leaf.read().detach().resolve_conj().resolve_neg() for leaf in (one, other))):
            yield key, first
