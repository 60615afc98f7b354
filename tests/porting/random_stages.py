"""Networks of random stages: lists of random lengths, numbered or not, of blocks with parts that others lack."""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

__all__ = ["random_stages"]

_ACTIVATIONS: list[Callable[[], nn.Module] | None] = [
    nn.ReLU,
    nn.SiLU,
    nn.GELU,
    nn.Tanh,
    nn.Identity,
    lambda: nn.LeakyReLU(0.1),
    None,
]


class Block(nn.Module):
    """A residual block whose list of layers is filled under conditions."""

    def __init__(
        self,
        width: int,
        dim: int,
        activation: Callable[[], nn.Module] | None,
        normed: bool,
        kernel: int,
        drop: float,
        scaled: bool,
        more: int,
        place: int,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm2d(width)] if normed else []
        layers.append(nn.Conv2d(width, dim, kernel, padding=kernel // 2))
        if activation is not None:
            layers.append(activation())
        for _ in range(more):
            layers += [nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim)]
        if drop:
            layers.append(nn.Dropout(drop))
        if scaled:
            inner = width if place == 0 or (place == 1 and normed) else dim
            layers.insert(place, nn.Conv2d(inner, inner, 1))
        self.body = nn.Sequential(*layers)
        self.skip = nn.Conv2d(width, dim, 1) if width != dim else None
        self.gamma = nn.Parameter(torch.rand(dim, 1, 1)) if scaled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if self.gamma is not None:
            y = y * self.gamma
        if self.skip is not None:
            x = self.skip(x)
        return x + y


class Stage(nn.Module):
    """Blocks in a row, in a list or under numbers, and a norm behind them or none."""

    def __init__(self, width: int, dim: int, settings: list[Any], numbered: bool, normed: bool) -> None:
        super().__init__()
        self.numbered, self.normed, self.n = numbered, normed, len(settings)
        blocks = [Block(dim if place else width, dim, *given) for place, given in enumerate(settings)]
        if numbered:
            for place, block in enumerate(blocks):
                setattr(self, f"block{place + 1}", block)
        else:
            self.blocks = nn.ModuleList(blocks)
        if normed:
            self.final = nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.numbered:
            for place in range(self.n):
                x = getattr(self, f"block{place + 1}")(x)
        else:
            for block in self.blocks:
                x = block(x)
        if self.normed:
            x = self.final(x)
        return x


def random_stages(seed: int) -> nn.Module:
    """A network of one to four stages, for images of 3 channels."""
    draw = random.Random(seed)
    torch.manual_seed(seed)

    def settings() -> tuple[Any, ...]:
        return (
            draw.choice(_ACTIVATIONS),
            draw.random() < 0.5,
            draw.choice([1, 3]),
            draw.choice([0.0, 0.0, 0.2]),
            draw.random() < 0.3,
            draw.randint(0, 2),
            draw.randint(0, 1),
        )

    dims = [3, *(draw.choice([4, 6, 8]) for _ in range(draw.randint(1, 4)))]
    numbered, alike, common = draw.random() < 0.4, draw.choice(["all", "rest", "none"]), settings()
    stages = []
    for width, dim in pairwise(dims):
        given = [
            common if alike == "all" or (alike == "rest" and place) else settings()
            for place in range(draw.randint(1, 4))
        ]
        is_numbered = numbered if draw.random() < 0.8 else not numbered
        stages.append(Stage(width, dim, given, is_numbered, draw.random() < 0.5))
    return nn.Sequential(*stages)
