"""The twins of ``torch_nets`` in Flax nnx; images are ``(N, 32, 32, 3)``, logits ``(N, 10)``.

Attributes have torch's names, so weights are paired by name. Settings are torch's and explicit, because Flax's
defaults differ: padding in numbers (``"SAME"`` pads a strided convolution on other sides than torch), and
BatchNorm's momentum, which is 1 minus torch's.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class Net(nnx.Module):
    """The small LeNet-like network."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 6, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
        self.fc1 = nnx.Linear(5 * 5 * 16, 120, rngs=rngs)
        self.fc2 = nnx.Linear(120, 84, rngs=rngs)
        self.fc3 = nnx.Linear(84, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, 32, 32, 3)`` float32 -> ``(N, 10)`` logits."""
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), strides=(2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)  # in the order (row, column, channel), which is not torch's
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return self.fc3(x)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut without parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.conv1 = _conv3x3(in_channels, channels, stride, rngs=rngs)
        self.bn1 = _batch_norm(channels, rngs=rngs)
        self.conv2 = _conv3x3(channels, channels, 1, rngs=rngs)
        self.bn2 = _batch_norm(channels, rngs=rngs)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, I)`` -> ``(N, H / stride, W / stride, O)``."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x[:, :: self.stride, :: self.stride, :]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (self.padding, self.padding)))
        return nnx.relu(y + shortcut)


class ResNet20(nnx.Module):
    """The ResNet-20 of He et al. (2015) for 32x32 images."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv1 = _conv3x3(3, 16, 1, rngs=rngs)
        self.bn1 = _batch_norm(16, rngs=rngs)
        self.layer1 = _stage(16, 16, stride=1, rngs=rngs)
        self.layer2 = _stage(16, 32, stride=2, rngs=rngs)
        self.layer3 = _stage(32, 64, stride=2, rngs=rngs)
        self.linear = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, 32, 32, 3)`` float32 -> ``(N, 10)`` logits."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = block(x)
        return self.linear(x.mean((1, 2)))


def _stage(in_channels: int, channels: int, *, stride: int, rngs: nnx.Rngs) -> nnx.List[BasicBlock]:
    return nnx.List(
        [
            BasicBlock(in_channels, channels, stride, rngs=rngs),
            BasicBlock(channels, channels, 1, rngs=rngs),
            BasicBlock(channels, channels, 1, rngs=rngs),
        ]
    )


def _conv3x3(in_channels: int, channels: int, stride: int, *, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        in_channels,
        channels,
        (3, 3),
        strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        use_bias=False,
        rngs=rngs,
    )


def _batch_norm(channels: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
