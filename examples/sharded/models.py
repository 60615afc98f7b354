"""A small transformer, in torch and in nnx, with the same names and the same numbers."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

__all__ = ["LENGTH", "VOCABULARY", "FlaxModel", "TorchModel", "batch"]

VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS = 32, 16, 64, 4, 2


def batch(step: int, size: int = 32) -> torch.Tensor:
    """Token sequences of shape ``(size, LENGTH + 1)``: each is the one before plus a number of its own."""
    random = torch.Generator().manual_seed(step)
    first, stride = (torch.randint(1, VOCABULARY, (size, 1), generator=random) for _ in range(2))
    return (first + stride * torch.arange(LENGTH + 1)) % VOCABULARY


class TorchBlock(nn.Module):
    """Attention and a two-layer network, each behind a norm and beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.between = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``x`` has the shape ``(batch, length, WIDTH)``; ``hidden`` the pairs that must not see each other."""
        y = self.before(x)
        x = x + self.attention(y, y, y, attn_mask=hidden, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(self.between(x))))


class TorchModel(nn.Module):
    """Tokens of shape ``(batch, length)`` to logits of shape ``(batch, length, VOCABULARY)``."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(TorchBlock() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits of the token after each."""
        length = tokens.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.token(tokens) + self.place(torch.arange(length))
        for block in self.blocks:
            x = block(x, hidden)
        return self.head(x)


class FlaxBlock(nnx.Module):
    """The twin of `TorchBlock`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.before = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.between = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
        """``x`` has the shape ``(batch, length, WIDTH)``; ``seen`` marks the pairs that may see each other."""
        x = x + self.attention(self.before(x), mask=seen)
        return x + self.down(jax.nn.relu(self.up(self.between(x))))


class FlaxModel(nnx.Module):
    """The twin of `TorchModel`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.token = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.place = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List(FlaxBlock(rngs) for _ in range(LAYERS))
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The logits of the token after each."""
        seen = nnx.make_causal_mask(tokens)
        x = self.token(tokens) + self.place(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, seen)
        return self.head(x)
