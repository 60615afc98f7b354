"""Cells that a search found, of separable convolutions and pools (PNASNet: Liu et al., arXiv:1712.00559)."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class SeparableConv(nn.Module):
    def __init__(self, in_planes: int, out_planes: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        # depthwise with a multiplier
        self.conv = nn.Conv2d(
            in_planes, out_planes, kernel_size, stride, padding=padding, groups=in_planes, bias=False
        )
        self.bn = nn.BatchNorm2d(out_planes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


class MaxPoolConv(nn.Module):
    def __init__(self, in_planes: int, out_planes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv: nn.Conv2d | None = None
        if in_planes != out_planes:
            self.conv = nn.Conv2d(in_planes, out_planes, 1, bias=False)
            self.bn = nn.BatchNorm2d(out_planes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d(x, kernel_size=3, stride=self.stride, padding=1)
        if self.conv is not None:
            y = self.bn(self.conv(y))
        return y


class CellA(nn.Module):
    def __init__(self, in_planes: int, out_planes: int, stride: int = 1) -> None:
        super().__init__()
        self.sep = SeparableConv(in_planes, out_planes, kernel_size=7, stride=stride)
        self.pool = MaxPoolConv(in_planes, out_planes, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.sep(x) + self.pool(x))


class CellB(nn.Module):
    def __init__(self, in_planes: int, out_planes: int, stride: int = 1) -> None:
        super().__init__()
        # left
        self.sep7 = SeparableConv(in_planes, out_planes, kernel_size=7, stride=stride)
        self.sep3 = SeparableConv(in_planes, out_planes, kernel_size=3, stride=stride)
        # right
        self.sep5 = SeparableConv(in_planes, out_planes, kernel_size=5, stride=stride)
        self.pool = MaxPoolConv(in_planes, out_planes, stride)
        # and together
        self.reduce = nn.Conv2d(2 * out_planes, out_planes, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(out_planes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b1 = F.relu(self.sep7(x) + self.sep3(x))
        b2 = F.relu(self.pool(x) + self.sep5(x))
        y = torch.cat([b1, b2], 1)
        return F.relu(self.bn(self.reduce(y)))


class PNASNet(nn.Module):
    def __init__(self, cell: type[CellA] | type[CellB], num_cells: int, num_planes: int) -> None:
        super().__init__()
        self.in_planes = num_planes
        self.cell = cell
        self.conv1 = nn.Conv2d(3, num_planes, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_planes)
        self.layer1 = self._stack(num_planes, num_cells)
        self.down1 = self._downsample(num_planes * 2)
        self.layer2 = self._stack(num_planes * 2, num_cells)
        self.down2 = self._downsample(num_planes * 4)
        self.layer3 = self._stack(num_planes * 4, num_cells)
        self.linear = nn.Linear(num_planes * 4, 10)

    def _stack(self, planes: int, num_cells: int) -> nn.Sequential:
        return nn.Sequential(*[self.cell(planes, planes) for _ in range(num_cells)])

    def _downsample(self, planes: int) -> nn.Module:
        # reductions are the simple cells
        layer = CellA(self.in_planes, planes, stride=2)
        self.in_planes = planes
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer1(out)
        out = self.down1(out)
        out = self.layer2(out)
        out = self.down2(out)
        out = self.layer3(out)
        out = F.avg_pool2d(out, 8)
        out = self.linear(out.view(out.size(0), -1))
        return out


def pnasnet() -> PNASNet:
    return PNASNet(CellB, num_cells=1, num_planes=12)
