"""Names of the author's that the emitted file needs itself get an underscore, and everything else stays."""

from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchjax_bridge import port
from torchjax_bridge.errors import PortError


class Inner(nn.Module):
    """Layers, a parameter, a buffer, a number and arguments with names of Flax, of Python and of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.sow, self.rngs, self.plain = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.add_module("class", nn.Linear(3, 3))
        self.deterministic = nn.Parameter(torch.rand(3))
        self.register_buffer("variables", torch.rand(3))
        self.train_scale, self.path = 2.0, 3.0

    def forward(self, jnp: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
        clamp = F.leaky_relu(self.sow(jnp)).clamp(min=0.1)
        nnx = getattr(self, "class")(clamp) * self.path
        return (
            self.plain(nnx).relu() * self.deterministic + self.rngs(train) * self.variables * self.train_scale
        )


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.jax = Inner()

    def forward(self, jax: torch.Tensor, *, range: torch.Tensor) -> torch.Tensor:
        return self.jax(train=jax, jnp=range)


@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_a_name_that_the_file_needs_gets_an_underscore(to: Literal["nnx", "linen"]) -> None:
    ported = port(Outer(), torch.randn(2, 3), kwargs={"range": torch.randn(2, 3)}, to=to)  # which is proved
    assert "self.sow_(jnp_)" in ported.source
    assert "def __call__(self, jax_: jax.Array, range_: jax.Array)" in ported.source
    assert "self.plain(" in ported.source


class Inverted(nn.Module):
    def forward(self, X: torch.Tensor) -> torch.Tensor:
        X = X * 2
        return X.exp() + X


def test_arguments_are_lower_case() -> None:
    source = port(nn.Sequential(Inverted(), nn.Linear(3, 3)), torch.randn(2, 3)).source
    assert "def __call__(self, x: jax.Array)" in source


class Angles(nn.Module):
    """XCiT's: sizes, and a list of tensors, come in under names that are no lower case or reserved."""

    def forward(self, H: int, W: int, list: list[torch.Tensor]) -> torch.Tensor:
        x = torch.arange(1, W + 1).repeat(H, 1)
        return torch.cat(list, 1).sum((1, 2))[:, None, None] + x / W


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.angles = nn.Conv2d(3, 4, 1), Angles()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x.mean(1) + self.angles(x.shape[2], x.shape[3], [x, x * 2])


@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_sizes_and_lists_are_read_under_the_names_of_the_port(to: Literal["nnx", "linen"]) -> None:
    source = port(Sized(), torch.randn(2, 3, 4, 5), to=to).source
    assert "def __call__(self, h: int, w: int, list_: list[jax.Array])" in source
    assert "jnp.arange(1, w + 1, dtype=jnp.int32)" in source
    assert "jnp.concatenate(list_," in source


class Alike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, q: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
        return self.linear(q) + Q


def test_arguments_that_differ_in_case_alone_are_refused() -> None:
    with pytest.raises(PortError, match="q and Q would have one name in the port; rename one"):
        port(Alike(), torch.randn(2, 3), torch.randn(2, 3))
