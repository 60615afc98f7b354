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

__all__ = ["is_blocking"]

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
