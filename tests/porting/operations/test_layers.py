"""Layers of torch's own give what torch gives wherever the axes of their inputs stand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.weights.twins import randomise

from .driver import Case, check, check_all, reasons, tensor

MAPS = tensor(2, 4, 5, 6)
LINE = tensor(2, 4, 7)
WORDS = tensor(2, 5, 8)
MASK = torch.tensor([[False, False, True, False, True], [False] * 5])


def _case(
    layer: nn.Module, *inputs: torch.Tensor, call: Callable[..., Any] | None = None, words: str = ""
) -> Case:
    randomise(layer).eval()
    name = f"{layer} {words}".replace("\n", "")
    return Case(name, call or (lambda layer, *inputs: layer(*inputs)), inputs, tolerance=1e-5, layer=layer)


def _attention(call: Callable[..., Any], words: str, *inputs: torch.Tensor, **settings: Any) -> Case:
    layer = nn.MultiheadAttention(8, 2, **{"batch_first": True, **settings})
    return _case(layer, *inputs, call=call, words=words)


def _constant(mask: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda layer, x: layer(x, x, x, attn_mask=torch.triu(torch.ones(5, 5, dtype=torch.bool), 1))[0]


CASES = [
    _case(nn.Linear(8, 3), WORDS),
    _case(nn.Linear(4, 3, bias=False), MAPS, call=lambda layer, x: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    _case(nn.Linear(4 * 5 * 6, 3), MAPS, call=lambda layer, x: layer(x.flatten(1)), words="behind a flatten"),
    _case(nn.Linear(4 * 5 * 6, 3), MAPS, call=lambda layer, x: layer(x.flatten(1).relu() * 2), words="behind a flatten and a function"),
    _case(nn.BatchNorm1d(4 * 5 * 6), MAPS, call=lambda layer, x: layer(x.flatten(1)).sum(1), words="behind a flatten"),
    _case(nn.Conv1d(4, 6, 3, stride=2, padding=1), LINE),
    _case(nn.Conv2d(4, 6, (3, 5), padding="same", groups=2), MAPS),
    _case(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), MAPS),
    _case(nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular", dilation=2), MAPS),
    _case(nn.Conv3d(2, 3, 2), tensor(2, 2, 3, 4, 5)),
    _case(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), MAPS),
    _case(nn.ConvTranspose1d(4, 6, 2, stride=2), LINE),
    _case(nn.BatchNorm1d(4), tensor(5, 4)),
    _case(nn.BatchNorm1d(4), LINE),
    _case(nn.BatchNorm2d(4, eps=1e-3), MAPS),
    _case(nn.BatchNorm3d(2, affine=False), tensor(2, 2, 3, 4, 5)),
    _case(nn.BatchNorm2d(4, track_running_stats=False), MAPS),
    _case(nn.GroupNorm(2, 4), MAPS),
    _case(nn.GroupNorm(2, 8), tensor(3, 8)),
    _case(nn.InstanceNorm2d(4, affine=True), MAPS),
    _case(nn.InstanceNorm1d(4), LINE),
    _case(nn.LayerNorm(8), WORDS),
    _case(nn.LayerNorm((5, 6), eps=1e-3), MAPS),
    _case(nn.LayerNorm(4), MAPS, call=lambda layer, x: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    _case(nn.RMSNorm(8), WORDS),
    _case(nn.Embedding(5, 3, padding_idx=0), tensor(2, 7, dtype=torch.int64, low=0, high=5)),
    _case(nn.PReLU(), MAPS),
    _case(nn.PReLU(4), MAPS),
    _case(nn.PReLU(8), tensor(3, 8)),
    _case(nn.Dropout(0.5), MAPS),
    _case(nn.Dropout2d(0.5), MAPS),
    _attention(lambda layer, x: layer(x, x, x)[0], "of itself", WORDS),
    _attention(lambda layer, x: layer(x, x, x, need_weights=False)[0], "length first", WORDS, batch_first=False),
    _attention(lambda layer, x, y: layer(x, y, y)[0], "of another", WORDS, tensor(2, 3, 8)),
    _attention(lambda layer, x, y: layer(x, y, y)[0], "with other widths", WORDS, tensor(2, 3, 6), kdim=6, vdim=6),
    _attention(lambda layer, x, y, m: layer(x, y, y, key_padding_mask=m)[0], "padded", WORDS, WORDS * 2, MASK),
    _attention(lambda layer, x, m: layer(x, x, x, m)[0], "padded, length first", WORDS.transpose(0, 1), MASK, batch_first=False),
    _attention(_constant(MASK), "causal", WORDS),
    _attention(lambda layer, x, m, p: layer(x, x, x, attn_mask=m, key_padding_mask=p)[0], "with two masks", WORDS, torch.triu(torch.ones(5, 5), 1).bool(), MASK),
    _attention(lambda layer, x, m: layer(x, x, x, attn_mask=m)[0], "with a mask of heads", WORDS, (tensor(4, 5, 5) > 0.5) & ~torch.eye(5).bool()),
    _attention(lambda layer, x: layer(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(5))[0], "with torch's causal mask", WORDS),
    _attention(lambda layer, x, m: layer(x, x, x, attn_mask=torch.zeros(5, 5).masked_fill(m, -torch.inf))[0], "with a mask that is added", WORDS, torch.triu(torch.ones(5, 5), 1).bool()),
    _attention(lambda layer, x, y, m: layer(x, y, y, key_padding_mask=m), "with weights", WORDS, WORDS * 2, MASK),
    _attention(lambda layer, x, m, p: layer(x, x, x, attn_mask=m, key_padding_mask=p, average_attn_weights=False), "with a bias", WORDS.transpose(0, 1), tensor(5, 5), torch.zeros(2, 5), batch_first=False),
    *(
        _case(kind(8, 3, batch_first=first, bidirectional=both), WORDS, call=lambda layer, x: layer(x)[0])
        for kind in (nn.LSTM, nn.GRU, nn.RNN) for first, both in ((True, False), (False, True))
    ),
    _case(nn.LSTM(8, 3, num_layers=2, batch_first=True), WORDS, call=lambda layer, x: layer(x)[0].mean(1)),
    _case(nn.LSTM(8, 3, batch_first=True), WORDS, call=lambda layer, x: (layer(x)[0], *layer(x)[1]), words="with its states"),
    _case(nn.LSTM(8, 3, bidirectional=True), WORDS, call=lambda layer, x: layer(x)[1][0].sum(0), words="with its states"),
    _case(nn.GRU(8, 3, bidirectional=True, batch_first=True), WORDS, call=lambda layer, x: layer(x)[1], words="with its state"),
    _case(nn.LSTM(8, 3, num_layers=2, dropout=0.5, bidirectional=True, batch_first=True), WORDS, tensor(4, 2, 3), tensor(4, 2, 3) * 2, call=lambda layer, x, h, c: (layer(x, (h, c))[0], *layer(x)[1]), words="of several layers, from states"),
    _case(nn.GRU(8, 3, num_layers=2), WORDS, tensor(2, 5, 3), call=lambda layer, x, h: layer(x, h), words="of several layers, from a state"),
    _case(nn.GRUCell(8, 3), WORDS[0], tensor(5, 3), call=lambda layer, x, h: layer(x, h) + layer(x)),
    _case(nn.LSTMCell(8, 3), WORDS[0], tensor(5, 3), call=lambda layer, x, h: layer(x, layer(x, (h, h * 2)))),
    _case(nn.RNNCell(8, 3, nonlinearity="relu"), WORDS[0], tensor(5, 3), call=lambda layer, x, h: layer(x, h)),
    _case(nn.RNN(8, 3, nonlinearity="relu"), WORDS, call=lambda layer, x: layer(x)[1][-1], words="with its state"),
]  # fmt: skip


@pytest.mark.parametrize("part", range(4))
def test_a_layer(part: int) -> None:
    check_all(CASES[part::4])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_layer_in_more_orders(case: Case) -> None:
    check(case, turns=4)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("layer", "call", "words"),
    [
        (nn.Conv2d(2, 3, 3), lambda layer, x: layer(x), "x[None]"),
        (nn.BatchNorm1d(5), lambda layer, x: layer(x), ""),
        (nn.InstanceNorm1d(2), lambda layer, x: layer(x[:, :, 0]), "x[None]"),
        (nn.MultiheadAttention(8, 2), lambda layer, x: layer(x[0], x[0], x[0])[0], "x[None]"),
        (nn.LSTM(8, 3), lambda layer, x: layer(x[0])[0], "pass a padded batch"),
        (nn.GRUCell(8, 3), lambda layer, x: layer(x[0, 0]), "x[None]"),
        (nn.LSTM(8, 3, proj_size=2), lambda layer, x: layer(x)[0], "proj_size"),
    ],
)  # fmt: skip
def test_what_has_no_twin_is_refused_with_a_way_out(
    layer: nn.Module, call: Callable[..., Any], words: str
) -> None:
    assert words in reasons(call, tensor(2, 5, 8), layer=layer.eval())
