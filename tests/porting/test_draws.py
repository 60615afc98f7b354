"""Models that draw random numbers in evaluation, too: they are ported, proved with equal draws, and say so."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchjax_bridge import port
from torchjax_bridge.errors import PortError


class Encoder(nn.Module):
    """The encoder of a variational autoencoder, or whatever else draws."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.draw(self.fc(x))


def latent(h: Tensor) -> Tensor:
    mean, log_variance = h.chunk(2, 1)
    return mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)


def noise(h: Tensor) -> Tensor:
    return h + torch.empty_like(h).uniform_(-1, 2) + 0.1 * h.new_empty(h.shape).normal_() * torch.rand(6)


def gates(h: Tensor) -> Tensor:
    return h * torch.bernoulli(torch.sigmoid(h)) + F.gumbel_softmax(h, tau=0.5, hard=True)


def masked(h: Tensor) -> Tensor:
    shuffled = torch.argsort(torch.rand(h.shape), dim=1)
    kept = torch.gather(h, 1, shuffled[:, :4])
    return kept[torch.randperm(h.shape[0])]


@pytest.mark.every(2)
@pytest.mark.parametrize("draw", [latent, noise, gates, masked], ids=lambda draw: draw.__name__)
def test_a_model_that_draws_is_proved(draw: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    ported = port(Encoder(draw), torch.randn(3, 6), training="required")
    assert all(check.difference <= 1e-5 for check in ported.proof.checks)
    assert isinstance(ported.proof.gradients, float)
    assert any("random numbers that are not torch's" in note for note in ported.notes)
    x = jnp.ones((4, 6))
    first, second = ported.model(x), ported.model(x)
    assert bool(jnp.isfinite(first).all())
    assert not np.array_equal(np.asarray(first), np.asarray(second))  # the file itself is as it was


def test_a_port_to_linen_draws_too() -> None:
    linen, variables = port(Encoder(latent), torch.randn(3, 6), to="linen").model
    x = jnp.ones((4, 6))
    one, two = (linen.apply(variables, x, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1))
    assert not np.array_equal(np.asarray(one), np.asarray(two))


def test_maps_draw_alike_in_every_order_of_axes() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + torch.randn_like(x)) * torch.rand(x.size(0), 1, *x.shape[2:])

    assert all(check.difference <= 1e-5 for check in port(Noisy(), torch.randn(2, 3, 5, 7)).proof.checks)


def test_another_distribution_is_found() -> None:
    with pytest.raises(PortError, match="differs from torch"):
        port(
            Encoder(latent),
            torch.randn(3, 6),
            ops={torch.randn_like: "jax.random.uniform(jax.random.key(0), {0}.shape)"},
        )
