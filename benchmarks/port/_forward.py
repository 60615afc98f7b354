"""Runs both models on the same inputs and compares what they give.

A port takes images channels last, and gives maps so: floating-point tensors of four axes cross as
``(N, H, W, C)``, everything else as it lies. Integers of 64 bits are token ids here, and become 32.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import to_jax

__all__ = ["DifferentOutputsError", "as_flax", "difference", "in_float64", "is_float64", "leaves"]


class DifferentOutputsError(Exception):
    """The outputs differ in number or shape, so that no difference can be formed."""


def as_flax(inputs: tuple[Any, ...]) -> list[Any]:
    """The inputs of torch as the port takes them: without those that are None."""
    return [_as_flax(one) for one in inputs if one is not None]


def _as_flax(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return to_jax(_channels_last(value.int() if value.dtype == torch.int64 else value), copy=True)


def is_float64(value: Any) -> bool:
    """Whether a value is a tensor of float64."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


def in_float64(
    module: nn.Module, model: nnx.Module, inputs: tuple[Any, ...]
) -> tuple[nn.Module, nnx.Module, tuple[Any, ...]]:
    """Copies of both models and of torch's inputs in float64, where a difference is none of rounding."""
    double = copy.deepcopy(module).double()
    double.train().train(module.training)  # what was computed for evaluation is dropped in training mode
    graph, state = nnx.split(model)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda one: one.astype("float64") if jnp.issubdtype(one.dtype, jnp.floating) else one, state
        )
        return double, nnx.merge(graph, wide), tuple(map(_double, inputs))


def _double(value: Any) -> Any:
    is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_real else value


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
