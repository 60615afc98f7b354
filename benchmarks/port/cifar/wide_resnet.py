"""Wide ResNet with dropout between its convolutions (Zagoruyko and Komodakis, arXiv:1605.07146)."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, kernel_size=3, stride=stride, padding=1, bias=True)


def conv_init(m: nn.Module) -> None:
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        nn.init.xavier_uniform_(m.weight, gain=2**0.5)  # type: ignore[arg-type]
        nn.init.constant_(m.bias, 0)  # type: ignore[arg-type]
    elif classname.find("BatchNorm") != -1:
        nn.init.constant_(m.weight, 1)  # type: ignore[arg-type]
        nn.init.constant_(m.bias, 0)  # type: ignore[arg-type]


class WideBasic(nn.Module):
    def __init__(self, in_planes: int, planes: int, dropout_rate: float, stride: int = 1) -> None:
        super().__init__()
        self.droprate = dropout_rate
        self.equal_in_out = in_planes == planes
        self.bn1 = nn.BatchNorm2d(in_planes, momentum=0.9)
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes, momentum=0.9)
        self.conv2 = conv3x3(planes, planes)
        self.conv_shortcut = (
            None if self.equal_in_out else nn.Conv2d(in_planes, planes, 1, stride=stride, bias=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.equal_in_out:
            x = F.leaky_relu(self.bn1(x), 0.1)
            out = x
        else:
            out = F.leaky_relu(self.bn1(x), 0.1)
        out = F.leaky_relu(self.bn2(self.conv1(out)), 0.1)
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.conv_shortcut is None else self.conv_shortcut(x), out)


class NetworkBlock(nn.Module):
    def __init__(self, n: int, in_planes: int, out_planes: int, dropout_rate: float, stride: int) -> None:
        super().__init__()
        layers = []
        for i in range(n):
            layers.append(
                WideBasic(in_planes if i == 0 else out_planes, out_planes, dropout_rate, stride ** (i == 0))
            )
        self.layer = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, depth: int, widen_factor: int, dropout_rate: float, num_classes: int = 10) -> None:
        super().__init__()
        assert (depth - 4) % 6 == 0, "the depth should be 6n + 4"
        n = (depth - 4) // 6
        k = widen_factor
        widths = [8, 8 * k, 16 * k, 32 * k]

        self.conv1 = conv3x3(3, widths[0])
        self.block1 = NetworkBlock(n, widths[0], widths[1], dropout_rate, stride=1)
        self.block2 = NetworkBlock(n, widths[1], widths[2], dropout_rate, stride=2)
        self.block3 = NetworkBlock(n, widths[2], widths[3], dropout_rate, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3], momentum=0.9)
        self.fc = nn.Linear(widths[3], num_classes)
        self.n_channels = widths[3]
        self.apply(conv_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(x)
        out = self.block1(out)
        out = self.block2(out)
        out = self.block3(out)
        out = F.leaky_relu(self.bn1(out), 0.1)
        out = F.avg_pool2d(out, 8)
        out = out.view(-1, self.n_channels)
        return self.fc(out)


def wide_resnet() -> WideResNet:
    return WideResNet(depth=16, widen_factor=2, dropout_rate=0.3)
