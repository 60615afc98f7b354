"""One small convolutional network in torch, nnx and linen, for the tests of `weights`."""

import flax.linen as ln
import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

IMAGE = (1, 8, 8, 3)


class Block(nn.Module):
    """Two convolutions of equal shape, told apart by their names alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


class Net(nn.Module):
    """A stem, two equal blocks, a head behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.pool = nn.MaxPool2d(4)
        self.fc1 = nn.Linear(4 * 2 * 2, 6)
        self.fc2 = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.blocks(self.stem(x)))
        return self.fc2(self.fc1(x.flatten(1)).relu())


def net(seed: int = 0) -> Net:
    """The torch network in eval mode, with statistics that are not the initial ones."""
    torch.manual_seed(seed)
    module = Net()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
            layer.num_batches_tracked.fill_(7)
    return module.eval()


class NnxBlock(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        conv = {"kernel_size": (3, 3), "padding": ((1, 1), (1, 1)), "use_bias": False, "rngs": rngs}
        norm = {"use_running_average": True, "epsilon": 1e-5, "momentum": 0.9, "rngs": rngs}
        self.conv1 = nnx.Conv(width, width, **conv)
        self.bn1 = nnx.BatchNorm(width, **norm)
        self.conv2 = nnx.Conv(width, width, **conv)
        self.bn2 = nnx.BatchNorm(width, **norm)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 4, (3, 3), padding=((1, 1), (1, 1)), rngs=rngs)
        self.blocks = nnx.List([NnxBlock(4, rngs), NnxBlock(4, rngs)])
        self.fc1 = nnx.Linear(16, 6, rngs=rngs)
        self.fc2 = nnx.Linear(6, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = nnx.max_pool(x, (4, 4), (4, 4))
        return self.fc2(self.dropout(nnx.relu(self.fc1(x.reshape(x.shape[0], -1)))))


class LinenBlock(ln.Module):
    width: int

    @ln.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(name: str) -> ln.Conv:
            return ln.Conv(self.width, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, name=name)

        def norm(name: str) -> ln.BatchNorm:
            return ln.BatchNorm(use_running_average=True, epsilon=1e-5, name=name)

        return x + norm("bn2")(conv("conv2")(ln.relu(norm("bn1")(conv("conv1")(x)))))


class LinenNet(ln.Module):
    def setup(self) -> None:
        self.stem = ln.Conv(4, (3, 3), padding=((1, 1), (1, 1)))
        self.blocks = [LinenBlock(4), LinenBlock(4)]
        self.fc1 = ln.Dense(6)
        self.fc2 = ln.Dense(5)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = ln.max_pool(x, (4, 4), (4, 4))
        return self.fc2(ln.relu(self.fc1(x.reshape(x.shape[0], -1))))


def nnx_net() -> NnxNet:
    return NnxNet(nnx.Rngs(0))


def abstract_nnx_net() -> NnxNet:
    return nnx.eval_shape(nnx_net)


def linen_variables() -> dict:
    return LinenNet().init(jax.random.key(0), jnp.zeros(IMAGE))


def abstract_linen_variables() -> dict:
    return jax.eval_shape(LinenNet().init, jax.random.key(0), jnp.zeros(IMAGE))
