"""Forty classifiers and three segmenters of torchvision, at the smallest images that each takes."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ._entry import Entry, images
from ._operators import declare_operators

__all__ = ["classification", "segmentation"]

# Builder -> side of its images.
_CLASSIFICATION = {
    "alexnet": 64,
    "convnext_tiny": 64,
    "convnext_small": 64,
    "densenet121": 64,
    "densenet169": 64,
    "efficientnet_b0": 64,
    "efficientnet_b1": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 299,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mnasnet0_75": 64,
    "mnasnet1_0": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64,
    "regnet_x_400mf": 64,
    "regnet_x_800mf": 64,
    "regnet_y_400mf": 64,
    "regnet_y_800mf": 64,
    "resnet18": 64,
    "resnet34": 64,
    "resnet50": 64,
    "resnet101": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "shufflenet_v2_x0_5": 64,
    "shufflenet_v2_x1_0": 64,
    "shufflenet_v2_x1_5": 64,
    "squeezenet1_0": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_s": 64,
    "swin_v2_t": 64,
    "swin_v2_s": 64,
    "vgg11": 32,
    "vgg11_bn": 32,
    "vit_b_16": 64,
    "vit_b_32": 64,
}
_SEGMENTATION = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},  # drawing truncated normals takes half a minute
    "inception_v3": {"init_weights": False},
    "vit_b_16": {"image_size": 64},
    "vit_b_32": {"image_size": 64},
}


def classification() -> list[Entry]:
    """One builder of each family at least."""
    return [
        Entry("torchvision", name, _builder(name, **_OPTIONS.get(name, {})), images(side))
        for name, side in _CLASSIFICATION.items()
    ]


def segmentation() -> list[Entry]:
    """A dictionary of maps as large as the images."""
    return [
        Entry("segmentation", name, _builder(f"segmentation.{name}", weights_backbone=None), images(64))
        for name in _SEGMENTATION
    ]


def _builder(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(_build, name, num_classes=10, weights=None, **options)


def _build(name: str, **options: Any) -> nn.Module:
    declare_operators()
    from torchvision import models

    module: Any = models
    for part in name.split("."):
        module = getattr(module, part)
    return module(**options)
