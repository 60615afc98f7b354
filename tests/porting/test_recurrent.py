"""Recurrent layers are ported with the cells, and the stacks of cells, that their twins are."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from torchjax_bridge import port
from torchjax_bridge.errors import PortError


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


class _Packs(nn.Module):
    """Sequences of several lengths, in any order, as most code packs them."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.lstm = nn.LSTM(4, 3, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed, (hidden, _) = self.lstm(packed)
        hidden = hidden + self.lstm(pack_padded_sequence(2 * x, lengths, True, enforce_sorted=False))[1][0]
        total = x.size(1) if self.whole else None
        outputs, _ = pad_packed_sequence(packed, batch_first=True, padding_value=-1.0, total_length=total)
        return outputs, hidden


@pytest.mark.slow
def test_packed_sequences_are_padded_ones_with_their_lengths() -> None:
    module = _Packs(whole=True)
    ported = port(module, torch.randn(3, 5, 4), torch.tensor([2, 5, 3]), training="none")
    assert not any("longest" in note for note in ported.notes)
    x, lengths = torch.randn(4, 6, 4), torch.tensor([1, 4, 6, 2])
    got = ported.model(jnp.asarray(x.numpy()), jnp.asarray(lengths.numpy()))
    for one, other in zip(got, module(x, lengths), strict=True):
        assert np.abs(np.asarray(one) - other.detach().numpy()).max() <= 1e-5


def test_a_length_that_torch_cuts_to_is_a_condition() -> None:
    x, lengths = torch.randn(3, 5, 4), torch.tensor([2, 5, 3])
    notes = port(_Packs(whole=False), x, lengths, training="none", verify=False).notes
    assert any("whose longest sequence is as long as the padded tensor" in note for note in notes)


class _Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed, _ = self.lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        return pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]


def test_what_follows_from_a_layer_without_translation_is_no_fault_of_its_own() -> None:
    with pytest.raises(PortError) as caught:
        port(_Deep(), torch.randn(3, 5, 4), torch.tensor([2, 5, 3]), to="linen")
    [fault] = caught.value.faults
    assert "linen's Sequential of 2 layers" in str(fault)
