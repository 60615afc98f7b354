"""Residual of linen_models, in Flax.

Made with torchjax-bridge 0.1.0 from PyTorch 2.13.0, for Flax 0.12.8. Images have their channels last:
``(N, H, W, C)``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from flax.linen import initializers

kernel_init = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Conv = partial(nn.Conv, kernel_init=kernel_init)
BatchNorm = partial(nn.BatchNorm, momentum=0.9, use_fast_variance=False)


class ModeSequential(nn.Module):
    """Layers in order, each told whether the model trains."""

    layers: Sequence[Callable[..., Any]]

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The result of the last layer."""
        for layer in self.layers:
            if isinstance(layer, nn.BatchNorm):
                x = layer(x, use_running_average=not train)
            elif isinstance(layer, nn.Dropout):
                x = layer(x, deterministic=not train)
            elif isinstance(layer, Block):
                x = layer(x, train=train)
            else:
                x = layer(x)
        return x


class Block(nn.Module):
    """Two paths, summed."""

    features: int
    stride: int = 1
    has_shortcut: bool = False

    def setup(self) -> None:
        """Make the layers."""
        self.conv = Conv(self.features, (3, 3), strides=self.stride, padding=1, use_bias=False)
        self.bn = BatchNorm()
        self.shortcut = (
            ModeSequential([Conv(self.features, (1, 1), strides=self.stride, padding="VALID"), BatchNorm()])
            if self.has_shortcut
            else ModeSequential([])
        )

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H, W, C)``."""
        return nn.relu(self.bn(self.conv(x), use_running_average=not train) + self.shortcut(x, train=train))


class Residual(nn.Module):
    """A residual network."""

    def setup(self) -> None:
        """Make the layers."""
        self.layer = ModeSequential(
            [Block(4, has_shortcut=True), Block(4), Block(8, stride=2, has_shortcut=True)]
        )
        self.head = ModeSequential([nn.Dropout(0.25), nn.Dense(5, kernel_init=kernel_init)])
        self.scale = self.param("scale", initializers.constant(0.5), (5,))
        self.offset = self.variable(
            "buffers", "offset", lambda: jax.random.normal(self.make_rng("params"), (5,))
        )

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, C)``."""
        x = self.layer(x, train=train).mean((1, 2), keepdims=True)
        x = x.reshape(x.shape[0], -1)
        return self.scale * self.head(x, train=train) + self.offset.value
