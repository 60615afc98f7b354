"""Runs both models on the same inputs and compares what they give.

A port takes images channels last, and gives maps so: floating-point tensors of four axes cross as
``(N, H, W, C)``, everything else as it lies. Integers of 64 bits are token ids here, and become 32.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from torchjax_bridge import to_jax

__all__ = ["DifferentOutputsError", "as_flax", "difference", "leaves"]


class DifferentOutputsError(Exception):
    """The outputs differ in number or shape, so that no difference can be formed."""


def as_flax(value: Any) -> Any:
    """An input of torch as the port takes it."""
    if not isinstance(value, torch.Tensor):
        return value
    return to_jax(_channels_last(value.int() if value.dtype == torch.int64 else value), copy=True)


def difference(expected: Any, found: Any) -> float:
    """The largest difference over all outputs, each relative to the largest value of torch's.

    Args:
        expected: What torch gave, in torch's layout.
        found: What the port gave.

    Raises:
        DifferentOutputsError: Another number of outputs, or other shapes.
    """
    want = [_channels_last(one.detach()).numpy() for one in leaves(expected)]
    got = [np.asarray(one) for one in leaves(found)]
    shapes = [one.shape for one in want], [one.shape for one in got]
    if shapes[0] != shapes[1]:
        raise DifferentOutputsError(f"torch gives {shapes[0]}, the port {shapes[1]}")
    return max(_relative(a, b) for a, b in zip(want, got, strict=True))


def _relative(want: Any, got: Any) -> float:
    if not np.isfinite(got).all():
        return float("inf")
    scale = float(np.abs(want).max()) or 1.0
    return float(np.abs(want.astype(np.float64) - got.astype(np.float64)).max()) / scale


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim == 4 and tensor.is_floating_point():
        return tensor.permute(0, 2, 3, 1).contiguous()
    return tensor


def leaves(value: Any) -> Iterator[Any]:
    """The arrays of an output in an order that both frameworks share: fields of a mapping by name."""
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield from leaves(value[name])
    elif isinstance(value, tuple | list):
        for one in value:
            yield from leaves(one)
    elif value is not None:
        yield value
