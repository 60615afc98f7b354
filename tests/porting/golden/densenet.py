"""DenseNet of benchmarks.port.cifar.densenet, in Flax.

Made with torchjax-bridge X from PyTorch X, for Flax X. Images are ``(N, H, W, C)``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers

kernel_init = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
BatchNorm = partial(nnx.BatchNorm, momentum=0.9, use_fast_variance=False)
Conv = partial(nnx.Conv, use_bias=False, kernel_init=kernel_init)


class DenseLayer(nnx.Module):
    """DenseLayer of benchmarks.port.cifar.densenet."""

    def __init__(self, num_input: int, *, rngs: nnx.Rngs) -> None:
        self.norm1 = BatchNorm(num_input, rngs=rngs)
        self.conv1 = Conv(num_input, 24, (1, 1), padding="VALID", rngs=rngs)
        self.norm2 = BatchNorm(24, rngs=rngs)
        self.conv2 = Conv(24, 6, (3, 3), padding=1, rngs=rngs)

    def __call__(self, inputs: list[jax.Array]) -> jax.Array:
        """A list of ``(N, H, W, C)`` to ``(N, H, W, C)``."""
        x = jnp.concatenate(inputs, axis=-1)
        x = self.conv1(nnx.relu(self.norm1(x)))
        return self.conv2(nnx.relu(self.norm2(x)))


class DenseBlock(nnx.Module):
    """DenseBlock of benchmarks.port.cifar.densenet."""

    def __init__(self, num_input: int, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([DenseLayer(num_input + 6 * i, rngs=rngs) for i in range(3)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H, W, C)``."""
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return jnp.concatenate(features, axis=-1)


class DenseNet(nnx.Module):
    """DenseNet of benchmarks.port.cifar.densenet."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv0 = Conv(3, 12, (3, 3), padding=1, rngs=rngs)
        self.features = nnx.Sequential(
            DenseBlock(12, rngs=rngs),
            nnx.Sequential(
                BatchNorm(30, rngs=rngs),
                nnx.relu,
                Conv(30, 15, (1, 1), padding="VALID", rngs=rngs),
                lambda x: nnx.avg_pool(x, (2, 2), strides=(2, 2)),
            ),
            DenseBlock(15, rngs=rngs),
            nnx.Sequential(
                BatchNorm(33, rngs=rngs),
                nnx.relu,
                Conv(33, 16, (1, 1), padding="VALID", rngs=rngs),
                lambda x: nnx.avg_pool(x, (2, 2), strides=(2, 2)),
            ),
            DenseBlock(16, rngs=rngs),
        )
        self.norm = BatchNorm(34, rngs=rngs)
        self.classifier = nnx.Linear(34, 10, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, C)``."""
        features = self.features(self.conv0(x))
        out = nnx.relu(self.norm(features))
        out = out.mean((1, 2), keepdims=True)
        out = out.reshape(out.shape[0], -1)
        return self.classifier(out)
