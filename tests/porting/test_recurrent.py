"""Recurrent layers are ported with the cells, and the stacks of cells, that their twins are."""

import torch
from torch import nn

from torchjax_bridge import port


class _Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.lstm = nn.LSTM(6, 3, num_layers=2, batch_first=True)
        self.gru = nn.GRU(3, 4, batch_first=True)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        outputs, _ = self.lstm(self.embed(words))
        _, state = self.gru(outputs)
        return state[-1]


def test_a_net_of_recurrent_layers_is_ported() -> None:
    source = port(_Tagger().eval(), torch.randint(0, 10, (2, 5))).source  # which is proved
    assert "GRUCellWithStateBias" in source
