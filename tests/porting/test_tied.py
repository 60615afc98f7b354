"""One weight in several modules, none of which holds the other, is one variable of the port."""

from collections.abc import Callable

import jax
import pytest
import torch
from flax import nnx
from torch import Tensor, nn

from torchjax_bridge import port, to_state_dict
from torchjax_bridge.errors import PortError

_TOKENS = torch.arange(10).reshape(2, 5)


class _Head(nn.Module):
    """RoBERTa's: its bias has two names."""

    def __init__(self, features: int, tokens: int) -> None:
        super().__init__()
        self.dense = nn.Linear(features, features)
        self.decoder = nn.Linear(features, tokens)
        self.bias = nn.Parameter(torch.randn(tokens))
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.dense(x)))


class _Scaled(nn.Embedding):
    """BART's."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 3.0


class _Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = _Scaled(11, 6)
        self.dense = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dense(self.embed(tokens))


class _Mixer(nn.Module):
    """No layer of torch's, with a weight of its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.T


class _Tied(nn.Module):
    """``a_head`` is before ``shared`` in the order of nnx, and ``z_head`` behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = _Scaled(11, 6)
        self.encoder, self.decoder = _Part(), _Part()
        self.a_head, self.mixer, self.z_head = _Head(6, 11), _Mixer(), _Head(6, 11)
        for module in (self.encoder.embed, self.decoder.embed, self.a_head.decoder, self.z_head.decoder):
            module.weight = self.shared.weight
        self.mixer.table = self.shared.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder(tokens) + self.decoder(tokens)
        return self.a_head(x) - self.mixer(x) * self.z_head(x)


class _OneHead(nn.Module):
    """The table is first in the order of nnx."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = _Head(6, 11)
        self.head.decoder.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def _chain() -> nn.Sequential:
    """A Sequential holds both."""
    chain = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), _Head(6, 11))
    chain[2].decoder.weight = chain[0].weight
    return chain


class _Chained(nn.Module):
    """A Sequential holds both, and stays one of Flax's."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = _chain()

    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * self.chain(tokens)


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", [_Tied, _OneHead, _chain, _Chained])
def test_a_weight_that_modules_share_is_one_variable(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    ported = port(module, _TOKENS)
    tables = [one for _, one in nnx.to_flat_state(nnx.state(ported.model, nnx.Param)) if one.shape == (11, 6)]
    assert len(tables) == 1
    state = to_state_dict(ported.model, module, rules=ported.rules)
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


def test_linen_shares_no_weight_and_says_so() -> None:
    with pytest.raises(PortError, match=r"'embed\.weight' is read inside 'head'.*port to nnx"):
        port(_OneHead().eval(), _TOKENS, to="linen")


class _Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.generate = nn.Sequential(nn.Linear(6, 10, bias=False), nn.LogSoftmax(-1))
        self.generate[0].weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.generate(self.embed(tokens))


@pytest.mark.parametrize("verify", [True, False])
def test_a_layer_of_a_sequential_may_share_its_weight(verify: bool) -> None:
    ported = port(_Generator(), _TOKENS, verify=verify)
    assert [one.size for one in jax.tree.leaves(nnx.state(ported.model, nnx.Param))] == [60]
    assert "Linear(" not in ported.source
