"""Functions that an emitted file holds where JAX has none of the same meaning.

Each is source, written as it appears, for arrays with channels last.
"""

from ._own_layers import OWN_LAYERS

__all__ = ["HELPERS"]

HELPERS = {
    **OWN_LAYERS,
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
def adaptive_avg_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Average ``(N, H, W, C)`` over ``size`` windows, which overlap where the size divides no side."""

    def weights(given: int, wanted: int) -> np.ndarray:
        starts = [place * given // wanted for place in range(wanted)]
        ends = [-(-(place + 1) * given // wanted) for place in range(wanted)]
        rows = np.zeros((wanted, given), np.float32)
        for row, start, end in zip(rows, starts, ends, strict=True):
            row[start:end] = 1 / (end - start)
        return rows

    if x.shape[1] % size[0] == 0 and x.shape[2] % size[1] == 0:
        window = (x.shape[1] // size[0], x.shape[2] // size[1])
        return nnx.avg_pool(x, window, strides=window)
    return jnp.einsum("nhwc,ih,jw->nijc", x, weights(x.shape[1], size[0]), weights(x.shape[2], size[1]))
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
def resize_corners(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear interpolation of ``(N, H, W, C)`` whose corners stay where they are."""

    def weights(given: int, wanted: int) -> np.ndarray:
        at = np.linspace(0, given - 1, wanted)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(given))).astype(np.float32)

    return jnp.einsum("nhwc,ih,jw->nijc", x, weights(x.shape[1], size[0]), weights(x.shape[2], size[1]))
''',
}
