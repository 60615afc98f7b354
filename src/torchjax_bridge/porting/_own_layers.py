"""Layers that an emitted file holds where Flax has none of the same meaning: those of ``weights.layers``.

Each is filled by the same rules as the layer of Flax that it derives from.
"""

__all__ = ["OWN_LAYERS", "OWN_NAMES"]

# By the name in `weights.layers`: the name in the file, where Flax's own may stand beside it.
OWN_NAMES = {
    "BatchNorm": "UnbiasedBatchNorm",
    "GRUCell": "GRUCellWithStateBias",
    "LayerNorm": "LayerNormOverAxes",
    "PReLU": "ChannelPReLU",
    "RMSNorm": "RMSNormOverAxes",
}

OWN_LAYERS = {
    "GRUCellWithStateBias": '''
class GRUCellWithStateBias(nnx.GRUCell):
    """``nnx.GRUCell`` with a bias on the state too, which the reset gate scales."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        recurrent_kernel_init: Any = None,
        rngs: nnx.Rngs,
        **settings: Any,
    ) -> None:
        super().__init__(in_features, hidden_features, rngs=rngs, **settings)
        init = recurrent_kernel_init or nnx.initializers.orthogonal()
        self.dense_h = nnx.Linear(hidden_features, 3 * hidden_features, kernel_init=init, rngs=rngs)
''',
    "UnbiasedBatchNorm": '''
class UnbiasedBatchNorm(nnx.BatchNorm):
    """``nnx.BatchNorm`` that averages the unbiased variance of each batch, as PyTorch does."""

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        kept = self.momentum * self.var[...]
        y = super().__call__(x, use_running_average, mask=mask)
        if not (self.use_running_average if use_running_average is None else use_running_average):
            count = x.size // x.shape[-1]
            self.var[...] = kept + (self.var[...] - kept) * (count / (count - 1))
        return y
''',
    "LayerNormOverAxes": '''
class LayerNormOverAxes(nnx.LayerNorm):
    """``nnx.LayerNorm`` with a scale and a bias of several axes."""

    def __init__(self, num_features: tuple[int, ...], **settings: Any) -> None:
        super().__init__(math.prod(num_features), **settings)
        for flat in (self.scale, self.bias):
            if flat is not None:
                flat.set_value(flat[...].reshape(num_features))
''',
    "RMSNormOverAxes": '''
class RMSNormOverAxes(nnx.RMSNorm):
    """``nnx.RMSNorm`` with a scale of several axes."""

    def __init__(self, num_features: tuple[int, ...], **settings: Any) -> None:
        super().__init__(math.prod(num_features), **settings)
        if self.scale is not None:
            self.scale.set_value(self.scale[...].reshape(num_features))
''',
    "ChannelPReLU": '''
class ChannelPReLU(nnx.PReLU):
    """``nnx.PReLU`` with one slope a channel."""

    def __init__(self, features: int, negative_slope_init: float = 0.25) -> None:
        super().__init__(negative_slope_init)
        self.negative_slope.set_value(jnp.full((features,), negative_slope_init))
''',
}
