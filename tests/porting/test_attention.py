"""An encoder whose attention scores get a bias is ported as written: the fused kernel of torch forgets it."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import port


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
