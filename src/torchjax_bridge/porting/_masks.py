"""Masks that are added to the scores of an attention: which of them are 0 or minus infinity alone.

torch code makes such a mask from constants, and Flax's attention takes booleans. What made it says so, without
its values.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from torchjax_bridge.recording import Constant, Node, Parameter, Value

__all__ = ["is_blocking", "shows_keys"]

# They move elements, or choose among them.
_MOVES = {
    *(
        "triu",
        "tril",
        "to",
        "float",
        "type_as",
        "clone",
        "contiguous",
        "detach",
        "getitem",
        "unsqueeze",
        "squeeze",
    ),
    *("expand", "expand_as", "repeat", "view", "reshape", "transpose", "permute", "repeat_interleave"),
}
_KEEPS_KEYS = {
    "bool",
    "clone",
    "contiguous",
    "expand",
    "repeat",
    "reshape",
    "to",
    "tril",
    "unsqueeze",
    "view",
}
_ZEROS = ("zeros", "zeros_like", "new_zeros", "zero")


def is_blocking(mask: Any, outer: Mapping[Value, Value]) -> bool:
    """Whether every element of a mask, or a number, is 0 or minus infinity.

    Args:
        mask: The mask, or a number.
        outer: What the arguments of modules are where these are called.
    """
    mask = outer.get(mask, mask) if isinstance(mask, Value) else mask
    known = functools.partial(is_blocking, outer=outer)
    if not isinstance(mask, Value):
        return isinstance(mask, int | float) and (mask == 0 or mask == -math.inf)
    origin = mask.origin
    if isinstance(origin, Parameter | Constant):
        tensor = origin.tensor
        return tensor is not None and bool(((tensor == 0) | (tensor == -torch.inf)).all())
    if not isinstance(origin, Node):
        return False
    name, args = origin.function.rpartition(".")[2].strip("_"), origin.args
    if name in _ZEROS:
        return True
    if name in ("full", "new_full", "full_like"):
        return known(origin.kwargs.get("fill_value", args[-1] if len(args) > 1 else None))
    if name in ("masked_fill", "where"):
        chosen = (*args, *origin.kwargs.values())
        return len(chosen) == 3 and all(map(known, (chosen[0 if name == "masked_fill" else 1], chosen[2])))
    if name == "setitem":
        return known(args[0]) and known(args[2])
    return name in _MOVES and bool(args) and known(args[0])


def shows_keys(mask: Value, outer: Mapping[Value, Value]) -> bool:
    """Whether a mask of booleans surely shows a key to each query, as a constant may, or a triangle of ones."""
    mask = outer.get(mask, mask)
    origin = mask.origin
    if isinstance(origin, Parameter | Constant):
        tensor = origin.tensor
        return tensor is not None and not tensor.is_meta and bool(tensor.bool().any(-1).all())
    if not isinstance(origin, Node):
        return False
    name = origin.function.rpartition(".")[2].strip("_")
    if name in ("ones", "ones_like", "new_ones"):
        return True
    whole = name == "getitem" and isinstance(origin.args[1], tuple) and _takes_first_columns(origin.args[1])
    given = origin.args[0] if origin.args else None
    return (name in _KEEPS_KEYS or whole) and isinstance(given, Value) and shows_keys(given, outer)


def _takes_first_columns(index: tuple[Any, ...]) -> bool:
    """Whether an index takes rows and columns of a triangle from the first one on, or adds axes."""
    parts = (item for item in index if item is not None and item is not Ellipsis)
    return all(isinstance(item, slice) and item.start is None and item.step is None for item in parts)
