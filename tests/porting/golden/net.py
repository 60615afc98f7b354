"""Net of examples.cifar10.torch_nets, in Flax.

Made with torchjax-bridge X from PyTorch X, for Flax X. Images are ``(N, H, W, C)``.
"""

from functools import partial

import jax
from flax import nnx
from flax.nnx import initializers

kernel_init = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Conv = partial(nnx.Conv, padding="VALID", kernel_init=kernel_init)
Linear = partial(nnx.Linear, kernel_init=kernel_init)


class Net(nnx.Module):
    """A small LeNet-like network, known from tutorials: two convolutions, three linear layers."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv1 = Conv(3, 6, (5, 5), rngs=rngs)
        self.conv2 = Conv(6, 16, (5, 5), rngs=rngs)
        self.fc1 = Linear(400, 120, rngs=rngs)
        self.fc2 = Linear(120, 84, rngs=rngs)
        self.fc3 = Linear(84, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, C)``."""
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), strides=(2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return self.fc3(x)
