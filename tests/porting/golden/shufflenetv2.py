"""ShuffleNetV2 of benchmarks.port.cifar.shufflenetv2, in Flax.

Made with torchjax-bridge X from PyTorch X, for Flax X. Images are ``(N, H, W, C)``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers

kernel_init = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Conv = partial(nnx.Conv, use_bias=False, kernel_init=kernel_init)
BatchNorm = partial(nnx.BatchNorm, momentum=0.9, use_fast_variance=False)


class DownUnit(nnx.Module):
    """DownUnit of benchmarks.port.cifar.shufflenetv2."""

    def __init__(self, inp: int, mid: int, *, rngs: nnx.Rngs) -> None:
        self.left = nnx.Sequential(
            Conv(inp, inp, (3, 3), strides=2, padding=1, feature_group_count=inp, rngs=rngs),
            BatchNorm(inp, rngs=rngs),
            nnx.Sequential(
                Conv(inp, mid, (1, 1), padding="VALID", rngs=rngs), BatchNorm(mid, rngs=rngs), nnx.relu
            ),
        )
        self.right = nnx.Sequential(
            nnx.Sequential(
                Conv(inp, mid, (1, 1), padding="VALID", rngs=rngs), BatchNorm(mid, rngs=rngs), nnx.relu
            ),
            Conv(mid, mid, (3, 3), strides=2, padding=1, feature_group_count=mid, rngs=rngs),
            BatchNorm(mid, rngs=rngs),
            nnx.Sequential(
                Conv(mid, mid, (1, 1), padding="VALID", rngs=rngs), BatchNorm(mid, rngs=rngs), nnx.relu
            ),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H, W, C)``."""
        y = jnp.concatenate([self.left(x), self.right(x)], axis=-1)
        n, h, w, c = y.shape
        x = y.reshape(n, h, w, 2, c // 2)
        return jnp.swapaxes(x, 3, 4).reshape(n, h, w, -1)


class BasicUnit(nnx.Module):
    """BasicUnit of benchmarks.port.cifar.shufflenetv2."""

    def __init__(self, mid: int, *, rngs: nnx.Rngs) -> None:
        self.size = mid
        self.branch = nnx.Sequential(
            nnx.Sequential(
                Conv(mid, mid, (1, 1), padding="VALID", rngs=rngs), BatchNorm(mid, rngs=rngs), nnx.relu
            ),
            Conv(mid, mid, (3, 3), padding=1, feature_group_count=mid, rngs=rngs),
            BatchNorm(mid, rngs=rngs),
            nnx.Sequential(
                Conv(mid, mid, (1, 1), padding="VALID", rngs=rngs), BatchNorm(mid, rngs=rngs), nnx.relu
            ),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H, W, C)``."""
        left = x[..., : self.size]
        right = x[..., self.size :]
        out = jnp.concatenate([left, self.branch(right)], axis=-1)
        n, h, w, c = out.shape
        x = out.reshape(n, h, w, 2, c // 2)
        return jnp.swapaxes(x, 3, 4).reshape(n, h, w, -1)


class ShuffleNetV2(nnx.Module):
    """ShuffleNetV2 of benchmarks.port.cifar.shufflenetv2."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv1 = Conv(3, 24, (3, 3), padding=1, rngs=rngs)
        self.bn1 = BatchNorm(24, rngs=rngs)
        self.stage2 = nnx.Sequential(DownUnit(24, 12, rngs=rngs), BasicUnit(12, rngs=rngs))
        self.stage3 = nnx.Sequential(
            DownUnit(24, 24, rngs=rngs), *[BasicUnit(24, rngs=rngs) for _ in range(3)]
        )
        self.stage4 = nnx.Sequential(DownUnit(48, 48, rngs=rngs), BasicUnit(48, rngs=rngs))
        self.conv5 = nnx.Sequential(
            Conv(96, 128, (1, 1), padding="VALID", rngs=rngs), BatchNorm(128, rngs=rngs), nnx.relu
        )
        self.fc = nnx.Linear(128, 10, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, C)``."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = self.stage2(x)
        x = self.stage3(x)
        x = self.stage4(x)
        x = self.conv5(x)
        x = jnp.mean(x, axis=(1, 2))
        return self.fc(x)
