"""ViT of benchmarks.port.cifar.vit, in Flax.

Made with torchjax-bridge X from PyTorch X, for Flax X. Images are ``(N, H, W, C)``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers

kernel_init = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Linear = partial(nnx.Linear, kernel_init=kernel_init)
LayerNorm = partial(nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False)


class Attention(nnx.Module):
    """Attention of benchmarks.port.cifar.vit."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.heads = 4
        self.scale = 0.25
        self.qkv = Linear(64, 192, use_bias=False, rngs=rngs)
        self.attn_drop = nnx.Dropout(0.1, rngs=rngs)
        self.proj = Linear(64, 64, rngs=rngs)
        self.proj_drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, L, C)`` to ``(N, L, C)``."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads)
        q = qkv[:, :, 0]
        k = qkv[:, :, 1]
        v = qkv[:, :, 2]
        attn = jnp.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        attn = nnx.softmax(attn, axis=-1)
        attn = self.attn_drop(attn)
        x = jnp.einsum("bhqd,bdhk->bqhk", attn, v).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class FeedForward(nnx.Module):
    """FeedForward of benchmarks.port.cifar.vit."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.net = nnx.Sequential(
            Linear(64, 128, rngs=rngs),
            lambda x: nnx.gelu(x, approximate=False),
            nnx.Dropout(0.1, rngs=rngs),
            Linear(128, 64, rngs=rngs),
            nnx.Dropout(0.1, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, L, C)`` to ``(N, L, C)``."""
        return self.net(x)


class PreNorm(nnx.Module):
    """PreNorm of benchmarks.port.cifar.vit."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = LayerNorm(64, rngs=rngs)
        self.fn = Attention(rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, L, C)`` to ``(N, L, C)``."""
        return self.fn(self.norm(x))


class PreNorm2(nnx.Module):
    """PreNorm of benchmarks.port.cifar.vit."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = LayerNorm(64, rngs=rngs)
        self.fn = FeedForward(rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, L, C)`` to ``(N, L, C)``."""
        return self.fn(self.norm(x))


class Transformer(nnx.Module):
    """Transformer of benchmarks.port.cifar.vit."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.List([PreNorm(rngs=rngs), PreNorm2(rngs=rngs)]) for _ in range(3)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, L, C)`` to ``(N, L, C)``."""
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return x


class ViT(nnx.Module):
    """ViT of benchmarks.port.cifar.vit."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.patch_embed = nnx.Conv(
            3, 64, (4, 4), strides=4, padding="VALID", kernel_init=kernel_init, rngs=rngs
        )
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.transformer = Transformer(rngs=rngs)
        self.mlp_head = nnx.Sequential(LayerNorm(64, rngs=rngs), Linear(64, 10, rngs=rngs))
        self.cls_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, 64)))
        self.pos_embedding = nnx.Param(jax.random.normal(rngs.params(), (1, 65, 64)))

    def __call__(self, img: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, C)``."""
        x = self.patch_embed(img)
        x = x.reshape(x.shape[0], -1, x.shape[3])
        b, n, _ = x.shape
        cls_tokens = jnp.broadcast_to(
            self.cls_token[...], (b, self.cls_token[...].shape[1], self.cls_token[...].shape[2])
        )
        x = jnp.concatenate([cls_tokens, x], axis=1)
        x = x + self.pos_embedding[...][:, : n + 1]
        x = self.dropout(x)
        x = self.transformer(x)
        return self.mlp_head(x[:, 0])
