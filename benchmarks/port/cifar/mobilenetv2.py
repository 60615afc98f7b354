"""MobileNetV2: inverted residuals with linear bottlenecks (Sandler et al., arXiv:1801.04381)."""

import torch
import torch.nn.functional as F
from torch import nn


class InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = c_in * expand
        self.expand = expand
        self.residual = stride == 1 and c_in == c_out
        if expand != 1:
            self.pw = nn.Conv2d(c_in, hidden, 1, bias=False)
            self.bn_pw = nn.BatchNorm2d(hidden)
        self.dw = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn_dw = nn.BatchNorm2d(hidden)
        self.linear = nn.Conv2d(hidden, c_out, 1, bias=False)
        self.bn_linear = nn.BatchNorm2d(c_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        if self.expand != 1:
            x = F.relu6(self.bn_pw(self.pw(x)), inplace=True)
        x = F.relu6(self.bn_dw(self.dw(x)), inplace=True)
        x = self.bn_linear(self.linear(x))
        if self.residual:
            x += identity
        return x


class MobileNetV2(nn.Module):
    def __init__(self, width_mult: float = 1.0, num_classes: int = 10) -> None:
        super().__init__()
        settings = [
            # t, c, n, s
            [1, 16, 1, 1],
            [6, 24, 2, 1],
            [6, 32, 2, 2],
            [6, 64, 2, 2],
            [6, 96, 1, 1],
            [6, 160, 2, 2],
        ]
        channels = self._scale(32, width_mult)
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(True)
        )
        self.blocks = []
        for t, c, n, s in settings:
            out = self._scale(c, width_mult)
            for i in range(n):
                self.blocks.append(InvertedResidual(channels, out, s if i == 0 else 1, t))
                channels = out
        self.bottlenecks = nn.Sequential(*self.blocks)
        self.head = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn_head = nn.BatchNorm2d(4 * channels)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(4 * channels, num_classes)

    @staticmethod
    def _scale(channels: int, width_mult: float, divisor: int = 4) -> int:
        return max(divisor, int(channels * width_mult + divisor / 2) // divisor * divisor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.bottlenecks(x)
        x = F.relu6(self.bn_head(self.head(x)))
        x = F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)
        return self.classifier(self.dropout(x))


def mobilenetv2() -> MobileNetV2:
    return MobileNetV2(width_mult=0.25)
