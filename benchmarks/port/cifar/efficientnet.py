"""EfficientNet: inverted residuals with swish, gates and drop connect (Tan and Le, arXiv:1905.11946)."""

import torch
from torch import nn
from torch.nn import functional as F


class Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


def drop_connect(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Drop a sample's whole branch with probability p."""
    if not training or p == 0.0:
        return x
    keep = 1 - p
    mask = keep + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
    mask = torch.floor(mask)
    return x / keep * mask


class MBConv(nn.Module):
    def __init__(self, cin: int, cout: int, k: int, s: int, expand: int, p: float) -> None:
        super().__init__()
        self.expand = expand
        self.stride = s
        self.p = p
        self.input_filters, self.output_filters = cin, cout

        mid = cin * expand
        if expand != 1:
            self.expand_conv = nn.Conv2d(cin, mid, 1, bias=False)
            self.bn0 = nn.BatchNorm2d(mid, momentum=0.01, eps=1e-3)
        self.depthwise_conv = nn.Conv2d(mid, mid, k, s, padding=(k - 1) // 2, groups=mid, bias=False)
        self.bn1 = nn.BatchNorm2d(mid, momentum=0.01, eps=1e-3)
        squeezed = max(1, cin // 4)
        self.se_reduce = nn.Conv2d(mid, squeezed, 1)
        self.se_expand = nn.Conv2d(squeezed, mid, 1)
        self.project_conv = nn.Conv2d(mid, cout, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout, momentum=0.01, eps=1e-3)
        self.swish = Swish()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = inputs
        if self.expand != 1:
            x = self.swish(self.bn0(self.expand_conv(inputs)))
        x = self.swish(self.bn1(self.depthwise_conv(x)))

        # squeeze and excitation
        gate = F.adaptive_avg_pool2d(x, 1)
        gate = self.se_expand(self.swish(self.se_reduce(gate)))
        x = torch.sigmoid(gate) * x

        x = self.bn2(self.project_conv(x))
        if self.stride == 1 and self.input_filters == self.output_filters:
            if self.p:
                x = drop_connect(x, p=self.p, training=self.training)
            x = x + inputs
        return x


class EfficientNet(nn.Module):
    # kernel, repeats, channels, expansion, stride
    blocks_args = ((3, 1, 8, 1, 1), (3, 2, 12, 4, 2), (5, 2, 20, 4, 2), (3, 2, 32, 6, 2))

    def __init__(self, num_classes: int = 10, drop_rate: float = 0.2, drop_connect_rate: float = 0.2) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.conv_stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(12, momentum=0.01, eps=1e-3)
        self.blocks = nn.ModuleList([])
        total = sum(args[1] for args in self.blocks_args)
        cin = 12
        for k, n, cout, expand, s in self.blocks_args:
            for i in range(n):
                p = drop_connect_rate * len(self.blocks) / total
                self.blocks.append(MBConv(cin, cout, k, s if i == 0 else 1, expand, p))
                cin = cout
        self.conv_head = nn.Conv2d(cin, 4 * cin, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4 * cin, momentum=0.01, eps=1e-3)
        self.fc = nn.Linear(4 * cin, num_classes)
        self.swish = Swish()

    def extract_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.swish(self.bn0(self.conv_stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.swish(self.bn1(self.conv_head(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bs = x.size(0)
        x = self.extract_features(x)
        x = F.adaptive_avg_pool2d(x, 1).view(bs, -1)
        x = F.dropout(x, p=self.drop_rate, training=self.training)
        return self.fc(x)


def efficientnet() -> EfficientNet:
    return EfficientNet()
