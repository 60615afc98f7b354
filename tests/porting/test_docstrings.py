"""What the docstrings of a port say of shapes is true: an axis has a letter where it is known, or none is said."""

import re

import pytest
import torch
from torch import Tensor, nn

from torchjax_bridge import port

_UNKNOWN = "The code of ``forward``."


def _said(source: str) -> dict[str, str]:
    """The docstring of the call of each class."""
    found = re.findall(r'class (\w+)\(.*?def __call__\(.*?"""(.*?)"""', source, re.DOTALL)
    return dict(found)


def _ported(module: nn.Module, *inputs: Tensor) -> dict[str, str]:
    return _said(port(module.eval(), *inputs, verify=False).source)


class _Masked(nn.Module):
    """A mask of padding has a length, and no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.layer(x, src_key_padding_mask=mask)
        return self.attention(x, x, x, key_padding_mask=mask)[0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_padding_has_a_length(dtype: torch.dtype) -> None:
    mask = torch.zeros(2, 5, dtype=dtype)
    mask[0, 3:] = 1 if dtype == torch.bool else -10
    said = _ported(_Masked(), torch.randn(2, 5, 8), mask)
    assert said["_Masked".strip("_")] == "``(N, L, C)`` and ``(N, L)`` to ``(N, L, C)``."
    assert said["TransformerEncoderLayer"] == "``(N, L, C)`` and ``(N, L)`` to ``(N, L, C)``."


class _Last(nn.Module):
    """Features last, as in a swin transformer: torch's own order of axes is that of the port."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        y = self.norm(x).view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
        y = self.linear(y.reshape(-1, 4, channels)).view(batch, height // 2, width // 2, 2, 2, channels)
        return x + y.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


class _Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last, self.head = nn.Conv2d(3, 8, 2, 2), _Last(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_features_that_are_last_in_torch_are_last_in_the_docstring() -> None:
    said = _ported(_Swin(), torch.randn(2, 3, 16, 16))
    assert said == {
        "Last": "``(N, H, W, C)`` to ``(N, H, W, C)``.",
        "Swin": "``(N, H, W, C)`` to ``(N, C)``.",
    }


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.patches = nn.Embedding(11, 8), nn.Conv2d(3, 8, 2, 2)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        return torch.cat([self.embed(ids), self.patches(image).flatten(2).transpose(1, 2)], 1)


def test_ids_have_a_length_and_so_have_the_places_of_a_map() -> None:
    said = _ported(_Tokens(), torch.arange(10).view(2, 5), torch.randn(2, 3, 8, 8))
    assert said["Tokens"] == "``(N, L)`` and ``(N, H, W, C)`` to ``(N, L, C)``."


class _Mixer(nn.Module):
    """A Linear over the tokens: neither axis is known to be the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = nn.Linear(5, 5), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(self.tokens(x.transpose(1, 2)).transpose(1, 2))


class _Scores(nn.Module):
    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(1, 2) + bias, -1)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [(_Mixer(), (torch.randn(2, 5, 8),)), (_Scores(), (torch.randn(2, 5, 8), torch.randn(5, 5)))],
    ids=["mixer", "scores"],
)
def test_of_an_axis_that_may_be_either_nothing_is_said(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert set(_ported(module, *inputs).values()) == {_UNKNOWN}
