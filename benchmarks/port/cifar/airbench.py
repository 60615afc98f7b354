"""A net for quick training, like airbench (Jordan, arXiv:2404.00498): whitened patches, scaled logits."""

import torch
import torch.nn.functional as F
from torch import nn


def frozen_norm(channels: int, momentum: float = 0.4, eps: float = 1e-12) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels, eps=eps, momentum=momentum)
    bn.weight.requires_grad_(False)  # stays 1; the bias is trained
    return bn


class DiracConv(nn.Conv2d):
    """A 3x3 convolution that begins as the identity on the channels that it has on both sides."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding="same", bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.dirac_(self.weight.data[: self.in_channels])


class Group(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = DiracConv(channels_in, channels_out)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = frozen_norm(channels_out)
        self.conv2 = DiracConv(channels_out, channels_out)
        self.norm2 = frozen_norm(channels_out)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm1(self.pool(self.conv1(x))))
        return self.act(self.norm2(self.conv2(x)))


class QuickNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (16, 32, 32), scale: float = 1 / 9) -> None:
        super().__init__()
        self.scale = scale
        self.whiten = nn.Conv2d(3, 24, kernel_size=2, padding=0, bias=True)
        self.whiten.weight.requires_grad = False
        channels = [24, *widths]
        self.groups = nn.Sequential(*(Group(a, b) for a, b in zip(channels, widths, strict=False)))
        self.pool = nn.MaxPool2d(3)
        self.head = nn.Linear(widths[-1], 10, bias=False)

    @torch.no_grad()
    def init_whiten(self, images: torch.Tensor, eps: float = 5e-4) -> None:
        """Fill the first kernel with the eigenvectors of the images' patches, and their opposites."""
        patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12)
        patches = patches - patches.mean(0)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        kernels = (vectors / (values + eps).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat((kernels, -kernels)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.whiten(x))
        x = self.pool(self.groups(x))
        x = x.view(len(x), -1)
        return self.head(x) * self.scale


def airbench() -> QuickNet:
    net = QuickNet()
    net.init_whiten(torch.rand(64, 3, 32, 32))
    return net
