"""Dual path networks: some channels are added, the others are gathered (Chen et al., arXiv:1707.01629)."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F


class DualPathBlock(nn.Module):
    def __init__(self, last: int, mid: int, out: int, dense: int, stride: int, first: bool) -> None:
        super().__init__()
        self.out = out
        self.dense = dense
        self.conv1 = nn.Conv2d(last, mid, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, kernel_size=3, stride=stride, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, out + dense, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out + dense)

        self.shortcut = nn.Sequential()
        if first:
            self.shortcut = nn.Sequential(
                nn.Conv2d(last, out + dense, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out + dense),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        x = self.shortcut(x)
        d = self.out
        added = x[:, :d, :, :] + y[:, :d, :, :]
        gathered = torch.cat([x[:, d:], y[:, d:]], 1)
        return F.relu(torch.cat([added, gathered], 1))


class DPN(nn.Module):
    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.last = 16
        for i in range(3):
            layer = self._make_layer(**{key: value[i] for key, value in cfg.items()}, stride=1 + (i > 0))
            setattr(self, "layer%d" % (i + 1), layer)  # noqa: UP031
        self.linear = nn.Linear(self.last, 10)

    def _make_layer(self, mid: int, out: int, blocks: int, dense: int, stride: int) -> nn.Sequential:
        layers = []
        for i, s in enumerate([stride] + [1] * (blocks - 1)):
            layers.append(DualPathBlock(self.last, mid, out, dense, s, i == 0))
            self.last = out + (i + 2) * dense
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer1(out)  # type: ignore[operator]
        out = self.layer2(out)  # type: ignore[operator]
        out = self.layer3(out)  # type: ignore[operator]
        out = F.avg_pool2d(out, 8)
        out = out.view(out.size(0), -1)
        out = self.linear(out)
        return out


def dpn() -> DPN:
    return DPN({"mid": (16, 24, 32), "out": (16, 32, 64), "blocks": (2, 2, 2), "dense": (4, 8, 8)})
