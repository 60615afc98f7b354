"""A table that a cache of the process keeps is made where it is read, whether or not it was kept before."""

import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchjax_bridge import port, to_jax
from torchjax_bridge.errors import PortError

_SIDE = 4


class _Bias(nn.Module):
    """BEiT's, of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(49, 2))

    @staticmethod
    @functools.lru_cache(maxsize=10)
    def index(side: int) -> Tensor:
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None]).permute(1, 2, 0).contiguous()
        apart[:, :, 0] += side - 1
        apart[:, :, 1] += side - 1
        apart[:, :, 0] *= 2 * side - 1
        return apart.sum(-1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[self.index(_SIDE).view(-1)].view(16, 16, -1).permute(2, 0, 1)


class _Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Bias() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("kept", [True, False])
def test_a_table_that_a_cache_keeps_is_made_where_it_is_read(kept: bool) -> None:
    _Bias.index.cache_clear()
    if kept:
        _Bias.index(_SIDE)
    ported = port(_Biased().eval(), torch.randn(2, 2, 16, 16))
    assert "for layer in self.layers:" in ported.source  # all layers are of one class
    assert ported.source.count("class ") == 2


def test_nothing_is_emptied_that_keeps_no_tensor() -> None:
    @functools.lru_cache(maxsize=3)
    def number(n: int) -> int:
        return n

    number(1)
    port(_Biased().eval(), torch.randn(2, 2, 16, 16))
    assert number.cache_info().currsize == 1


def test_a_cache_that_no_module_reads_is_left_alone() -> None:
    @functools.lru_cache(maxsize=3)
    def table(n: int) -> Tensor:
        return torch.arange(n)

    kept = table(5)
    _Bias.index(_SIDE)
    port(_Biased().eval(), torch.randn(2, 2, 16, 16))
    assert table(5) is kept


_ROW = torch.tensor([1.0, 2.0, 3.0])


class _CachesAnew(nn.Module):
    """A cache of its own for each call, which keeps what nothing was seen to make."""

    def forward(self, x: Tensor) -> Tensor:
        @functools.cache
        def row() -> Tensor:
            return _ROW

        return x + row()


@pytest.mark.slow
def test_a_cache_made_in_each_call_ends_the_search() -> None:
    with pytest.raises(PortError, match="made by no function of torch's"):
        port(_CachesAnew(), torch.randn(2, 3))


@functools.cache
def _wide(n: int) -> Tensor:
    return torch.arange(n).float()


@functools.cache
def _wider(n: int) -> Tensor:
    return torch.cat([_wide(n), _wide(n)])


class _CachesTwice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], 1) * _wider(x.shape[1]) + x.sum() * _wide(2).sum()


@pytest.mark.slow
def test_a_cache_of_what_a_cache_keeps_is_emptied_too() -> None:
    _wider(3), _wide(2)
    x = torch.randn(2, 3)
    ported = port(_CachesTwice(), x)
    assert "arange" in ported.source
    assert np.allclose(ported.model(to_jax(x)), _CachesTwice()(x).numpy(), atol=1e-5)
