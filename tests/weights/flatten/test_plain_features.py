"""Features that a run shows to be no map are not asked about, whatever their width; without a run they are."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

from torchjax_bridge import plan, to_flax


class Model(nn.Module):
    """A vision model: no layer gives the 12 that ``out`` takes, nor the 16 of ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, 8))
        self.scale = 0.5
        self.norm = nn.LayerNorm(8)
        self.up, self.out = nn.Linear(8, 24), nn.Linear(12, 8)
        self.head = nn.Linear(16, 10)

    def tokens(self, x: Any) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)

    def gated(self, x: Any) -> Any:
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.scale * self.out(F.silu(gate) * value)

    def both(self, x: Any) -> Any:
        return self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=-1))


class Twin(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.patch = nnx.Conv(3, 8, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, 8)))
        self.norm = nnx.LayerNorm(8, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.up, self.out = nnx.Linear(8, 24, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)


def _asked(forward: Callable[..., Any], inputs: Any = None) -> list[str]:
    module = type("Own", (Model,), {"forward": forward})()
    template = nnx.eval_shape(lambda: Twin(nnx.Rngs(0)))
    found = [fault.path for fault in plan(module, template, inputs=inputs).faults]
    if not found:
        to_flax(module, template, inputs=inputs)
    return found


def _plain(self: Any, x: Any) -> Any:
    return self.both(self.gated(self.tokens(x)))


def _split(self: Any, x: Any) -> Any:
    x = self.tokens(x)
    value, gate = self.up(x).split(12, -1)
    x = x + self.out(value * torch.sigmoid(gate))
    cls, mean = x[:, 0], x[:, 1:].mean(dim=1)
    return self.head(torch.cat((cls, mean), 1))


def _sliced(self: Any, x: Any) -> Any:
    y = self.up(self.tokens(x))
    x = self.out(y[..., :12] * F.gelu(y[..., 12:]))
    return self.both(x)


def _last(self: Any, x: Any) -> Any:
    x = self.patch(x).permute(0, 2, 3, 1)
    x = self.gated(x).mean((1, 2))
    return self.head(torch.cat([x, x], 1))


def _pooled(self: Any, x: Any) -> Any:
    x = self.patch(x)
    x = torch.cat([x.mean((2, 3)), torch.amax(x, dim=(2, 3))], 1)
    return self.head(x) + self.out(self.up(x[:, :8])[:, :12]).sum()


@pytest.mark.parametrize("forward", [_plain, _split, _sliced, _last, _pooled])
def test_a_gate_of_half_a_width_and_a_head_over_two_are_plain_in_a_run(forward: Callable[..., Any]) -> None:
    assert {*_asked(forward)} == {"out", "head"}
    assert _asked(forward, torch.randn(2, 3, 8, 8)) == []


def _flat_head(self: Any, x: Any) -> Any:
    return self.head(self.patch(x).flatten(1)) + self.gated(self.tokens(x)).sum()


def _viewed_head(self: Any, x: Any) -> Any:
    x = self.patch(x)
    return self.head(x.view(len(x), -1))


def _columns(self: Any, x: Any) -> Any:
    return self.head(self.patch(x).flatten(2).flatten(1))


def _added(self: Any, x: Any) -> Any:
    x = self.tokens(x)
    return self.head(torch.cat([x[:, 0], x[:, 0]], 1) + self.unknown(x))


def _scaled_map(self: Any, x: Any) -> Any:
    return self.head((self.patch(x) * self.scale + self.cls).flatten(1))


def _unknown(self: Any, x: Any) -> Any:
    return self.head((self.unknown(self.patch(x)) + self.cls).flatten(1))


def _swapped(self: Any, x: Any) -> Any:
    return self.head(self.patch(x).permute(0, 1, 3, 2).flatten(1))


def _two_ways(self: Any, x: Any) -> Any:
    plain = self.tokens(x)
    return self.head(torch.cat([plain[:, 0], plain[:, 1]], -1)) + self.head(self.patch(x).flatten(1))


def _branch(self: Any, x: Any, last: bool = False) -> Any:
    y = self.tokens(x)
    y = torch.cat([y[:, 0], y[:, 1]], -1)
    if last:
        y = self.patch(x).flatten(1)
    return self.head(y)


@pytest.mark.parametrize(
    "forward",
    [_flat_head, _viewed_head, _columns, _added, _scaled_map, _unknown, _swapped, _two_ways, _branch],
)
def test_a_head_that_may_read_a_flattened_map_is_asked_about(forward: Callable[..., Any]) -> None:
    assert "head" in _asked(forward)
