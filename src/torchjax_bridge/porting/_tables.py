"""Tables of positions that vision transformers keep as buffers, each made again by a function of the file.

Knows three: numbers of offsets, numbers of distances, and the mask of shifted windows. A table counts as recognised
only if the emitted function gives every element of it.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["TABLES", "table_text"]

TABLES = {
    "offset_numbers": '''
def offset_numbers(height: int, width: int) -> jax.Array:
    """A number for the offset between each two places of a map, ``(H * W, H * W)``."""
    y, x = jnp.divmod(jnp.arange(height * width), width)
    rows, columns = y[:, None] - y + height - 1, x[:, None] - x + width - 1
    return rows * (2 * width - 1) + columns
''',
    "distance_numbers": '''
def distance_numbers(height: int, width: int, stride: int = 1) -> jax.Array:
    """A number for the distances in height and width from each ``stride``-th place of a map to every place."""
    y, x = jnp.divmod(jnp.arange(height * width), width)
    q = jnp.arange(height * width).reshape(height, width)[::stride, ::stride].reshape(-1)
    return jnp.abs(y[q][:, None] - y) * width + jnp.abs(x[q][:, None] - x)
''',
    "shifted_window_mask": '''
def shifted_window_mask(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], blocked: float
) -> jax.Array:
    """What is added to the attention inside each window of a shifted map: ``blocked`` between its regions."""
    y, x = (
        jnp.searchsorted(jnp.asarray([n - w, n - s]), jnp.arange(n), side="right").reshape(-1, w)
        for n, w, s in zip(size, window, shift, strict=True)
    )
    regions = (3 * y[:, None, :, None] + x[None, :, None, :]).reshape(-1, window[0] * window[1])
    return jnp.where(regions[:, None, :] == regions[:, :, None], 0.0, blocked)
''',
}


def table_text(tensor: torch.Tensor) -> str | None:
    """A call of one of these functions that gives a tensor; None if none does. The dtype may be another."""
    shape, rank = tuple(tensor.shape), 3 if tensor.is_floating_point() else 2
    while len(shape) > rank and shape[0] == 1:
        shape = shape[1:]
    values = tensor.reshape(shape).numpy()
    for name, arguments in _candidates(values):
        made = np.asarray(_function(name)(*arguments))
        if made.shape == shape and bool((made == values).all()):
            text = f"{name}({', '.join(map(repr, arguments))})"
            return text if shape == tuple(tensor.shape) else f"{text}.reshape({tuple(tensor.shape)})"
    return None


def _candidates(values: np.ndarray) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The calls that give a table of this shape and of such first and last values."""
    if values.ndim == 2 and np.issubdtype(values.dtype, np.integer):
        queries, keys = values.shape
        for height, width in _sides(keys):
            if queries == keys and values.max() == (2 * height - 1) * (2 * width - 1) - 1:
                yield "offset_numbers", (height, width)
            for stride in range(1, 5):
                if queries == -(-height // stride) * -(-width // stride):
                    yield "distance_numbers", (height, width, *((stride,) if stride > 1 else ()))
    elif values.ndim == 3 and values.shape[1] == values.shape[2] and not values.max():
        least = float(values.min())
        if not bool(np.isin(values, (0.0, least)).all()):
            return
        for window, grid in itertools.product(_sides(values.shape[1]), _sides(len(values))):
            for shift in itertools.product(*(range(side) for side in window)):
                size = tuple(side * count for side, count in zip(window, grid, strict=True))
                if any(shift) and _last_region(values, window, shift):
                    yield "shifted_window_mask", (size, window, shift, least)


def _last_region(values: np.ndarray, window: tuple[int, ...], shift: tuple[int, ...]) -> bool:
    """Whether the last window has, from its first place on, a region as large as this shift leaves there."""
    height, width = (side - step if step else side for side, step in zip(window, shift, strict=True))
    return int((values[-1, 0] == 0).sum()) == height * width


def _sides(count: int) -> list[tuple[int, int]]:
    """The sides of a map of so many places, the squarest first."""
    sides = [(count // width, width) for width in range(1, count + 1) if count % width == 0]
    return sorted(sides, key=lambda pair: abs(pair[0] - pair[1]))


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    space: dict[str, Any] = {"jax": jax, "jnp": jnp}
    exec(TABLES[name], space)
    found: Callable[..., Any] = space[name]
    return found
