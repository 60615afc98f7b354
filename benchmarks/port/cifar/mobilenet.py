"""MobileNet: depthwise, then pointwise convolutions, one after the other (Howard et al., arXiv:1704.04861)."""

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn(inp: int, oup: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inp, oup, 3, stride, 1, bias=False), nn.BatchNorm2d(oup), nn.ReLU(inplace=True)
    )


def conv_dw(inp: int, oup: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        # dw
        nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False),
        nn.BatchNorm2d(inp),
        nn.ReLU(inplace=True),
        # pw
        nn.Conv2d(inp, oup, 1, 1, 0, bias=False),
        nn.BatchNorm2d(oup),
        nn.ReLU(inplace=True),
    )


class MobileNet(nn.Module):
    # (channels, stride) or channels alone, with stride 1
    cfg = (16, (32, 2), 32, (64, 2), 64, (96, 2), 96, 96)

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers = [conv_bn(3, 8, 1)]
        inp = 8
        for entry in self.cfg:
            oup, stride = (entry, 1) if isinstance(entry, int) else entry
            layers.append(conv_dw(inp, oup, stride))
            inp = oup
        self.model = nn.Sequential(*layers)
        self.out_channels = inp
        self.fc = nn.Linear(inp, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.model(x)
        x = F.avg_pool2d(x, 4)
        x = x.view(-1, self.out_channels)
        x = self.fc(x)
        return x


def mobilenet() -> MobileNet:
    return MobileNet()
