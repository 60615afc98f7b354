"""An encoder whose attention scores get a bias is ported as written: the fused kernel of torch forgets it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

from torchjax_bridge import port
from torchjax_bridge.errors import PortError


class _Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.size(1))
        bias = -(at[None] - at[:, None]).abs().float()
        slopes = torch.tensor([0.5, 0.25])[:, None, None]
        return self.layer(x, src_mask=(slopes * bias).repeat(x.size(0), 1, 1))


def test_a_bias_on_the_scores_of_an_encoder_is_ported() -> None:
    assert "bias=" in port(_Biased(), torch.randn(2, 5, 4)).source  # which is proved


class _Causal(nn.Module):
    """The mask is an argument, of floats, and torch looks whether it is causal."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, mask)


@pytest.mark.slow
def test_a_mask_of_floats_is_taken_in_both_modes_whether_or_not_it_is_causal() -> None:
    module, causal = _Causal(), nn.Transformer.generate_square_subsequent_mask(5)
    ported = port(module, torch.randn(2, 5, 4), causal, training="required")
    x, bias = torch.randn(3, 5, 4), torch.randn(5, 5)
    want = module.eval()(x, bias).detach().numpy()
    given = jnp.asarray(x.numpy()), jnp.asarray(bias.numpy())
    assert np.abs(np.asarray(ported.model(*given)) - want).max() <= 1e-5
    ported.model.train()
    for _, part in nnx.iter_modules(ported.model):
        if isinstance(part, nnx.Dropout):
            part.rate = 0.0
    assert np.abs(np.asarray(ported.model(*given)) - want).max() > 1e-3  # the attention drops


class _Turned(nn.Module):
    """transformers' rotary angles get an axis for the heads, which the port has behind the length."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        split = (*x.shape[:2], 2, 4)
        query, key = (layer(x).view(split).transpose(1, 2) for layer in (self.query, self.key))
        cos = angles.cos().unsqueeze(1)
        sin = angles.sin().unsqueeze(1)
        query = query * cos + query.flip(-1) * sin
        key = key * cos + key.flip(-1) * sin
        return nn.functional.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)


def test_a_new_axis_is_put_where_it_is_wanted() -> None:
    source = port(_Turned(), torch.randn(2, 5, 8), torch.randn(2, 5, 4)).source
    assert source.count("jnp.expand_dims(jnp.cos(angles), 2)") == 1
    assert "swapaxes" not in source


class _Padded(nn.Module):
    """A mask of padding, and the encoder as torch makes it by default: with nested tensors where it can."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x, src_key_padding_mask=hidden)
        return x.masked_fill(hidden[..., None], 0).sum(1)


@pytest.mark.every(2)
@pytest.mark.parametrize("frozen", [True, False])
def test_an_encoder_with_padding_is_ported_as_written(frozen: bool) -> None:
    module = _Padded().eval().requires_grad_(not frozen)
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert "NESTED" not in port(module, torch.randn(2, 5, 4), hidden).source.upper()
    assert torch.backends.mha.get_fastpath_enabled()


class _Function(nn.Module):
    """Attention by torch's function, with the weights of layers of its own."""

    def __init__(self, separate: bool, needs: bool, averages: bool = True) -> None:
        super().__init__()
        self.separate, self.needs, self.averages = separate, needs, averages
        if separate:
            self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(5, 8)
        else:
            self.weight, self.bias = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor, hidden: Tensor) -> Any:
        weight, bias, own = None, None, {}
        if self.separate:
            layers = self.query, self.key, self.value
            bias = torch.cat([layer.bias for layer in layers])
            names = "q_proj_weight", "k_proj_weight", "v_proj_weight"
            own = dict(zip(names, (layer.weight for layer in layers), strict=True))
        else:
            weight, bias = self.weight, self.bias
        given = (8, 2, weight, bias, None, None, False, 0.5, self.out.weight, self.out.bias)
        return F.multi_head_attention_forward(
            x, key, value, *given, training=self.training, key_padding_mask=hidden, attn_mask=mask,
            need_weights=self.needs, average_attn_weights=self.averages, use_separate_proj_weight=self.separate,
            **own,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("separate", "needs", "averages", "of_heads"),
    [(True, False, True, False), (False, True, True, True), (True, True, False, False)],
)
def test_the_function_of_attention_is_taken_apart(
    separate: bool, needs: bool, averages: bool, of_heads: bool
) -> None:
    module = _Function(separate, needs, averages).eval()
    draw = torch.Generator().manual_seed(0)
    widths = (8, 6, 5) if separate else (8, 8, 8)
    x, key, value = (
        torch.randn(n, 3, width, generator=draw) for n, width in zip((4, 7, 7), widths, strict=True)
    )
    mask = torch.zeros(6, 4, 7) if of_heads else torch.arange(28).view(4, 7) % 5 == 1
    mask = mask + torch.randn(6, 4, 7, generator=draw) if of_heads else mask
    hidden = torch.arange(21).view(3, 7) % 6 == 2
    hidden = -3.0 * hidden if of_heads else hidden  # both are added, or both hide
    ported = port(module, x, key, value, mask, hidden)  # proved
    assert "multi_head" not in ported.source
    want = module(x, key, value, mask, hidden)
    got = ported.model(*(jnp.asarray(one.numpy()) for one in (x, key, value, mask, hidden)))
    for one, other in zip(want, got, strict=True):
        assert one is other is None or np.allclose(one.detach(), other, atol=1e-5)


def test_what_the_function_of_attention_adds_to_the_keys_is_refused() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.out = nn.Parameter(torch.randn(24, 8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            given = (8, 2, self.weight, None, None, None, True, 0.0, self.out.weight, self.out.bias)
            return F.multi_head_attention_forward(x, x, x, *given)[0]

    with pytest.raises(PortError, match="multi_head_attention_forward"):
        port(Adds(), torch.randn(4, 3, 8))
