"""A decision by values is no condition of a port that is proved for inputs that are decided in the other way."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchjax_bridge import port
from torchjax_bridge.errors import PortError

_TOKENS = torch.arange(1, 11).reshape(2, 5)
_MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


class _Masked(nn.Module):
    """transformers' models: a warning about padding, and a mask that hides nothing is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if 0 in tokens[:, [-1, 0]]:
            "a warning that is given once"
        x = self.embed(tokens)
        return self.sum(x, mask)

    def sum(self, x: Tensor, mask: Tensor) -> Tensor:
        if not mask.all():
            x = x * mask[..., None]
        return x.sum(1)


class _Shifted(_Masked):
    """Does something else for a mask that hides something."""

    def sum(self, x: Tensor, mask: Tensor) -> Tensor:
        if not mask.all():
            x = x * mask[..., None] + 1
        return x.sum(1)


class _FirstHidden(_Masked):
    """Does something else only where a mask that hides all would not show it."""

    def sum(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * mask[..., None] if mask[0, 0] == 1 else 2 * x * mask[..., None]
        return x.sum(1)


class _Counts(_Masked):
    """Asks for a number, which is neither yes nor no."""

    def sum(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.sum(1) / mask.sum().item()


class _AskedTwice(_Masked):
    """transformers' causal masks: the second question is not asked where the first one is answered by yes."""

    def sum(self, x: Tensor, mask: Tensor) -> Tensor:
        if mask.sum() == mask.numel():
            return x.sum(1)
        length = x.shape[1]
        if mask[:, :length].sum() == mask[:, :length].numel() and (mask[:, length:] == 0).all():
            return x.sum(1)
        return (x * mask[..., None]).sum(1)


class _AskedOfAPart(_Masked):
    """Asks of a part of the mask, which may hide nothing where the whole does."""

    def sum(self, x: Tensor, mask: Tensor) -> Tensor:
        if mask.sum() == mask.numel():
            return x.sum(1)
        if mask[:, 1:].sum() == mask[:, 1:].numel():
            return 2 * x.sum(1)
        return (x * mask[..., None]).sum(1)


class _Embedded(nn.Module):
    """Gives a mask that hides nothing, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(tokens), torch.ones(tokens.shape)


class _AsksAConstant(nn.Module):
    """DETR, of images without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded = _Embedded()

    def forward(self, tokens: Tensor) -> Tensor:
        x, mask = self.embedded(tokens)
        return x.sum(1) if mask.all() else (x * mask[..., None]).sum(1)


def test_a_question_about_a_constant_of_a_module_decides_nothing() -> None:
    ported = port(_AsksAConstant().eval(), _TOKENS)
    assert not any(note.startswith("inputs for which") for note in ported.notes)


def test_a_decision_that_changes_nothing_is_no_condition() -> None:
    ported = port(_Masked().eval(), _TOKENS, _MASK)
    assert not any("decide" in note for note in ported.notes)
    twice = port(_AskedTwice().eval(), _TOKENS, _MASK)
    assert not any(note.startswith("inputs for which") for note in twice.notes)
    # With the other example the mask is left out; the port is made by one that hides something.
    for kind, own in ((_Masked, ported), (_AskedTwice, twice)):
        other = port(kind().eval(), _TOKENS, torch.ones_like(_MASK))
        assert other.source.partition("class")[2] == own.source.partition("class")[2]


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", [_Shifted, _FirstHidden, _Counts, _AskedOfAPart])
def test_a_decision_that_changes_something_is_refused(kind: type[_Masked]) -> None:
    with pytest.raises(PortError, match="assume="):
        port(kind().eval(), _TOKENS, _MASK)


def test_without_a_proof_every_decision_is_refused() -> None:
    with pytest.raises(PortError, match="2 things have"):
        port(_Masked().eval(), _TOKENS, _MASK, verify=False)


class _LeavesOut(nn.Module):
    """Attention that leaves out a mask that hides nothing, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if mask is not None and mask.all():
            mask = None
        bias = None if mask is None else mask[:, None, :].bool()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def test_a_mask_that_hides_nothing_is_a_fine_example() -> None:
    module, x = _LeavesOut().eval(), torch.randn(2, 5, 8)
    ones = torch.ones(2, 5, dtype=torch.int64)
    ported = port(module, x, ones)
    assert not any("mask" in note for note in ported.notes)
    hidden = ones.clone()
    hidden[0, 2:] = 0
    for mask in (ones, hidden):
        got = ported.model(jnp.asarray(x.numpy()), jnp.asarray(mask.numpy()))
        np.testing.assert_allclose(got, module(x, mask).detach().numpy(), atol=1e-5)


class _DoesElse(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.cos() if mask.all() else x * mask[:, None]


def test_a_decision_that_no_body_serves_both_answers_of_is_refused_by_its_line() -> None:
    with pytest.raises(PortError, match=r"if mask.all\(\) else") as caught:
        port(_DoesElse(), torch.randn(2, 5), torch.ones(2, dtype=torch.int64))
    assert "assume=" in str(caught.value)
