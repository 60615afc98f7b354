"""linen layers with torch's semantics: `BatchNorm`, `PReLU` (linen's own ``GRUCell`` has both biases)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from ._variance import running_variance

__all__ = ["BatchNorm", "PReLU"]


class BatchNorm(linen.BatchNorm):
    """``linen.BatchNorm`` whose running variance is torch's, from the unbiased variance of each batch.

    Takes the arguments of ``linen.BatchNorm``; ``momentum`` is Flax's, 1 minus torch's. Evaluation is the same as
    with ``linen.BatchNorm``. Channels last: ``(N, ..., C)``.

    Raises:
        ValueError: In training, a batch of one value a channel; torch refuses it too.

    >>> layer = BatchNorm(momentum=0.5, use_running_average=False)
    >>> x = jnp.asarray([[0.0, 0.0], [2.0, 4.0]])
    >>> _, state = layer.apply(layer.init(jax.random.key(0), x), x, mutable="batch_stats")
    >>> state["batch_stats"]["var"]  # 0.5 * 1 + 0.5 * unbiased variance (2, 8)
    Array([1.5, 4.5], dtype=float32)
    """

    @linen.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """Normalise ``x``, and outside evaluation take its statistics into account."""
        evaluate = linen.merge_param("use_running_average", self.use_running_average, use_running_average)
        if evaluate or self.is_initializing():
            return super().__call__(x, use_running_average, mask=mask)
        before: jax.Array = self.get_variable("batch_stats", "var")
        y = super().__call__(x, use_running_average, mask=mask)
        after = running_variance(
            before,
            self.get_variable("batch_stats", "var"),
            x,
            axis=self.axis,
            momentum=self.momentum,
            axis_name=self.axis_name,
            mask=mask,
        )
        self.put_variable("batch_stats", "var", after)
        return y


class PReLU(linen.Module):
    """``linen.PReLU`` with one slope a channel of the last axis.

    Attributes:
        features: The number of channels; inputs are ``(..., features)``.
        negative_slope_init: What every slope starts from (torch's 0.25).
        param_dtype: The dtype of the slopes.

    >>> layer = PReLU(2)
    >>> x = jnp.asarray([-4.0, 4.0])
    >>> layer.apply(layer.init(jax.random.key(0), x), x)
    Array([-1.,  4.], dtype=float32)
    """

    features: int
    negative_slope_init: float = 0.25
    param_dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """``inputs`` where they are not negative, the slopes times ``inputs`` elsewhere."""
        start = linen.initializers.constant(self.negative_slope_init)
        slope = self.param("negative_slope", start, (self.features,), self.param_dtype)
        return jnp.where(inputs >= 0, inputs, jnp.asarray(slope, inputs.dtype) * inputs)
