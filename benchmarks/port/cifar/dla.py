"""Deep layer aggregation: trees of blocks, whose roots join what is below them (Yu et al., arXiv:1707.06484)."""

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential()
        if cin != cout or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Root(nn.Module):
    def __init__(self, cin: int, cout: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel_size, padding=(kernel_size - 1) // 2, bias=False)
        self.bn = nn.BatchNorm2d(cout)

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(torch.cat(xs, 1))))


class Tree(nn.Module):
    """A tree of 2 ** depth blocks; its right half gets what the left half made, for the root."""

    def __init__(self, cin: int, cout: int, depth: int, stride: int = 1, extra: int = 0) -> None:
        super().__init__()
        self.depth = depth
        if depth > 1:
            self.left: nn.Module = Tree(cin, cout, depth - 1, stride)
            self.right: nn.Module = Tree(cout, cout, depth - 1, extra=extra + cout)
        else:
            self.left = BasicBlock(cin, cout, stride)
            self.right = BasicBlock(cout, cout)
            self.root = Root(2 * cout + extra, cout)

    def forward(self, x: torch.Tensor, below: list[torch.Tensor] | None = None) -> torch.Tensor:
        below = [] if below is None else below
        left = self.left(x)
        if self.depth > 1:
            return self.right(left, below + [left])
        right = self.right(left)
        return self.root(right, left, *below)


class DLA(nn.Module):
    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.base = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)
        )
        for i, depth in enumerate([1, 2, 2, 1]):
            cin, cout = width * 2 ** max(i - 1, 0), width * 2**i
            setattr(self, f"level{i}", Tree(cin, cout, depth, stride=1 if i == 0 else 2))
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.base(x)
        for i in range(4):
            x = getattr(self, f"level{i}")(x)
        x = F.avg_pool2d(x, 4)
        return self.linear(x.view(x.size(0), -1))


def dla() -> DLA:
    return DLA(width=8)
