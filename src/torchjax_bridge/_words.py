"""Words of messages: what something is, with its article; several things in a row. Knows nothing of the library."""

import re
from collections.abc import Sequence

__all__ = ["listed", "what_kind"]

# Spoken with a vowel: an int, an ndarray, an RNN, an upsampling; and not: a uint8, a Union.
_VOWEL = re.compile(r"_*([aeio]|nd|nnx|rnn|lstm|mlp|u(?!ni|int|s))", re.IGNORECASE)


def what_kind(thing: object) -> str:
    """The type of something, with its indefinite article.

    >>> what_kind(3), what_kind({}), what_kind([])
    ('an int', 'a dict', 'a list')
    """
    name = type(thing).__name__
    return f"{'an' if _VOWEL.match(name) else 'a'} {name}"


def listed(parts: Sequence[str]) -> str:
    """Several things in a row.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
