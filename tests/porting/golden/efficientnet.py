"""EfficientNet of benchmarks.port.cifar.efficientnet, in Flax.

Made with torchjax-bridge X from PyTorch X, for Flax X. Images are ``(N, H, W, C)``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers

kernel_init = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Conv = partial(nnx.Conv, kernel_init=kernel_init)
BatchNorm = partial(nnx.BatchNorm, epsilon=0.001, use_fast_variance=False)


class Swish(nnx.Module):
    """Swish of benchmarks.port.cifar.efficientnet."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H, W, C)``."""
        return x * nnx.sigmoid(x)


class MBConv(nnx.Module):
    """MBConv of benchmarks.port.cifar.efficientnet."""

    def __init__(self, cin: int, cout: int, k: int, s: int, expand: int, p: float, *, rngs: nnx.Rngs) -> None:
        self.expand = expand
        self.input_filters = cin
        self.output_filters = cout
        self.stride = s
        self.p = p
        self.rngs = rngs.dropout.fork()
        self.deterministic = False
        if expand != 1:
            self.expand_conv = Conv(cin, cin * expand, (1, 1), padding="VALID", use_bias=False, rngs=rngs)
            self.bn0 = BatchNorm(cin * expand, rngs=rngs)
        self.depthwise_conv = Conv(
            cin * expand,
            cin * expand,
            (k, k),
            strides=s,
            padding=(k - 1) // 2,
            feature_group_count=cin * expand,
            use_bias=False,
            rngs=rngs,
        )
        self.bn1 = BatchNorm(cin * expand, rngs=rngs)
        self.se_reduce = Conv(cin * expand, max(1, cin // 4), (1, 1), padding="VALID", rngs=rngs)
        self.se_expand = Conv(max(1, cin // 4), cin * expand, (1, 1), padding="VALID", rngs=rngs)
        self.project_conv = Conv(cin * expand, cout, (1, 1), padding="VALID", use_bias=False, rngs=rngs)
        self.bn2 = BatchNorm(cout, rngs=rngs)
        self.swish = Swish()

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H, W, C)``."""
        x = self.swish(self.bn0(self.expand_conv(inputs))) if self.expand != 1 else inputs
        x = self.swish(self.bn1(self.depthwise_conv(x)))
        gate = x.mean((1, 2), keepdims=True)
        gate = self.se_expand(self.swish(self.se_reduce(gate)))
        x = nnx.sigmoid(gate) * x
        x = self.bn2(self.project_conv(x))
        if self.stride == 1 and self.input_filters == self.output_filters:
            if not self.deterministic:
                mask = jax.random.uniform(self.rngs(), (x.shape[0], 1, 1, 1), jnp.float32) + (1 - self.p)
                mask = jnp.floor(mask)
                x = x / (1 - self.p) * mask
            x = x + inputs
        return x


class EfficientNet(nnx.Module):
    """EfficientNet of benchmarks.port.cifar.efficientnet."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.conv_stem = Conv(3, 12, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn0 = BatchNorm(12, rngs=rngs)
        self.blocks = nnx.List(
            [
                MBConv(12, 8, 3, 1, 1, 0.0, rngs=rngs),
                MBConv(8, 12, 3, 2, 4, 0.028571428571428574, rngs=rngs),
                MBConv(12, 12, 3, 1, 4, 0.05714285714285715, rngs=rngs),
                MBConv(12, 20, 5, 2, 4, 0.08571428571428573, rngs=rngs),
                MBConv(20, 20, 5, 1, 4, 0.1142857142857143, rngs=rngs),
                MBConv(20, 32, 3, 2, 6, 1 / 7, rngs=rngs),
                MBConv(32, 32, 3, 1, 6, 0.17142857142857146, rngs=rngs),
            ]
        )
        self.conv_head = Conv(32, 128, (1, 1), padding="VALID", use_bias=False, rngs=rngs)
        self.bn1 = BatchNorm(128, rngs=rngs)
        self.fc = nnx.Linear(128, 10, kernel_init=kernel_init, rngs=rngs)
        self.swish = Swish()

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, C)``."""
        bs = x.shape[0]
        x = self.swish(self.bn0(self.conv_stem(x)))
        for block in self.blocks:
            x = block(x)
        x = self.swish(self.bn1(self.conv_head(x)))
        x = x.mean((1, 2), keepdims=True).reshape(bs, -1)
        x = self.dropout(x)
        return self.fc(x)
