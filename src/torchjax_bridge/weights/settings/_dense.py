"""Settings of the counterparts of a dense layer: a dense layer, one with several axes, or a convolution."""

from collections.abc import Iterator
from math import prod
from typing import Any

from torch import nn

from ..rules import in_input_order
from ._difference import Difference, differs
from ._layer import FlaxLayer

__all__ = ["dense", "dense_as_convolution", "dense_general"]


def dense(module: nn.Linear | nn.Conv2d, layer: FlaxLayer) -> Iterator[Difference]:
    """Whether there is a bias."""
    if "use_bias" in layer.values:
        has = module.bias is not None
        yield from differs("use_bias", has, bool(layer["use_bias"]), torch=("bias", has))


def dense_general(module: nn.Linear, layer: FlaxLayer) -> Iterator[Difference]:
    """``LinearGeneral`` and ``DenseGeneral``: the axes in the order of the input, as torch flattens them."""
    axis = layer["axis"]
    axes = (axis,) if isinstance(axis, int) else tuple(axis or ())
    if not in_input_order(axes):
        wanted = tuple(sorted(axes, key=lambda place: (place < 0, place)))
        yield Difference("axis", "in_features", module.in_features, axis, wanted, "output", f"axis={wanted}")
    yield from differs("batch_dims", (), tuple(layer["batch_dims"] or ()), torch=("batch_dims", None))


def dense_as_convolution(module: nn.Linear, layer: FlaxLayer) -> Iterator[Difference]:
    """``Linear`` beside a ``Conv`` that has a kernel of 1, or one over a whole map."""
    if layer.kind != "Conv":
        return
    sizes = layer["kernel_size"]
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    ours = ("in_features", module.in_features)
    pads = layer["padding"]
    if prod(sizes) == 1:
        if not _all(layer["strides"], 1):
            yield from differs("strides", 1, layer["strides"], torch=ours)
        unpadded = isinstance(pads, str) or _all(pads, 0)
    else:
        strides = layer["strides"]
        apart = strides == sizes[0] if isinstance(strides, int) else tuple(strides or ()) == sizes  # patches
        unpadded = pads == "VALID" or (apart if isinstance(pads, str) else _all(pads, 0))
    if not unpadded:
        yield from differs("padding", "VALID", pads, torch=ours)
    for setting in ("input_dilation", "feature_group_count"):
        if not _all(layer[setting], 1):
            yield from differs(setting, 1, layer[setting], torch=ours)
    if prod(sizes) > 1 and not _all(layer["kernel_dilation"], 1):
        yield from differs("kernel_dilation", 1, layer["kernel_dilation"], torch=ours)
    if layer["mask"] is not None:
        yield Difference("mask", "mask", None, "an array", None, "output", "no mask")


def _all(value: Any, number: int) -> bool:
    """Whether a setting is this number on every axis; None is Flax's default."""
    if value is None or isinstance(value, int):
        return value in (None, number)
    return all(_all(one, number) for one in value)
