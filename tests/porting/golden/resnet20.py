"""ResNet of benchmarks.port.cifar.resnet, in Flax.

Made with torchjax-bridge X from PyTorch X, for Flax X. Images are ``(N, H, W, C)``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers

kernel_init = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Conv = partial(nnx.Conv, padding=1, use_bias=False, kernel_init=kernel_init)
BatchNorm = partial(nnx.BatchNorm, momentum=0.9, use_fast_variance=False)


class Lambda(nnx.Module):
    """Lambda of benchmarks.port.cifar.resnet."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H, W, C)``."""
        return jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (self.size, self.size)))


class BasicBlock(nnx.Module):
    """BasicBlock of benchmarks.port.cifar.resnet."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1, *, rngs: nnx.Rngs) -> None:
        self.conv1 = Conv(in_planes, planes, (3, 3), strides=stride, rngs=rngs)
        self.bn1 = BatchNorm(planes, rngs=rngs)
        self.conv2 = Conv(planes, planes, (3, 3), rngs=rngs)
        self.bn2 = BatchNorm(planes, rngs=rngs)
        self.shortcut = Lambda(in_planes // 2) if stride != 1 or in_planes != planes else nnx.Sequential()

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H, W, C)``."""
        out = nnx.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + self.shortcut(x)
        return nnx.relu(out)


class ResNet(nnx.Module):
    """ResNet of benchmarks.port.cifar.resnet."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv1 = Conv(3, 16, (3, 3), rngs=rngs)
        self.bn1 = BatchNorm(16, rngs=rngs)
        self.layer1 = nnx.Sequential(*[BasicBlock(16, 16, rngs=rngs) for _ in range(3)])
        self.layer2 = nnx.Sequential(
            BasicBlock(16, 32, stride=2, rngs=rngs), *[BasicBlock(32, 32, rngs=rngs) for _ in range(2)]
        )
        self.layer3 = nnx.Sequential(
            BasicBlock(32, 64, stride=2, rngs=rngs), *[BasicBlock(64, 64, rngs=rngs) for _ in range(2)]
        )
        self.linear = nnx.Linear(64, 10, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, C)``."""
        out = nnx.relu(self.bn1(self.conv1(x)))
        out = self.layer1(out)
        out = self.layer2(out)
        out = self.layer3(out)
        out = nnx.avg_pool(out, (out.shape[2], out.shape[2]), strides=(out.shape[2], out.shape[2]))
        out = out.reshape(out.shape[0], -1)
        return self.linear(out)
