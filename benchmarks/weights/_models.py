"""Two models as one description each, built from it as a torch module and as an abstract nnx module.

Only the weights matter here, so the models have no forward pass. A description is a nested dict; its leaves say
which layer: ``("conv", in, out, kernel)``, ``("norm", width)`` or ``("linear", in, out)``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from flax import nnx
from torch import nn

__all__ = ["MODELS", "TRANSFORMER", "Description", "nnx_template", "torch_module"]

Description = Mapping[str, Any]


def _bottleneck(before: int, width: int, *, shortcut: bool) -> Description:
    after = 4 * width
    layers: dict[str, Any] = {
        "conv1": ("conv", before, width, 1),
        "bn1": ("norm", width),
        "conv2": ("conv", width, width, 3),
        "bn2": ("norm", width),
        "conv3": ("conv", width, after, 1),
        "bn3": ("norm", after),
    }
    if shortcut:
        layers["downsample"] = {"conv": ("conv", before, after, 1), "bn": ("norm", after)}
    return layers


def resnet(quick: bool) -> Description:
    """The shapes of a ResNet-50: 25.6 million parameters, most of them in 1x1 and 3x3 kernels."""
    model: dict[str, Any] = {"conv1": ("conv", 3, 64, 7), "bn1": ("norm", 64)}
    before = 64
    for stage, (depth, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        if quick and stage > 1:
            break
        blocks = {}
        for block in range(depth):
            blocks[f"block{block}"] = _bottleneck(before, width, shortcut=block == 0)
            before = 4 * width
        model[f"layer{stage}"] = blocks
    model["fc"] = ("linear", before, 1000)
    return model


def transformer(quick: bool) -> Description:
    """A gigabyte of square and oblong matrices: nine blocks of width 1536."""
    width, depth = (64, 2) if quick else (1536, 9)
    block = {
        "query": ("linear", width, width),
        "key": ("linear", width, width),
        "value": ("linear", width, width),
        "out": ("linear", width, width),
        "up": ("linear", width, 4 * width),
        "down": ("linear", 4 * width, width),
    }
    return {f"block{index}": block for index in range(depth)}


TRANSFORMER = "1 GB transformer-like"
MODELS: dict[str, Callable[[bool], Description]] = {
    "ResNet-50-like": resnet,
    TRANSFORMER: transformer,
}


def torch_module(description: Description) -> nn.Module:
    """The torch side, with random weights."""
    return _build(description, _torch_layer, nn.Module)


def nnx_template(description: Description) -> nnx.Module:
    """The nnx side, abstract: it costs no memory."""
    return nnx.eval_shape(lambda: _build(description, _nnx_layer, nnx.Module))


def _build(description: Description, layer: Callable[[Any], Any], holder: Callable[[], Any]) -> Any:
    module = holder()
    for name, part in description.items():
        setattr(module, name, _build(part, layer, holder) if isinstance(part, Mapping) else layer(part))
    return module


def _torch_layer(part: tuple[Any, ...]) -> nn.Module:
    match part:
        case ("conv", before, after, kernel):
            return nn.Conv2d(before, after, kernel, bias=False)
        case ("norm", width):
            return nn.BatchNorm2d(width)
        case ("linear", before, after):
            module = nn.Linear(before, after)
            torch.nn.init.normal_(module.weight)
            return module
    raise ValueError(part)


def _nnx_layer(part: tuple[Any, ...]) -> nnx.Module:
    rngs = nnx.Rngs(0)
    match part:
        case ("conv", before, after, kernel):
            return nnx.Conv(before, after, (kernel, kernel), padding="VALID", use_bias=False, rngs=rngs)
        case ("norm", width):
            return nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        case ("linear", before, after):
            return nnx.Linear(before, after, rngs=rngs)
    raise ValueError(part)
