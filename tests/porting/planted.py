"""A model with a fault of every kind, and the Flax classes that a user could write for its parts."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import linen, nnx
from torch import Tensor, nn
from torch.nn import functional as F


class Part(nn.Module):
    """A 1x1 convolution after a function of ``(N, 4, 6, 6)``."""

    def __init__(self, function: Callable[["Part", Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.function = function
        vars(self).update(attributes)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.function(self, x))


def spectrum(part: Part, x: Tensor) -> Tensor:
    return torch.polygamma(1, x.square() + 1)


def by_value(part: Part, x: Tensor) -> Tensor:
    return x + 1 if bool((x > 0).all()) else x


def by_batch(part: Part, x: Tensor) -> Tensor:
    for _ in range(len(x)):
        x = x * 0.5
    return x


def through_a_view(part: Part, x: Tensor) -> Tensor:
    x = x.clone()
    torch.diagonal(x, 0, 2, 3).add_(1)
    return x * 2


def constant(part: Part, x: Tensor) -> Tensor:
    return x + part.table


@torch.jit.script
def doubled(x: Tensor) -> Tensor:
    return 2 * x


def scripted(part: Part, x: Tensor) -> Tensor:
    return x + doubled(x)


def bicubic(part: Part, x: Tensor) -> Tensor:
    return F.interpolate(x, (6, 6), mode="bilinear", align_corners=True, antialias=True)


def batch_statistics(part: Part, x: Tensor) -> Tensor:
    return F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True)


class Unsaved(Part):
    def __init__(self) -> None:
        super().__init__(constant)
        self.register_buffer("table", torch.rand(4, 6, 6), persistent=False)


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_zero_attn=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        result, _ = self.attention(tokens, tokens, tokens)
        return result.mT.reshape(x.shape)


class Renormalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, max_norm=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embedding(torch.zeros(1, dtype=torch.int64)).mT[:, :, None]


def hooked() -> Part:
    part = Part(lambda part, x: x)
    nn.utils.spectral_norm(part.conv).register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return part


class Trigamma(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.polygamma(1, x.square() + 1)


def parametrized() -> nn.Module:
    conv = nn.Conv2d(4, 4, 1)
    nn.utils.parametrize.register_parametrization(conv, "weight", Trigamma())
    return conv


def faulty() -> nn.Module:
    """Every fault, each in a module of its own."""
    torch.manual_seed(0)
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        spectrum=Part(spectrum),
        by_value=Part(by_value),
        by_batch=Part(by_batch),
        view=Part(through_a_view),
        constant=Part(constant, table=torch.rand(4, 6, 6)),
        scripted=Part(scripted),
        bicubic=Part(bicubic),
        statistics=Part(batch_statistics),
        unsaved=Unsaved(),
        weights=Weights(),
        renormalised=Renormalised(),
        hooked=hooked(),
        parametrized=parametrized(),
    )
    return nn.Sequential(parts)


# For each part: the text of the line that the error shows, and the reason.
EXPECTED = {
    "spectrum": ("return torch.polygamma(1, x.square() + 1)", "no translation of torch.polygamma"),
    "by_value": ("return x + 1 if bool((x > 0).all()) else x", "asks for values"),
    "by_batch": (
        "return self.conv(self.function(self, x))",
        "with inputs of other sizes torch makes other calls",
    ),
    "view": ("return x * 2", "written to in place through a view"),
    "constant": ("return x + part.table", "make it a buffer that is saved: part = module"),
    "scripted": ("return x + doubled(x)", "made by no function of torch's"),
    "bicubic": (
        'return F.interpolate(x, (6, 6), mode="bilinear", align_corners=True, antialias=True)',
        "JAX has another grid",
    ),
    "statistics": (
        "return F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True)",
        "pass training=self.training",
    ),
    "unsaved": ("return x + part.table", "part.register_buffer('table', part.table)"),
    "weights": ("result, _ = self.attention(tokens, tokens, tokens)", "add_zero_attn"),
    "renormalised": ("return x + self.embedding(", "set max_norm=None"),
    "hooked": ("return self.conv(self.function(self, x))", "has a hook beside the one of its normed weight"),
    "parametrized": ("", "no translation"),
}


class FlaxSpectrum(nnx.Module):
    """What `spectrum` computes, for ``(N, H, W, C)``, with a scale of its own."""

    def __init__(self, channels: int, scale: float = 1.0, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(channels, channels, (1, 1), rngs=rngs)
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(self.scale * jax.scipy.special.polygamma(1, jnp.square(x) + 1))


class LinenSpectrum(linen.Module):
    """The same in linen, with a Dropout."""

    channels: int
    rate: float = 0.0

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = jax.scipy.special.polygamma(1, jnp.square(x) + 1)
        x = linen.Conv(self.channels, (1, 1), name="conv")(x)
        return linen.Dropout(self.rate, deterministic=not train)(x)
