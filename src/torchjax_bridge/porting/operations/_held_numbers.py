"""Sizes that torch code holds in tensors of one element: ``torch.tensor(x.shape[1]) - 1`` for a number."""

import operator
from collections.abc import Callable
from typing import Any

import torch

from torchjax_bridge.recording import Node, Parameter, Value

from ._table import last_name

__all__ = ["held_number"]

_COMPUTE: dict[str, Callable[..., Any]] = {
    "tensor": lambda number: number,
    "add": operator.add,
    "radd": operator.add,
    "sub": operator.sub,
    "rsub": lambda left, right: right - left,
    "mul": operator.mul,
    "rmul": operator.mul,
    "floor_divide": operator.floordiv,
    "floordiv": operator.floordiv,
    "div": operator.floordiv,
}
_ROUNDED = {"rounding_mode": "floor"}, {"rounding_mode": "trunc"}  # alike for sizes


def held_number(item: Any) -> Any:
    """The number that a tensor holds, with its origin; whatever else it is, as it is.

    A buffer that no ``state_dict`` holds is a number that stays.
    """
    if not isinstance(item, Value) or item.shape:
        return item
    if isinstance(item.origin, Parameter) and not item.origin.is_saved:
        tensor = item.origin.tensor
        is_whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta)
        return int(tensor) if is_whole and tensor.dtype != torch.bool else item
    if not isinstance(item.origin, Node):
        return item
    name = last_name(item.origin) if item.origin.function else ""
    numbers = [held_number(arg) for arg in item.origin.args]
    if name not in _COMPUTE or not all(type(one) is not bool and isinstance(one, int) for one in numbers):
        return item
    kwargs = {key: given for key, given in item.origin.kwargs.items() if key != "device"}
    fits = kwargs in _ROUNDED and min(numbers) >= 0 if name == "div" else not kwargs
    return _COMPUTE[name](*numbers) if fits else item
