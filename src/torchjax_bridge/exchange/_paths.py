"""The path of a leaf: ``"encoder.0.weight"`` <-> ``("encoder", 0, "weight")``.

The only place where keys are split or joined. Integers are positions (``nn.Sequential``, ``nnx.List``, list
items); everything else is a name. Never raises. `split_path` splits a name that contains a dot, so such a name does
not survive the round trip; torch's ``state_dict`` has the same ambiguity.
"""

from collections.abc import Iterable
from typing import Any

import jax

__all__ = ["Path", "from_jax_keypath", "join_path", "split_path"]

Path = tuple[str | int, ...]


def split_path(key: str) -> Path:
    """Split a dotted key; segments of decimal digits become integers.

    >>> split_path("encoder.0.weight")
    ('encoder', 0, 'weight')
    >>> split_path("")
    ()

    A segment with a leading zero (``"007"``) is a name, so that ``join_path`` restores the key.
    """
    if not key:
        return ()
    return tuple([int(part) if part.isdigit() and _is_index(part) else part for part in key.split(".")])


def join_path(path: Iterable[str | int]) -> str:
    """Join segments with dots; the inverse of `split_path`.

    >>> join_path(("encoder", 0, "weight"))
    'encoder.0.weight'
    """
    return ".".join(str(part) for part in path)


def from_jax_keypath(keypath: tuple[Any, ...]) -> Path:
    """The path of a leaf from the key path that ``jax.tree_util`` gives for it.

    >>> from_jax_keypath((jax.tree_util.DictKey("a"), jax.tree_util.SequenceKey(1)))
    ('a', 1)
    """
    return tuple(_segment(entry) for entry in keypath)


def _is_index(part: str) -> bool:
    """Whether digits are spelled as ``str`` spells an integer."""
    return part.isascii() and (part == "0" or not part.startswith("0"))


def _segment(entry: Any) -> str | int:
    tree_util = jax.tree_util
    if isinstance(entry, tree_util.SequenceKey):
        return int(entry.idx)
    if isinstance(entry, tree_util.DictKey | tree_util.FlattenedIndexKey):
        return entry.key if isinstance(entry.key, str | int) else str(entry.key)
    if isinstance(entry, tree_util.GetAttrKey):
        return str(entry.name)
    return str(entry)
