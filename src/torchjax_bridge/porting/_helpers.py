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
def resize_nearest(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """``(N, *space, C)`` with the nearest pixel to the left, as torch takes it."""
    for axis, wanted in enumerate(size, start=1):
        scale = np.float32(x.shape[axis] / wanted)
        places = np.minimum(np.floor(np.arange(wanted, dtype=np.float32) * scale), x.shape[axis] - 1)
        x = jnp.take(x, places.astype(np.int32), axis=axis)
    return x
''',
    "resize_cubic": '''
def resize_cubic(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Bicubic interpolation of ``(N, *space, C)`` with torch's kernel, whose parameter is -0.75."""

    def kernel(t: np.ndarray) -> np.ndarray:
        near = (1.25 * t - 2.25) * t * t + 1
        far = ((-0.75 * t + 3.75) * t - 6) * t + 3
        return np.where(t <= 1, near, np.where(t < 2, far, 0))

    for axis, wanted in enumerate(size, start=1):
        given = x.shape[axis]
        at = (np.arange(wanted) + 0.5) * given / wanted - 0.5
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
