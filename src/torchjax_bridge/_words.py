"""Words of messages: what something is, with its article. Knows nothing of the library."""

import re

__all__ = ["what_kind"]

# Spoken with a vowel: an int, an ndarray, an RNN, an upsampling; and not: a uint8, a Union.
_VOWEL = re.compile(r"_*([aeio]|nd|nnx|rnn|lstm|mlp|u(?!ni|int|s))", re.IGNORECASE)


def what_kind(thing: object) -> str:
    """The type of something, with its indefinite article.

    >>> what_kind(3), what_kind({}), what_kind([])
    ('an int', 'a dict', 'a list')
    """
    name = type(thing).__name__
    return f"{'an' if _VOWEL.match(name) else 'a'} {name}"
