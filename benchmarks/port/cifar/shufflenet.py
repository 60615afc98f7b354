"""ShuffleNet: channels are shuffled between grouped 1x1 convolutions (Zhang et al., arXiv:1707.01083)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.size()
        x = x.view(n, self.groups, c // self.groups, h, w)
        return x.permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


class ShuffleUnit(nn.Module):
    def __init__(self, cin: int, cout: int, groups: int, stride: int = 1, first: bool = False) -> None:
        super().__init__()
        self.stride = stride
        if stride == 2:
            cout = cout - cin  # the pooled input brings the rest
        mid = cout // 4
        self.gconv1 = nn.Conv2d(cin, mid, 1, groups=1 if first else groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.shuffle = Shuffle(groups)
        self.dwconv = nn.Conv2d(mid, mid, 3, stride=stride, padding=1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.gconv2 = nn.Conv2d(mid, cout, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(cout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.gconv1(x)))
        out = self.shuffle(out)
        out = self.bn2(self.dwconv(out))
        out = self.bn3(self.gconv2(out))
        if self.stride == 2:
            x = F.avg_pool2d(x, 3, stride=2, padding=1)
            out = torch.cat([x, out], dim=1)
        else:
            out = x + out
        return F.relu(out)


class ShuffleNet(nn.Module):
    def __init__(self, cfg: dict[str, Any], num_classes: int = 10) -> None:
        super().__init__()
        planes, blocks, groups = cfg["planes"], cfg["blocks"], cfg["groups"]
        self.stem = nn.Sequential(
            nn.Conv2d(3, cfg["stem"], 3, padding=1, bias=False), nn.BatchNorm2d(cfg["stem"]), nn.ReLU()
        )
        cin = cfg["stem"]
        self.stages = nn.ModuleList()
        for i in range(len(planes)):
            units = [ShuffleUnit(cin, planes[i], groups, stride=2, first=i == 0)]
            units += [ShuffleUnit(planes[i], planes[i], groups) for _ in range(blocks[i])]
            self.stages.append(nn.Sequential(*units))
            cin = planes[i]
        self.linear = nn.Linear(cin, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = F.avg_pool2d(x, x.size()[2:])
        x = x.view(x.shape[0], -1)
        return self.linear(x)


def shufflenet() -> ShuffleNet:
    return ShuffleNet({"stem": 24, "planes": [48, 96, 192], "blocks": [1, 3, 1], "groups": 3})
