"""VGG with batch norm (Simonyan and Zisserman, arXiv:1409.1556), a hidden layer and dropout in its head."""

import torch
from torch import nn

configs: dict[str, list[int | str]] = {
    "tiny": [16, "M", 24, "M", 32, 32, "M", 48, 48, "M"],
    "A": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
}


def make_features(config: list[int | str]) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for entry in config:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.BatchNorm2d(entry), nn.ReLU(inplace=True)]
        channels = entry
    return nn.Sequential(*layers)


class VGG(nn.Module):
    def __init__(self, config: str, width: int = 48, hidden: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.features = make_features(configs[config])
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(width * 2 * 2, hidden),
            nn.ReLU(True),
            nn.Dropout(0.5),
            nn.Linear(hidden, num_classes),
        )
        self._initialize_weights()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        x = x.view(x.size(0), -1)
        x = self.classifier(x)
        return x

    def _initialize_weights(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.01)


def vgg() -> VGG:
    return VGG("tiny")
