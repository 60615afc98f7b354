"""The derivative along one direction of the inputs, where the gradient with respect to all of them costs too much.

XLA computes the gradient of a convolution with respect to what it is given with a zero between all steps of its
stride: for patches of 16 pixels, on a CPU, that is minutes. The derivative along a direction costs a forward pass.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from torch import nn

from ._model import Model

__all__ = ["cuts_patches", "slope_along"]

_WIDE = 16  # places that one step passes over


def cuts_patches(model: Model) -> bool:
    """Whether a convolution of the model takes steps so wide that a gradient through it is costly."""
    layers = [model.modules[path] for path in model.called_layers if path not in model.parts]
    return any(
        isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and math.prod(layer.stride) >= _WIDE
        for layer in layers
    )


def slope_along(
    total: Callable[[Any, Any], Any],
    weights: Sequence[Any],
    inputs: Sequence[Any],
    options: dict[str, Any],
) -> tuple[float, list[Any]]:
    """The derivative of a function of weights and inputs along a random direction of all inputs, and the direction.

    Args:
        total: Gives one number.
        weights: Its first argument.
        inputs: Its second argument, arrays of floating-point numbers.
        options: For XLA.
    """
    draw = np.random.default_rng(0)
    along = [jax.numpy.asarray(draw.standard_normal(one.shape), one.dtype) for one in inputs]

    def slope(weights: Any, inputs: Any, along: Any) -> Any:
        return jax.jvp(lambda inputs: total(weights, inputs), (inputs,), (along,))[1]

    given = list(weights), list(inputs), along
    with jax.default_matmul_precision("highest"):
        program = jax.jit(slope).lower(*given).compile(compiler_options=options)
    return float(program(*given)), along
