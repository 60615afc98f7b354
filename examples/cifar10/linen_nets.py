"""The twins of ``torch_nets`` in Flax linen; images are ``(N, 32, 32, 3)``, logits ``(N, 10)``.

Submodules have the names of torch (a list ``layer1`` in `setup` becomes ``layer1_0``,
``layer1_1``, ...), so weights are paired by name. Settings are torch's, as in ``nnx_nets``.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Net(nn.Module):
    """The small LeNet-like network."""

    def setup(self) -> None:
        """Name the layers as torch does."""
        self.conv1 = nn.Conv(6, (5, 5), padding="VALID")
        self.conv2 = nn.Conv(16, (5, 5), padding="VALID")
        self.fc1 = nn.Dense(120)
        self.fc2 = nn.Dense(84)
        self.fc3 = nn.Dense(10)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, 32, 32, 3)`` float32 -> ``(N, 10)`` logits."""
        x = nn.max_pool(nn.relu(self.conv1(x)), (2, 2), strides=(2, 2))
        x = nn.max_pool(nn.relu(self.conv2(x)), (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)  # in the order (row, column, channel), which is not torch's
        x = nn.relu(self.fc1(x))
        x = nn.relu(self.fc2(x))
        return self.fc3(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters."""

    in_channels: int
    channels: int
    stride: int

    def setup(self) -> None:
        """Name the layers as torch does."""
        self.conv1 = _conv3x3(self.channels, self.stride)
        self.bn1 = _batch_norm()
        self.conv2 = _conv3x3(self.channels, 1)
        self.bn2 = _batch_norm()

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """``(N, H, W, I)`` -> ``(N, H / stride, W / stride, O)``."""
        y = nn.relu(self.bn1(self.conv1(x), use_running_average=not train))
        y = self.bn2(self.conv2(y), use_running_average=not train)
        padding = (self.channels - self.in_channels) // 2
        shortcut = x[:, :: self.stride, :: self.stride, :]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (padding, padding)))
        return nn.relu(y + shortcut)


class ResNet20(nn.Module):
    """The ResNet-20 of He et al. (2015) for 32x32 images."""

    def setup(self) -> None:
        """Name the layers as torch does."""
        self.conv1 = _conv3x3(16, 1)
        self.bn1 = _batch_norm()
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.linear = nn.Dense(10)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """``(N, 32, 32, 3)`` float32 -> ``(N, 10)`` logits."""
        x = nn.relu(self.bn1(self.conv1(x), use_running_average=not train))
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = block(x, train=train)
        return self.linear(x.mean((1, 2)))


def _stage(in_channels: int, channels: int, *, stride: int) -> list[BasicBlock]:
    return [
        BasicBlock(in_channels, channels, stride),
        BasicBlock(channels, channels, 1),
        BasicBlock(channels, channels, 1),
    ]


def _conv3x3(channels: int, stride: int) -> nn.Conv:
    return nn.Conv(channels, (3, 3), strides=(stride, stride), padding=((1, 1), (1, 1)), use_bias=False)


def _batch_norm() -> nn.BatchNorm:
    return nn.BatchNorm(momentum=0.9, epsilon=1e-5, use_fast_variance=False)
