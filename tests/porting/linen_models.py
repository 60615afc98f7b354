"""Small models for ports to linen: together they have every kind of layer, container and tensor."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["MODELS"]


class Block(nn.Module):
    """Two paths, summed."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)) + self.shortcut(x))


class Residual(nn.Module):
    """A residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(Block(3, 4), Block(4, 4), Block(4, 8, 2))
        self.head = nn.Sequential(nn.Dropout(0.25), nn.Linear(8, 5))
        self.scale = nn.Parameter(torch.full((5,), 0.5))
        self.register_buffer("offset", torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.adaptive_avg_pool2d(self.layer(x), 1).flatten(1)
        return self.scale * self.head(x) + self.offset


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, groups=3)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.prelu = nn.PReLU()
        self.channelwise = nn.PReLU(4)
        self.drop = nn.Dropout2d(0.2)
        self.rms = nn.RMSNorm(4)
        self.layer = nn.LayerNorm(4)
        self.axes = nn.LayerNorm((3, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.instance(self.group(self.up(self.conv(x))))
        x = self.drop(self.channelwise(self.prelu(x)))
        x = self.layer(self.rms(x.mean(3).transpose(1, 2)))
        return self.fc(self.axes(x[:, :3]))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(5, 8))
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, batch: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(batch["ids"]) + self.position
        y, _ = self.attention(x, x, x, key_padding_mask=mask, need_weights=False)
        return {"logits": self.head(self.norm(x + y))}


class SharedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(7, 4)
        self.target = nn.Embedding(7, 4)
        self.target.weight = self.source.weight

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.source(a) * self.target(b)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.auxiliary = nn.Linear(4, 2)
        self.calibration = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu(self.stem(x))
        if self.training:
            return self.head(x), self.auxiliary(x)
        return self.calibration(self.head(x))


class NormAct(nn.BatchNorm2d):
    """A norm and its activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return F.relu(x)


class ScaledConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, 2 * self.weight, self.bias)


class Derived(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = ScaledConv(3, 4, 3, bias=False)
        self.norm = NormAct(4)
        self.paths = nn.ModuleDict(
            {"a": nn.Conv2d(4, 4, 1), "b": nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5), nn.Identity())}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        return (self.paths["a"](x) + self.paths["b"](x)).mean((2, 3))


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(4) for _ in range(3)])
        self.nested = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.1)]) for _ in range(2)])
        self.named = nn.Sequential(
            OrderedDict(
                first=nn.Linear(4, 4), act=nn.ReLU(), second=nn.Linear(4, 2), deep=nn.Sequential(nn.Tanh())
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x))
        for layer, drop in self.nested:
            x = x + drop(layer(x))
        return self.named(x)


class DropPath(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.p == 0 or not self.training:
            return x
        kept = torch.rand(x.shape[0], 1) < 1 - self.p
        return x * kept / (1 - self.p)


class Layer(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop = DropPath(p)
        self.gamma = nn.Parameter(1e-6 * torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.gamma * F.dropout(self.fc(x), 0.5, self.training))


class Depth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Layer(p) for p in (0.0, 0.1, 0.2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 4, batch_first=True)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.both(x)
        x, _ = self.gru(x)
        return self.fc(x)


def _images(size: int = 8) -> tuple[torch.Tensor]:
    return (torch.randn(2, 3, size, size),)


def _plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(144, 2)
    )


# By name: what makes the model, and inputs.
MODELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "auxiliary": (Auxiliary, (torch.randn(3, 4),)),
    "depth": (Depth, (torch.randn(3, 4),)),
    "derived": (Derived, _images()),
    "kinds": (Kinds, _images(7)),
    "language": (
        Language,
        ({"ids": torch.randint(11, (2, 5))}, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])),
    ),
    "layer": (lambda: nn.Linear(3, 2), (torch.randn(2, 3),)),
    "lists": (Lists, (torch.randn(16, 4),)),
    "recurrent": (Recurrent, (torch.randn(2, 5, 3),)),
    "residual": (Residual, _images()),
    "sequential": (_plain, _images()),
    "shared_embedding": (SharedEmbedding, (torch.randint(7, (2, 3)), torch.randint(7, (2, 3)))),
}
