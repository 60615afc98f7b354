"""The layers of ``nn.TransformerEncoder`` and ``nn.TransformerDecoder`` in linen and nnx, under torch's names."""

from collections.abc import Callable
from typing import Any

import flax.linen as ln
from flax import nnx

WIDTH, HEADS, WIDE = 8, 2, 12


class LinenLayer(ln.Module):
    """A layer of torch's encoder, or with ``cross`` of its decoder, under torch's names."""

    activation: Callable[..., Any] = ln.relu
    norm_first: bool = False
    cross: bool = False

    def setup(self) -> None:
        self.self_attn = ln.MultiHeadDotProductAttention(HEADS)
        if self.cross:
            self.multihead_attn = ln.MultiHeadDotProductAttention(HEADS)
        self.linear1, self.linear2 = ln.Dense(WIDE), ln.Dense(WIDTH)
        self.norm1, self.norm2, self.norm3 = (ln.LayerNorm(epsilon=1e-5) for _ in range(3))

    def __call__(self, x, memory=None):
        steps = [(self.norm1, lambda y: self.self_attn(y, y))]
        if self.cross:
            steps.append((self.norm2, lambda y: self.multihead_attn(y, memory)))
        norm = self.norm3 if self.cross else self.norm2
        steps.append((norm, lambda y: self.linear2(self.activation(self.linear1(y)))))
        for norm, step in steps:
            x = x + step(norm(x)) if self.norm_first else norm(x + step(x))
        return x


class LinenStack(ln.Module):
    """A ``TransformerEncoder`` or ``TransformerDecoder``."""

    cross: bool = False
    final: bool = False
    count: int = 2

    def setup(self) -> None:
        self.layers = [LinenLayer(cross=self.cross) for _ in range(self.count)]
        self.norm = ln.LayerNorm(epsilon=1e-5)

    def __call__(self, x, memory=None):
        for layer in self.layers:
            x = layer(x, memory)
        return self.norm(x) if self.final else x


class NnxLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, cross: bool = False, gelu: bool = False) -> None:
        def attention():
            return nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)

        self.self_attn = attention()
        if cross:
            self.multihead_attn = attention()
        self.linear1, self.linear2 = nnx.Linear(WIDTH, WIDE, rngs=rngs), nnx.Linear(WIDE, WIDTH, rngs=rngs)
        for name in ("norm1", "norm2", "norm3")[: 3 if cross else 2]:
            setattr(self, name, nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs))
        self.cross, self.gelu = cross, gelu

    def __call__(self, x, memory=None):
        x = self.norm1(x + self.self_attn(x))
        if self.cross:
            x = self.norm2(x + self.multihead_attn(x, memory))
        y = self.linear1(x)
        y = self.linear2(nnx.gelu(y, approximate=False) if self.gelu else nnx.relu(y))
        return (self.norm3 if self.cross else self.norm2)(x + y)


class NnxStack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, cross: bool = False) -> None:
        self.layers = nnx.List([NnxLayer(rngs, cross) for _ in range(2)])

    def __call__(self, x, memory=None):
        for layer in self.layers:
            x = layer(x, memory)
        return x
