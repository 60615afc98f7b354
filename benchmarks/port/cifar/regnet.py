"""RegNetY: stages of grouped bottlenecks with squeeze and excitation (Radosavovic et al., arXiv:2003.13678)."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    group_width: int
    bottleneck_ratio: float = 1.0
    se_ratio: float = 0.0


class SE(nn.Module):
    def __init__(self, w_in: int, w_se: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(w_in, w_se, 1)
        self.fc2 = nn.Conv2d(w_se, w_in, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = x.mean((2, 3), keepdim=True)
        s = self.fc2(F.relu(self.fc1(s)))
        return s.sigmoid() * x


class YBlock(nn.Module):
    def __init__(self, w_in: int, w_out: int, stride: int, config: Config) -> None:
        super().__init__()
        w_b = int(round(w_out * config.bottleneck_ratio))
        self.a = nn.Conv2d(w_in, w_b, 1, bias=False)
        self.a_bn = nn.BatchNorm2d(w_b)
        self.b = nn.Conv2d(w_b, w_b, 3, stride, 1, groups=w_b // config.group_width, bias=False)
        self.b_bn = nn.BatchNorm2d(w_b)
        self.se = SE(w_b, int(round(w_in * config.se_ratio))) if config.se_ratio else None
        self.c = nn.Conv2d(w_b, w_out, 1, bias=False)
        self.c_bn = nn.BatchNorm2d(w_out)
        self.proj_block = w_in != w_out or stride != 1
        if self.proj_block:
            self.proj = nn.Conv2d(w_in, w_out, 1, stride, bias=False)
            self.bn = nn.BatchNorm2d(w_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f_x = F.relu(self.a_bn(self.a(x)))
        f_x = F.relu(self.b_bn(self.b(f_x)))
        if self.se is not None:
            f_x = self.se(f_x)
        f_x = self.c_bn(self.c(f_x))
        x = self.bn(self.proj(x)) + f_x if self.proj_block else x + f_x
        return F.relu(x)


class RegNet(nn.Module):
    def __init__(self, config: Config, num_classes: int = 10) -> None:
        super().__init__()
        w_in = 16
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, w_in, 3, padding=1, bias=False),
                bn=nn.BatchNorm2d(w_in),
                relu=nn.ReLU(inplace=True),
            )
        )
        trunk: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (d, w, s) in enumerate(zip(config.depths, config.widths, config.strides, strict=True)):
            stage: OrderedDict[str, nn.Module] = OrderedDict(
                (f"b{j + 1}", YBlock(w if j else w_in, w, 1 if j else s, config)) for j in range(d)
            )
            trunk[f"s{i + 1}"] = nn.Sequential(stage)
            w_in = w
        self.trunk = nn.Sequential(trunk)
        self.head = nn.Linear(w_in, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(self.stem(x))
        x = F.adaptive_avg_pool2d(x, (1, 1)).flatten(1)
        return self.head(x)


def regnet() -> RegNet:
    return RegNet(Config((1, 1, 2, 1), (16, 24, 40, 72), (1, 1, 2, 2), group_width=8, se_ratio=0.25))
