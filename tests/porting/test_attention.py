"""An encoder whose attention scores get a bias is ported as written: the fused kernel of torch forgets it."""

import torch
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
