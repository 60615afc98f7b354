"""MLP-Mixer: one MLP over the patches, one over the channels (Tolstikhin et al., arXiv:2105.01601)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    def __init__(self, features: int, expansion: float, dropout: float) -> None:
        super().__init__()
        hidden = int(features * expansion)
        self.fc1 = nn.Linear(features, hidden)
        self.dropout1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, features)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout1(F.gelu(self.fc1(x)))
        return self.dropout2(self.fc2(x))


class TokenMixer(nn.Module):
    def __init__(self, dim: int, patches: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = MLP(patches, 0.5, dropout)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.norm(x)
        x = x.transpose(1, 2)
        x = self.mlp(x)
        x = x.transpose(1, 2)
        return x + residual


class ChannelMixer(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4, dropout)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.mlp(self.norm(x))
        return x + residual


class MixerLayer(nn.Module):
    def __init__(self, dim: int, patches: int, dropout: float) -> None:
        super().__init__()
        self.token_mixer = TokenMixer(dim, patches, dropout)
        self.channel_mixer = ChannelMixer(dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        x = self.channel_mixer(x)
        return x


class MLPMixer(nn.Module):
    def __init__(
        self, patch: int = 4, dim: int = 48, depth: int = 4, num_classes: int = 10, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if 32 % patch:
            raise ValueError("the image is not a whole number of patches")
        patches = (32 // patch) ** 2
        self.patcher = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)
        self.mixers = nn.Sequential(*[MixerLayer(dim, patches, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patcher(x)
        batch, dim, _, _ = patches.shape
        patches = patches.permute(0, 2, 3, 1)
        patches = patches.view(batch, -1, dim)
        embedding = self.norm(self.mixers(patches))
        embedding = torch.mean(embedding, dim=1)
        return self.classifier(embedding)


def mlp_mixer() -> MLPMixer:
    return MLPMixer()
