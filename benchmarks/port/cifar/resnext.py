"""ResNeXt: many narrow paths as one grouped convolution (Xie et al., arXiv:1611.05431)."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    """Grouped bottleneck; the shortcut is a Sequential, empty where the shapes agree."""

    def __init__(
        self, in_channels: int, cardinality: int, base_width: int, stride: int = 1, widen: int = 2
    ) -> None:
        super().__init__()
        group_width = cardinality * base_width
        self.squeeze = nn.Conv2d(in_channels, group_width, kernel_size=1, bias=False)
        self.bn_squeeze = nn.BatchNorm2d(group_width)
        self.grouped = nn.Conv2d(
            group_width, group_width, 3, stride=stride, padding=1, groups=cardinality, bias=False
        )
        self.bn_grouped = nn.BatchNorm2d(group_width)
        self.expand = nn.Conv2d(group_width, widen * group_width, kernel_size=1, bias=False)
        self.bn_expand = nn.BatchNorm2d(widen * group_width)

        self.shortcut = nn.Sequential()
        if in_channels != widen * group_width or stride != 1:
            self.shortcut.add_module(
                "conv", nn.Conv2d(in_channels, widen * group_width, 1, stride=stride, bias=False)
            )
            self.shortcut.add_module("bn", nn.BatchNorm2d(widen * group_width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.squeeze.forward(x)
        y = F.relu(self.bn_squeeze(y), inplace=True)
        y = self.grouped(y)
        y = F.relu(self.bn_grouped(y), inplace=True)
        y = self.expand(y)
        y = self.bn_expand(y)
        residual = self.shortcut(x)
        return F.relu(residual + y, inplace=True)


class ResNeXt(nn.Module):
    def __init__(self, depth: int, cardinality: int, base_width: int, num_classes: int = 10) -> None:
        super().__init__()
        n = (depth - 2) // 9
        self.cardinality = cardinality
        self.base_width = base_width
        self.channels = 16
        self.stages = [base_width, 2 * base_width, 4 * base_width]

        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn_stem = nn.BatchNorm2d(16)
        self.stage_1 = self.block("stage_1", n, self.stages[0], 1)
        self.stage_2 = self.block("stage_2", n, self.stages[1], 2)
        self.stage_3 = self.block("stage_3", n, self.stages[2], 2)
        self.classifier = nn.Linear(self.channels, num_classes)
        nn.init.kaiming_normal_(self.classifier.weight)

    def block(self, name: str, depth: int, width: int, stride: int) -> nn.Sequential:
        """Named children: stage_1_block0 and so on."""
        block = nn.Sequential()
        for i in range(depth):
            block.add_module(
                f"{name}_block{i}",
                Block(self.channels, self.cardinality, width, stride=stride if i == 0 else 1),
            )
            self.channels = 2 * self.cardinality * width
        return block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(self.bn_stem(x), inplace=True)
        x = self.stage_1(x)
        x = self.stage_2(x)
        x = self.stage_3(x)
        x = F.avg_pool2d(x, 8, 1)
        x = x.view(-1, x.size(1))
        return self.classifier(x)


def resnext() -> ResNeXt:
    return ResNeXt(depth=20, cardinality=4, base_width=4)
