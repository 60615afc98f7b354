"""One network in torch, nnx and linen, whose Flax twins take a mistake in any of the places where one is made."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import to_flax
from torchjax_bridge.weights import Flatten

FLATTEN = (Flatten("fc1", (4, 2, 3)),)


class Net(nn.Module):
    """Everything that is easily set up otherwise in Flax, on one line."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.fc1 = nn.Linear(24, 24)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.bn(self.conv(x)).relu()).flatten(1)
        x = self.drop(nn.functional.gelu(self.fc1(x)))
        return self.head(self.norm(self.fc2(x) + x))


def net() -> Net:
    """The torch network in eval mode, with statistics that are not the initial ones."""
    torch.manual_seed(0)
    module = Net()
    module.bn.running_mean.normal_()
    module.bn.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(module.bn.weight)
    return module.eval()


def image() -> torch.Tensor:
    return torch.randn(4, 3, 8, 12, generator=torch.Generator().manual_seed(1))


exact_gelu = partial(jax.nn.gelu, approximate=False)


@dataclass(frozen=True)
class Setup:
    """How the Flax twin is made; as it stands, it is right."""

    padding: Any = ((1, 1), (1, 1))
    epsilon: float = 1e-5
    momentum: float = 0.9
    train: bool = False
    relu: Callable[[jax.Array], jax.Array] = jax.nn.relu
    pool: Any = ((1, 1), (1, 1))
    front: bool = False
    gelu: Callable[[jax.Array], jax.Array] = exact_gelu
    rate: float = 0.0
    crossed: bool = False
    residual: bool = True
    scale: float = 1.0
    last_epsilon: float = 1e-5

    def forward(self, m: Any, x: jax.Array) -> jax.Array:
        x = ln.max_pool(self.relu(m.bn(m.conv(x))), (3, 3), (2, 2), padding=self.pool)
        if self.front:
            x = x.transpose(0, 3, 1, 2)
        one, other = (m.fc2, m.fc1) if self.crossed else (m.fc1, m.fc2)
        x = m.drop(self.gelu(one(x.reshape(x.shape[0], -1)))) * self.scale
        y = other(x)
        return m.head(m.norm(y + x if self.residual else y))


class NnxNet(nnx.Module):
    def __init__(self, setup: Setup, rngs: nnx.Rngs) -> None:
        self.setup = setup
        self.conv = nnx.Conv(3, 4, (3, 3), strides=2, padding=setup.padding, rngs=rngs)
        self.bn = nnx.BatchNorm(
            4,
            use_running_average=not setup.train,
            epsilon=setup.epsilon,
            momentum=setup.momentum,
            use_fast_variance=False,
            rngs=rngs,
        )
        self.fc1 = nnx.Linear(24, 24, rngs=rngs)
        self.drop = nnx.Dropout(setup.rate or 0.5, deterministic=not setup.rate, rngs=rngs)
        self.fc2 = nnx.Linear(24, 24, rngs=rngs)
        self.norm = nnx.LayerNorm(24, epsilon=setup.last_epsilon, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(24, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.setup.forward(self, x)


class LinenNet(ln.Module):
    settings: Setup

    def setup(self) -> None:
        settings = self.settings
        self.conv = ln.Conv(4, (3, 3), strides=2, padding=settings.padding)
        self.bn = ln.BatchNorm(
            not settings.train,
            epsilon=settings.epsilon,
            momentum=settings.momentum,
            use_fast_variance=False,
        )
        self.fc1 = ln.Dense(24)
        self.drop = ln.Dropout(settings.rate or 0.5, deterministic=not settings.rate)
        self.fc2 = ln.Dense(24)
        self.norm = ln.LayerNorm(epsilon=settings.last_epsilon, use_fast_variance=False)
        self.head = ln.Dense(5)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.settings.forward(self, x)


def twin(flavour: str, module: Net, setup: Setup, rules: Any = FLATTEN) -> Any:
    """The Flax model with the weights of the torch one, as `parity` takes it."""
    if flavour == "nnx":
        return to_flax(module, nnx.eval_shape(lambda: NnxNet(setup, nnx.Rngs(0))), rules=rules)
    linen = LinenNet(setup)
    variables = jax.eval_shape(linen.init, jax.random.key(0), jnp.zeros((1, 8, 12, 3)))
    return linen, to_flax(module, variables, rules=rules)


def weights(model: Any) -> dict[str, Any]:
    """The arrays of either flavour by dotted path; writing to it changes nothing."""
    if isinstance(model, nnx.Module):
        return {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}
    return {
        ".".join(key.key for key in path[1:]): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(model[1])[0]
    }


def with_weights(model: Any, changes: dict[str, Any]) -> Any:
    """The model with some of its arrays replaced."""
    if isinstance(model, nnx.Module):
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            if (name := ".".join(map(str, path))) in changes:
                variable.set_value(jnp.asarray(changes[name]))
        return model
    paths, structure = jax.tree_util.tree_flatten_with_path(model[1])
    leaves = [changes.get(".".join(key.key for key in path[1:]), leaf) for path, leaf in paths]
    return model[0], jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])
