"""ShuffleNet V2: half of the channels go past each unit (Ma et al., arXiv:1807.11164)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    # split into groups
    x = x.view(b, groups, c // groups, h, w)
    x = torch.transpose(x, 1, 2).contiguous()
    # and back
    x = x.view(b, -1, h, w)
    return x


def conv1x1_bn_relu(inp: int, oup: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inp, oup, 1, bias=False), nn.BatchNorm2d(oup), nn.ReLU(inplace=True))


def depthwise(inp: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False), nn.BatchNorm2d(inp)]


class BasicUnit(nn.Module):
    def __init__(self, channels: int, split_ratio: float = 0.5) -> None:
        super().__init__()
        self.split_ratio = split_ratio
        mid = int(channels * split_ratio)
        self.branch = nn.Sequential(conv1x1_bn_relu(mid, mid), *depthwise(mid, 1), conv1x1_bn_relu(mid, mid))

    def forward(self, x: Tensor) -> Tensor:
        c = int(x.size(1) * self.split_ratio)
        left, right = x[:, :c, :, :], x[:, c:, :, :]
        out = torch.cat((left, self.branch(right)), dim=1)
        return channel_shuffle(out, 2)


class DownUnit(nn.Module):
    def __init__(self, inp: int, oup: int) -> None:
        super().__init__()
        mid = oup // 2
        self.left = nn.Sequential(*depthwise(inp, 2), conv1x1_bn_relu(inp, mid))
        self.right = nn.Sequential(conv1x1_bn_relu(inp, mid), *depthwise(mid, 2), conv1x1_bn_relu(mid, mid))

    def forward(self, x: Tensor) -> Tensor:
        return channel_shuffle(torch.cat((self.left(x), self.right(x)), dim=1), groups=2)


settings = {
    "0.25x": ((24, 24, 48, 96, 128), (1, 3, 1)),
    "1x": ((24, 116, 232, 464, 1024), (3, 7, 3)),
}


class ShuffleNetV2(nn.Module):
    def __init__(self, size: str, num_classes: int = 10) -> None:
        super().__init__()
        widths, repeats = settings[size]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for i, n in enumerate(repeats):
            units: list[nn.Module] = [DownUnit(widths[i], widths[i + 1])]
            units.extend(BasicUnit(widths[i + 1]) for _ in range(n))
            setattr(self, f"stage{i + 2}", nn.Sequential(*units))
        self.conv5 = conv1x1_bn_relu(widths[-2], widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for i in (2, 3, 4):
            x = getattr(self, f"stage{i}")(x)
        x = self.conv5(x)
        x = x.mean([2, 3])  # global pooling
        return self.fc(x)


def shufflenetv2() -> ShuffleNetV2:
    return ShuffleNetV2("0.25x")
