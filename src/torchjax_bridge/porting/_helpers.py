"""Functions that an emitted file holds where JAX has none of the same meaning.

Each is source, written as it appears, for arrays with channels last.
"""

from ._own_layers import OWN_LAYERS
from ._tables import TABLES

__all__ = ["HELPERS"]

HELPERS = {
    **OWN_LAYERS,
    **TABLES,
    "normalize": '''
def normalize(x: jax.Array, axes: int | tuple[int, ...], epsilon: float) -> jax.Array:
    """Mean 0 and variance 1 over the axes."""
    centred = x - x.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + epsilon)
''',
    "attend": '''
def attend(
    layer: nnx.MultiHeadAttention,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """What the layer gives where a bias is added to its scores, and its weights ``(N, heads, queries, keys)``."""
    q, k, v = layer.query(query), layer.key(key), layer.value(value)
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5 + bias
    weights = nnx.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf))
    if layer.dropout_rate > 0 and layer.rngs is not None and not layer.deterministic:
        kept = 1 - layer.dropout_rate
        weights = weights * jax.random.bernoulli(layer.rngs(), kept, weights.shape) / kept
    return layer.out(jnp.einsum("nhqk,nkhd->nqhd", weights, v)), weights
''',
    "padded_from": '''
def padded_from(x: jax.Array, lengths: jax.Array, value: float = 0.0) -> jax.Array:
    """``(N, L, C)`` with a value behind the end of each sequence."""
    return jnp.where(jnp.arange(x.shape[1])[:, None] < lengths[:, None, None], x, value)
''',
    "zero_where_hidden": '''
def zero_where_hidden(y: jax.Array, mask: jax.Array) -> jax.Array:
    """What an attention gives, with 0 where the mask ``(N, heads, queries, keys)`` hides every key, as in torch."""
    return jnp.where(jnp.swapaxes(mask.any(-1), 1, 2)[..., None], y, 0)
''',
    "safe_sqrt": '''
def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root, whose derivative at 0 is 0 and not infinite, as that of a norm in torch."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))
''',
    "absolute": '''
def absolute(x: jax.Array) -> jax.Array:
    """``|x|``, whose derivative at 0 is 0, as torch's."""
    return x * jnp.sign(x)
''',
    "clamp": '''
def clamp(x: jax.Array, low: Any = None, high: Any = None) -> jax.Array:
    """``jnp.clip``, whose derivative at the bounds is 1, as torch's."""
    x = x if low is None else jnp.where(x < low, low, x)
    return x if high is None else jnp.where(x > high, high, x)
''',
    "leaky_relu": '''
def leaky_relu(x: jax.Array, negative_slope: float) -> jax.Array:
    """``nnx.leaky_relu``, whose derivative at 0 is the slope, as torch's."""
    return jnp.where(x > 0, x, negative_slope * x)
''',
    "binary_cross_entropy": '''
def binary_cross_entropy(x: jax.Array, target: jax.Array) -> jax.Array:
    """The loss of probabilities, 0 and 1 included: torch bounds the logarithms and the derivative."""
    given = jax.lax.stop_gradient(x)
    yes, no = jnp.maximum(jnp.log(given), -100), jnp.maximum(jnp.log1p(-given), -100)
    slope = jax.lax.stop_gradient((x - target) / jnp.maximum(x * (1 - x), 1e-12))
    return (target - 1) * no - target * yes + slope * (x - given)
''',
    "dilated_max_pool": '''
def dilated_max_pool(
    x: jax.Array, window: tuple[int, ...], strides: tuple[int, ...], padding: Any, dilation: tuple[int, ...]
) -> jax.Array:
    """The largest of ``(N, *space, C)`` over windows with gaps."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)
    for axis, (size, step, gap) in enumerate(zip(window, strides, dilation, strict=True), start=1):
        last = x.shape[axis] - gap * (size - 1)
        parts = [jax.lax.slice_in_dim(x, i * gap, i * gap + last, step, axis) for i in range(size)]
        x = jnp.stack(parts).max(0)
    return x
''',
    "ceil_padding": '''
def ceil_padding(
    space: tuple[int, ...], window: tuple[int, ...], strides: tuple[int, ...], padding: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """The padding with which windows cover everything, as torch's ``ceil_mode``: a window starts inside."""
    found = []
    for size, width, step, pad in zip(space, window, strides, padding, strict=True):
        steps = -(-(size + 2 * pad - width) // step)
        steps -= steps * step >= size + pad
        found.append((pad, pad + max(0, steps * step + width - size - 2 * pad)))
    return tuple(found)
''',
    "group_normalize": '''
def group_normalize(x: jax.Array, groups: int, epsilon: float) -> jax.Array:
    """Mean 0 and variance 1 over each group of channels and all of space."""
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    return normalize(grouped, (1, 3), epsilon).reshape(x.shape)
''',
    "adaptive_avg_pool": '''
def adaptive_avg_pool(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Average ``(N, *space, C)`` over ``size`` windows, which overlap where the size divides no side."""
    space = x.shape[1:-1]
    if all(given % wanted == 0 for given, wanted in zip(space, size, strict=True)):
        window = tuple(given // wanted for given, wanted in zip(space, size, strict=True))
        return nnx.avg_pool(x, window, strides=window)
    for axis, (given, wanted) in enumerate(zip(space, size, strict=True), start=1):
        weights = np.zeros((wanted, given), x.dtype)
        for place, row in enumerate(weights):
            start, end = place * given // wanted, -(-(place + 1) * given // wanted)
            row[start:end] = 1 / (end - start)
        x = jnp.moveaxis(jnp.tensordot(x, weights, (axis, 1)), -1, axis)
    return x
''',
    "channel_shuffle": '''
def channel_shuffle(x: jax.Array, groups: int, axis: int) -> jax.Array:
    """Interleave the groups of channels."""
    shape = (*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
    return x.reshape(shape).swapaxes(axis, axis + 1).reshape(x.shape)
''',
    "pixel_shuffle": '''
def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """``(N, H, W, C * factor**2)`` as ``(N, H * factor, W * factor, C)``, channels in torch's order."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, c // factor**2, factor, factor)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(n, h * factor, w * factor, c // factor**2)
''',
    "pixel_unshuffle": '''
def pixel_unshuffle(x: jax.Array, factor: int) -> jax.Array:
    """``(N, H * factor, W * factor, C)`` as ``(N, H, W, C * factor**2)``, channels in torch's order."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(n, h // factor, w // factor, c * factor**2)
''',
    "local_response_norm": '''
def local_response_norm(x: jax.Array, size: int, alpha: float, beta: float, k: float) -> jax.Array:
    """Divide by a power of the mean square over neighbouring channels."""
    padding = [(0, 0)] * (x.ndim - 1) + [(size // 2, (size - 1) // 2)]
    window = (1,) * (x.ndim - 1) + (size,)
    squares = jax.lax.reduce_window(
        jnp.pad(jnp.square(x), padding), 0.0, jax.lax.add, window, (1,) * x.ndim, "VALID"
    )
    return x / (k + alpha * squares / size) ** beta
''',
    "resize_corners": '''
def resize_corners(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Linear interpolation of ``(N, *space, C)`` whose corners stay where they are."""
    for axis, wanted in enumerate(size, start=1):
        given = x.shape[axis]
        at = np.linspace(0, given - 1, wanted)
        weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(given))).astype(x.dtype)
        x = jnp.moveaxis(jnp.tensordot(x, weights, (axis, 1)), -1, axis)
    return x
''',
    "along_axis": '''
def along_axis(index: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """The places that an index for each element, along one axis, names."""
    places = list(jnp.indices(index.shape, sparse=True))
    places[axis] = index
    return tuple(places)
''',
    "adaptive_max_pool": '''
def adaptive_max_pool(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """The largest of ``(N, *space, C)`` over ``size`` windows, which overlap where the size divides no side."""
    for axis, wanted in enumerate(size, start=1):
        given = x.shape[axis]
        ends = [(i * given // wanted, -(-(i + 1) * given // wanted)) for i in range(wanted)]
        x = jnp.stack([jax.lax.slice_in_dim(x, *end, axis=axis).max(axis) for end in ends], axis)
    return x
''',
    "resize_nearest": '''
def resize_nearest(
    x: jax.Array, size: tuple[int, ...], steps: tuple[float, ...] | None = None, shift: float = 0.0
) -> jax.Array:
    """``(N, *space, C)`` with the nearest pixel to the left, as torch takes it."""
    for axis, wanted in enumerate(size, start=1):
        step = np.float32(x.shape[axis] / wanted if steps is None else steps[axis - 1])
        places = np.floor((np.arange(wanted, dtype=np.float32) + np.float32(shift)) * step)
        places = np.minimum(places, x.shape[axis] - 1)
        x = jnp.take(x, places.astype(np.int32), axis=axis)
    return x
''',
    "grid_sample": '''
def grid_sample(x: jax.Array, grid: jax.Array, *, mode: str, padding: str, align_corners: bool) -> jax.Array:
    """``(N, H, W, C)`` at the positions ``(x, y)`` of a grid ``(N, h, w, 2)``, -1 to 1 from end to end."""
    batch, count = jnp.arange(x.shape[0])[:, None, None], x.shape[1:3]

    def pixels(at: jax.Array, size: int) -> jax.Array:
        at = (at + 1) / 2 * (size - 1) if align_corners else ((at + 1) * size - 1) / 2
        if padding == "reflection":
            low, span = (0, size - 1) if align_corners else (-0.5, size)
            away = jnp.abs(at - low)
            over = jnp.fmod(away, span) if span else 0 * away
            at = low + jnp.where(away // max(span, 1) % 2 == 0, over, span - over)
        return at if padding == "zeros" else jax.lax.clamp(0.0, at, size - 1.0)

    def pixel(row: jax.Array, column: jax.Array) -> jax.Array:
        row, column = row.astype(jnp.int32), column.astype(jnp.int32)
        inside = (row >= 0) & (row < count[0]) & (column >= 0) & (column < count[1])
        found = x[batch, jnp.clip(row, 0, count[0] - 1), jnp.clip(column, 0, count[1] - 1)]
        return jnp.where(inside[..., None], found, 0)

    row, column = pixels(grid[..., 1], count[0]), pixels(grid[..., 0], count[1])
    if mode == "nearest":
        return pixel(jnp.round(row), jnp.round(column))
    top, left = jnp.floor(row), jnp.floor(column)
    down, right = (row - top)[..., None], (column - left)[..., None]
    above = pixel(top, left) * (1 - right) + pixel(top, left + 1) * right
    below = pixel(top + 1, left) * (1 - right) + pixel(top + 1, left + 1) * right
    return above * (1 - down) + below * down
''',
    "affine_grid": '''
def affine_grid(theta: jax.Array, size: tuple[int, int], *, align_corners: bool) -> jax.Array:
    """The grid ``(N, h, w, 2)`` of affine maps ``(N, 2, 3)``."""
    ends = [1.0 if align_corners else 1 - 1 / n for n in size]
    rows, columns = (
        np.linspace(-end, end, n) if n > 1 else np.zeros(1) for end, n in zip(ends, size, strict=True)
    )
    y, x = np.meshgrid(rows, columns, indexing="ij")
    base = np.stack([x, y, np.ones(size)], axis=-1).astype(theta.dtype)
    return jnp.einsum("hwk,nck->nhwc", base, theta, precision=jax.lax.Precision.HIGHEST)
''',
    "fold": '''
def fold(
    x: jax.Array,
    size: tuple[int, int],
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> jax.Array:
    """Windows ``(N, count, C * height * width)`` summed where they overlap, as ``(N, *size, C)``."""
    count = [
        (n + 2 * pad - gap * (width - 1) - 1) // step + 1
        for n, pad, gap, width, step in zip(size, padding, dilation, window, strides, strict=True)
    ]
    x = x.reshape(x.shape[0], *count, -1, *window)
    y = jnp.zeros((x.shape[0], size[0] + 2 * padding[0], size[1] + 2 * padding[1], x.shape[3]), x.dtype)
    for i in range(window[0]):
        for j in range(window[1]):
            top, left = i * dilation[0], j * dilation[1]
            rows = slice(top, top + strides[0] * count[0], strides[0])
            columns = slice(left, left + strides[1] * count[1], strides[1])
            y = y.at[:, rows, columns].add(x[..., i, j])
    return y[:, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
''',
    "resize_linear": '''
def resize_linear(x: jax.Array, size: tuple[int, ...], steps: tuple[float, ...]) -> jax.Array:
    """Linear interpolation of ``(N, *space, C)`` at every ``step``-th place, as torch's ``scale_factor`` does."""
    for axis, (wanted, step) in enumerate(zip(size, steps, strict=True), start=1):
        given = x.shape[axis]
        at = np.clip((np.arange(wanted) + 0.5) * step - 0.5, 0, given - 1)
        weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(given))).astype(x.dtype)
        x = jnp.moveaxis(jnp.tensordot(x, weights, (axis, 1)), -1, axis)
    return x
''',
    "resize_cubic": '''
def resize_cubic(
    x: jax.Array, size: tuple[int, ...], steps: tuple[float, ...] | None = None, align_corners: bool = False
) -> jax.Array:
    """Bicubic interpolation of ``(N, *space, C)`` with torch's kernel, whose parameter is -0.75."""

    def kernel(t: np.ndarray) -> np.ndarray:
        near = (1.25 * t - 2.25) * t * t + 1
        far = ((-0.75 * t + 3.75) * t - 6) * t + 3
        return np.where(t <= 1, near, np.where(t < 2, far, 0))

    for axis, wanted in enumerate(size, start=1):
        given = x.shape[axis]
        step = given / wanted if steps is None else steps[axis - 1]
        at = (np.arange(wanted) + 0.5) * step - 0.5
        if align_corners:
            at = np.linspace(0, given - 1, wanted)
        weights = np.zeros((wanted, given), x.dtype)
        for shift in range(-1, 3):
            places = np.floor(at).astype(int) + shift
            np.add.at(
                weights,
                (np.arange(wanted), np.clip(places, 0, given - 1)),
                kernel(np.abs(at - places)),
            )
        x = jnp.moveaxis(jnp.tensordot(x, weights, (axis, 1)), -1, axis)
    return x
''',
}
