"""What a torch pooling layer would give with settings that are easily mistaken in Flax.

Flax pools with functions, and nothing shows their arguments from outside. They are found by their results:
``"SAME"`` and ``"VALID"`` instead of torch's numbers, and whether an average counts the padding.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ._values import Value

__all__ = ["is_pooling", "other_poolings", "unstrided_poolings"]

_MAX = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def is_pooling(module: nn.Module) -> bool:
    """Whether a torch layer is a pooling, of any kind."""
    return type(module).__module__ == nn.MaxPool2d.__module__


def other_poolings(module: nn.Module, inputs: Sequence[Value]) -> Iterator[tuple[str, str, np.ndarray]]:
    """For each mistake: what Flax does, what to type, and the array that it gives, in torch's layout."""
    if not isinstance(module, (*_MAX, *_AVERAGE)) or not inputs:
        return
    x = torch.from_numpy(np.array(inputs[0].array))
    rank = int(type(module).__name__[-2])
    if x.ndim != rank + 2:
        return
    window, strides = _spread(module.kernel_size, rank), _spread(module.stride, rank)
    padding = _spread(module.padding, rank)
    numbers = tuple((p, p) for p in padding)
    pooled = _maximum if isinstance(module, _MAX) else _average
    for word, pads in (("SAME", _same(x.shape[2:], window, strides)), ("VALID", ((0, 0),) * rank)):
        if pads != numbers:
            result = pooled(x, window, strides, pads)
            yield f"Flax pools with padding={word!r}", f"pool with padding={numbers}", result.numpy()
    if isinstance(module, _AVERAGE) and any(padding):
        counted = bool(module.count_include_pad)
        result = _average(x, window, strides, numbers, counted=not counted)
        text = "does not count" if counted else "counts"
        yield (
            f"Flax {text} the padding in its average",
            f"pool with count_include_pad={counted}",
            result.numpy(),
        )


def unstrided_poolings(array: np.ndarray, shape: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """A map ``(N, H, W, C)`` pooled with strides of 1, for each width of window that gives this shape.

    Flax's poolings have strides of 1 by default; torch's have the width of their window.
    """
    if array.ndim != 4 or array.shape[0] != shape[0] or array.dtype.kind != "f":
        return
    _, height, width, channels = array.shape
    x = torch.from_numpy(np.moveaxis(array, -1, 1).astype(array.dtype))
    for size in range(2, min(height, width, _WIDEST) + 1):
        for rows, columns, padding in (
            (height - size + 1, width - size + 1, [(0, 0)] * 2),
            (height, width, [((size - 1) // 2, size // 2)] * 2),
        ):
            if rows * columns * channels * len(array) == np.prod(shape):
                for pooled in (_maximum, _average):
                    result = pooled(x, (size, size), (1, 1), padding).numpy()
                    yield size, np.moveaxis(result, 1, -1).reshape(shape)


_WIDEST = 7


def _spread(value: Any, rank: int) -> tuple[int, ...]:
    return (int(value),) * rank if isinstance(value, int) else tuple(int(item) for item in value)


def _same(sizes: Sequence[int], window: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The padding of "SAME": enough for ``ceil(size / stride)`` results, an odd one at the end."""
    pads = []
    for size, width, stride in zip(sizes, window, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + width - size, 0)
        pads.append((total // 2, total - total // 2))
    return tuple(pads)


def _padded(x: torch.Tensor, pads: Sequence[tuple[int, int]], value: float) -> torch.Tensor:
    return functional.pad(x, [size for pair in reversed(pads) for size in pair], value=value)


def _windows(x: torch.Tensor, window: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """Every window of ``(N, C, *space)``, its elements on further axes."""
    for axis, (width, stride) in enumerate(zip(window, strides, strict=True), start=2):
        x = x.unfold(axis, width, stride)
    return x


def _axes(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(x.ndim, 2 * x.ndim - 2))


def _maximum(
    x: torch.Tensor, window: Sequence[int], strides: Sequence[int], pads: Sequence[tuple[int, int]]
) -> torch.Tensor:
    return _windows(_padded(x, pads, float("-inf")), window, strides).amax(_axes(x))


def _average(
    x: torch.Tensor,
    window: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[tuple[int, int]],
    *,
    counted: bool = True,
) -> torch.Tensor:
    total = _windows(_padded(x, pads, 0.0), window, strides).sum(_axes(x))
    ones = _padded(torch.ones_like(x), pads, 1.0 if counted else 0.0)
    return total / _windows(ones, window, strides).sum(_axes(x))
