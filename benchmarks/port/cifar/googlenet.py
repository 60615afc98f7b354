"""GoogLeNet with batch norm, and two 3x3 convolutions for a 5x5 (Szegedy et al., arXiv:1409.4842)."""

from typing import Any

import torch
import torch.nn as nn


class BasicConv2d(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(self.conv(x)))


class Inception(nn.Module):
    def __init__(
        self, in_channels: int, ch1: int, ch3: tuple[int, int], ch5: tuple[int, int], pool: int
    ) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(in_channels, ch1, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv2d(in_channels, ch3[0], kernel_size=1),
            BasicConv2d(ch3[0], ch3[1], kernel_size=3, padding=1),
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(in_channels, ch5[0], kernel_size=1),
            BasicConv2d(ch5[0], ch5[1], kernel_size=3, padding=1),
            BasicConv2d(ch5[1], ch5[1], kernel_size=3, padding=1),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), BasicConv2d(in_channels, pool, kernel_size=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [self.branch1, self.branch2, self.branch3, self.branch4]
        return torch.cat([branch(x) for branch in branches], dim=1)


class GoogLeNet(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.prelayer = BasicConv2d(3, 24, kernel_size=3, padding=1, bias=False)
        self.inception3a = Inception(24, 8, (12, 16), (2, 4), 4)
        self.inception3b = Inception(32, 16, (16, 24), (4, 12), 8)
        self.inception4a = Inception(60, 24, (12, 26), (2, 6), 8)
        self.inception4b = Inception(64, 20, (14, 28), (3, 8), 8)
        self.inception5a = Inception(64, 32, (20, 40), (4, 16), 16)
        # ceil mode: the maps are 32, 16, 8 here
        self.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout2d(p=0.4)
        self.linear = nn.Linear(104, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.prelayer(x)
        x = self.inception3a(x)
        x = self.inception3b(x)
        x = self.maxpool(x)
        x = self.inception4a(x)
        x = self.inception4b(x)
        x = self.maxpool(x)
        x = self.inception5a(x)
        x = self.avgpool(x)
        x = self.dropout(x)
        x = x.view(x.size()[0], -1)
        x = self.linear(x)
        return x


def googlenet() -> GoogLeNet:
    return GoogLeNet()
