"""nnx layers with torch's semantics: `BatchNorm`, `GRUCell`, `LayerNorm`, `PReLU`, `RMSNorm`."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._variance import running_variance

__all__ = ["BatchNorm", "GRUCell", "LayerNorm", "PReLU", "RMSNorm"]

_orthogonal = nnx.initializers.orthogonal()
_zeros = nnx.initializers.zeros_init()


class BatchNorm(nnx.BatchNorm):
    """``nnx.BatchNorm`` whose running variance is torch's, from the unbiased variance of each batch.

    Takes the arguments of ``nnx.BatchNorm``; ``momentum`` is Flax's, 1 minus torch's. Evaluation is the same as
    with ``nnx.BatchNorm``. Channels last: ``(N, ..., C)``.

    Raises:
        ValueError: In training, a batch of one value a channel; torch refuses it too.

    >>> layer = BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.asarray([[0.0, 0.0], [2.0, 4.0]]))
    >>> layer.var[...]  # 0.5 * 1 + 0.5 * unbiased variance (2, 8)
    Array([1.5, 4.5], dtype=float32)
    """

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """Normalise ``x``, and outside evaluation take its statistics into account."""
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        before = self.var[...]
        y = super().__call__(x, use_running_average, mask=mask)
        if not evaluate:
            self.var[...] = jax.lax.stop_gradient(
                running_variance(
                    before,
                    self.var[...],
                    x,
                    axis=self.axis,
                    momentum=self.momentum,
                    axis_name=self.axis_name,
                    mask=mask,
                )
            )
        return y


class GRUCell(nnx.GRUCell):
    """``nnx.GRUCell`` with a bias on the state too, as torch's GRU has.

    ``n = tanh(W_in x + b_in + r * (W_hn h + b_hn))``: ``b_hn`` is inside the reset, so no other bias can stand in
    for it. Takes the arguments of ``nnx.GRUCell``, and goes into an ``nnx.RNN`` like it.

    >>> cell = GRUCell(3, 4, rngs=nnx.Rngs(0))
    >>> cell.dense_h.bias.shape
    (12,)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        recurrent_kernel_init: Callable[..., Any] = _orthogonal,
        bias_init: Callable[..., Any] = _zeros,
        rngs: nnx.Rngs,
        **settings: Any,
    ) -> None:
        super().__init__(in_features, hidden_features, bias_init=bias_init, rngs=rngs, **settings)
        self.dense_h = nnx.Linear(
            hidden_features,
            3 * hidden_features,
            kernel_init=recurrent_kernel_init,
            bias_init=bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            promote_dtype=self.promote_dtype,
            rngs=rngs,
        )


class LayerNorm(nnx.LayerNorm):
    """``nnx.LayerNorm`` over several axes, with a scale and a bias of their shape.

    ``nnx.LayerNorm`` makes them flat, whatever its axes.

    Args:
        num_features: The sizes of the axes.
        settings: As for ``nnx.LayerNorm``, ``reduction_axes`` and ``feature_axes`` among them.

    >>> LayerNorm((4, 5), reduction_axes=(-2, -1), feature_axes=(-2, -1), rngs=nnx.Rngs(0)).scale.shape
    (4, 5)
    """

    def __init__(self, num_features: tuple[int, ...], **settings: Any) -> None:
        super().__init__(prod(num_features), **settings)
        for flat in (self.scale, self.bias):
            if flat is not None:
                flat.set_value(flat[...].reshape(num_features))


class RMSNorm(nnx.RMSNorm):
    """``nnx.RMSNorm`` over several axes, with a scale of their shape.

    Args:
        num_features: The sizes of the axes.
        settings: As for ``nnx.RMSNorm``, ``reduction_axes`` and ``feature_axes`` among them.

    >>> RMSNorm((4, 5), reduction_axes=(-2, -1), feature_axes=(-2, -1), rngs=nnx.Rngs(0)).scale.shape
    (4, 5)
    """

    def __init__(self, num_features: tuple[int, ...], **settings: Any) -> None:
        super().__init__(prod(num_features), **settings)
        if self.scale is not None:
            self.scale.set_value(self.scale[...].reshape(num_features))


class PReLU(nnx.PReLU):
    """``nnx.PReLU`` with one slope a channel of the last axis.

    Args:
        features: The number of channels; inputs are ``(..., features)``.
        negative_slope_init: What every slope starts from (torch's 0.25).
        settings: As for ``nnx.PReLU``.

    >>> PReLU(2)(jnp.asarray([-4.0, 4.0]))
    Array([-1.,  4.], dtype=float32)
    """

    def __init__(self, features: int, negative_slope_init: float = 0.25, **settings: Any) -> None:
        super().__init__(negative_slope_init, **settings)
        self.negative_slope.set_value(jnp.full((features,), negative_slope_init, self.param_dtype))
