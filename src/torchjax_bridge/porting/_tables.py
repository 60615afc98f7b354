"""Tables of positions that transformers keep as buffers, each made again by a function of the file.

Knows numbers of offsets, also behind a token, and of distances, offsets with their distances or on a logarithmic
scale, the mask of shifted windows, and waves over positions. A table counts as recognised only if the emitted
function gives every element of it; of waves, but for what float32 rounds of their angles.
"""

import functools
import itertools
import math
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
    "offset_numbers_with_token": '''
def offset_numbers_with_token(height: int, width: int) -> jax.Array:
    """A number for the offset between each two places of a map behind a token, and three for the token's own."""
    y, x = jnp.divmod(jnp.arange(height * width), width)
    rows, columns = y[:, None] - y + height - 1, x[:, None] - x + width - 1
    numbers = jnp.pad(rows * (2 * width - 1) + columns, ((1, 0), (1, 0)))
    count = (2 * height - 1) * (2 * width - 1)
    return numbers.at[0].set(count).at[:, 0].set(count + 1).at[0, 0].set(count + 2)
''',
    "distance_numbers": '''
def distance_numbers(height: int, width: int, stride: int = 1) -> jax.Array:
    """A number for the distances in height and width from each ``stride``-th place of a map to every place."""
    y, x = jnp.divmod(jnp.arange(height * width), width)
    q = jnp.arange(height * width).reshape(height, width)[::stride, ::stride].reshape(-1)
    return jnp.abs(y[q][:, None] - y) * width + jnp.abs(x[q][:, None] - x)
''',
    "logarithmic_offsets": '''
def logarithmic_offsets(height: int, width: int, largest: tuple[int, int] | None = None) -> jax.Array:
    """The offsets in a window, signed and on a logarithmic scale, ``(2 * H - 1, 2 * W - 1, 2)``."""
    axes = jnp.arange(1 - height, height), jnp.arange(1 - width, width)
    offsets = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1)
    if largest is None:
        return jnp.sign(offsets) * jnp.log1p(jnp.abs(offsets))
    scaled = 8 * offsets / jnp.asarray(largest)
    return jnp.sign(scaled) * jnp.log2(jnp.abs(scaled) + 1) / 3
''',
    "offsets_and_distances": '''
def offsets_and_distances(height: int, width: int) -> jax.Array:
    """The offsets in width and height between places, and their squared distance, ``(H * W, H * W, 3)``."""
    y, x = jnp.divmod(jnp.arange(height * width, dtype=jnp.float32), width)
    rows, columns = y - y[:, None], x - x[:, None]
    return jnp.stack([columns, rows, columns**2 + rows**2], -1)
''',
    "sinusoids": '''
def sinusoids(length: int, width: int, slowest: int, *, mixed: bool, empty: int | None = None) -> jax.Array:
    """Sines and cosines of positions, ``(L, C)``, by turns or one half after the other.

    The wavelengths are 2 pi times the powers of ``10000 ** (1 / slowest)``. Position ``empty`` has zeros.
    """
    rates = 10000.0 ** -(np.arange(width // 2) / slowest)
    angles = np.arange(length)[:, None] * rates
    table = np.stack([np.sin(angles), np.cos(angles)], -1 if mixed else -2).reshape(length, width)
    if empty is not None:
        table[empty] = 0
    return jnp.asarray(table, jnp.float32)
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


_COMPUTED = {"logarithmic_offsets"}  # in another order of operations: the last bit differs


def table_text(tensor: torch.Tensor) -> str | None:
    """A call of one of these functions that gives a tensor; None if none does. The dtype may be another."""
    if (waves := _sinusoids(tensor)) is not None:
        return waves
    shape, rank = tuple(tensor.shape), 3 if tensor.is_floating_point() else 2
    while len(shape) > rank and shape[0] == 1:
        shape = shape[1:]
    if len(shape) == 1:
        shape = (math.isqrt(shape[0]),) * 2  # a square table whose rows stand one after the other
        if shape[0] ** 2 != tensor.numel():
            return None
    values = (tensor.float() if tensor.is_floating_point() else tensor).reshape(shape).numpy()
    call = _call(values.tobytes(), values.dtype.str, shape)
    if call is None or shape == tuple(tensor.shape):
        return call
    return f"{call}.reshape({'-1' if tensor.dim() == 1 else tuple(tensor.shape)})"


def _sinusoids(tensor: torch.Tensor) -> str | None:
    """The call that gives sines and cosines of positions, but for what float32 rounds of their angles."""
    table = tensor.squeeze()
    if not tensor.is_floating_point() or table.dim() != 2 or min(table.shape) < 2 or table.shape[1] % 2:
        return None
    values = table.double().numpy()
    length, width = values.shape
    zeros = np.flatnonzero(~values.any(1)).tolist()
    settings: dict[str, Any] = {"empty": zeros[0]} if len(zeros) == 1 else {}
    rounding = 2.0**-22 * (1 + np.arange(length)[:, None])
    for mixed, slowest in itertools.product((True, False), (width // 2, width // 2 - 1)):
        settings["mixed"] = mixed
        made = _function("sinusoids")(length, width, max(slowest, 1), **settings)
        if bool((np.abs(np.asarray(made) - values) <= rounding).all()):
            words = ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items(), reverse=True))
            call = f"sinusoids({length}, {width}, {max(slowest, 1)}, {words})"
            return call if tensor.dim() == 2 else f"{call}.reshape({tuple(tensor.shape)})"
    return None


@functools.lru_cache(maxsize=64)
def _call(content: bytes, dtype: str, shape: tuple[int, ...]) -> str | None:
    """The call that gives a table; blocks of a model hold equal ones."""
    values = np.frombuffer(content, dtype).reshape(shape)
    for name, arguments in _candidates(values):
        made = np.asarray(_function(name)(*arguments))
        if made.shape != shape:
            continue
        same = made == values if name not in _COMPUTED else np.isclose(made, values, rtol=1e-6, atol=0)
        if bool(same.all()):
            return f"{name}({', '.join(map(repr, arguments))})"
    return None


def _candidates(values: np.ndarray) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The calls that give a table of this shape and of such first and last values."""
    if values.ndim == 2 and np.issubdtype(values.dtype, np.integer):
        queries, keys = values.shape
        for height, width in _sides(keys - 1) if queries == keys else ():
            if values.max() == (2 * height - 1) * (2 * width - 1) + 2:
                yield "offset_numbers_with_token", (height, width)
        for height, width in _sides(keys):
            if queries == keys and values.max() == (2 * height - 1) * (2 * width - 1) - 1:
                yield "offset_numbers", (height, width)
            for stride in range(1, 5):
                if queries == -(-height // stride) * -(-width // stride):
                    yield "distance_numbers", (height, width, *((stride,) if stride > 1 else ()))
    elif values.ndim == 3 and values.shape[2] == 3 and values.shape[0] == values.shape[1]:
        for sides in _sides(len(values)):
            yield "offsets_and_distances", sides
    elif values.ndim == 3 and values.shape[2] == 2 and values.shape[0] % 2 and values.shape[1] % 2:
        sides = values.shape[0] // 2 + 1, values.shape[1] // 2 + 1
        ends = (float(values[-1, 0, 0]), float(values[0, -1, 1]))
        yield "logarithmic_offsets", sides
        if min(sides) > 1 and min(ends) > 0:
            largest = (
                round(8 * (side - 1) / (2 ** (3 * end) - 1)) for side, end in zip(sides, ends, strict=True)
            )
            yield "logarithmic_offsets", (*sides, tuple(largest))
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

    space: dict[str, Any] = {"jax": jax, "jnp": jnp, "np": np}
    exec(TABLES[name], space)
    found: Callable[..., Any] = space[name]
    return found
