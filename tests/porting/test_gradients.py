"""A port has the gradients of its torch module, and what torch does not differentiate is not differentiated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F

from torchjax_bridge import port
from torchjax_bridge.errors import PortError


class Net(nn.Module):
    """Two linear layers and what stands between them."""

    def __init__(self, between: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self, x))


def _under_no_grad(self: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        h = self.first(x)
    return h.relu()


@torch.no_grad()
def _decorated(self: Net, x: torch.Tensor) -> torch.Tensor:
    return self.first(x).relu()


def _inference(self: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        h = self.first(x)
    return h.clone()


def _straight_through(self: Net, x: torch.Tensor) -> torch.Tensor:
    h = self.first(x)
    return h + (h.round() - h).detach()


CUT = {"no_grad": _under_no_grad, "decorator": _decorated, "inference_mode": _inference}


@pytest.mark.parametrize("name", CUT)
def test_no_gradient_flows_through_what_torch_makes_without_gradients(name: str) -> None:
    ported = port(Net(CUT[name]), torch.randn(2, 6))
    assert ported.source.count("stop_gradient") == 1
    gradients = nnx.grad(lambda model: model(jnp.ones((2, 6))).sum())(ported.model)
    assert not np.any(np.asarray(gradients["first"]["kernel"][...]))
    assert ported.proof.gradients <= 1e-3


def test_a_straight_through_estimate_is_one() -> None:
    ported = port(Net(_straight_through), torch.randn(2, 6), to="linen")
    module, variables = ported.model
    gradients = jax.grad(lambda given: module.apply(given, jnp.ones((2, 6))).sum())(variables)
    assert np.all(np.asarray(gradients["params"]["first"]["kernel"]))


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def test_a_backward_that_is_written_by_hand_is_refused_by_name() -> None:
    with pytest.raises(PortError, match=r"another gradient than torch(.|\n)*calls Sign(.|\n)*detach\(\)"):
        port(Net(lambda self, x: Sign.apply(self.first(x))), torch.randn(2, 6))


def test_a_translation_with_another_derivative_is_not_returned() -> None:
    ops = {torch.tanh: "jax.lax.stop_gradient(jnp.tanh({0}))"}
    with pytest.raises(
        PortError, match=r"another gradient than torch, with respect to ('first\.\w+'|an input)"
    ):
        port(Net(lambda self, x: torch.tanh(self.first(x))), torch.randn(2, 6), ops=ops)


class _Patches(nn.Module):
    """Its convolution takes steps so wide that the derivative is proved along one direction of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 4, 4, stride=4)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.tanh(x)).flatten(1) + shift


def test_the_gradient_of_an_image_that_is_cut_into_patches_is_proved() -> None:
    inputs = torch.randn(2, 3, 8, 8), torch.randn(2, 16)
    assert port(_Patches(), *inputs).proof.gradients <= 1e-5
    ops = {torch.tanh: "jax.lax.stop_gradient(jnp.tanh({0}))"}
    with pytest.raises(PortError, match="another gradient than torch, with respect to an input"):
        port(_Patches(), *inputs, ops=ops)


def test_equal_inputs_are_no_reason_to_refuse_a_port() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.AdaptiveMaxPool2d(1))
    assert port(model, torch.ones(2, 1, 6, 6)).proof.gradients <= 1e-3


def _counts(self: Net, x: torch.Tensor) -> torch.Tensor:
    self.step += 1
    return self.first(x) * self.step


def _clamps(self: Net, x: torch.Tensor) -> torch.Tensor:
    self.first.weight.data.clamp_(-0.1, 0.1)
    return self.first(x)


def _replaces(self: Net, x: torch.Tensor) -> torch.Tensor:
    self.first.weight.data = F.normalize(self.first.weight.data)
    return self.first(x)


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (_counts, r"counts in self\.step"),
        (_clamps, r"writes to the parameter 'first\.weight'"),
        (_replaces, r"writes to the parameter 'first\.weight'"),
        (lambda self, x: self.first(torch.cat(list(x.unbind(0))).view(-1, 6)), "makes more or fewer tensors"),
    ],
    ids=["a counter", "a write in place", "a replacement", "a list of rows"],
)
def test_what_a_call_changes_is_refused_by_name_and_stays_unchanged(between: Any, words: str) -> None:
    model = Net(between)
    model.step = 1
    before = model.first.weight.detach().clone()
    with pytest.raises(PortError, match=words):
        port(model, torch.randn(2, 6))
    assert model.step == 1
    assert torch.equal(model.first.weight, before)


class Divided(nn.Module):
    """No number, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) / (x - x).sum()


@pytest.mark.parametrize(
    ("module", "x"),
    [(Divided(), torch.randn(2, 3)), (nn.Linear(3, 4), torch.full((2, 3), float("nan")))],
    ids=["by zero", "an input"],
)
def test_nothing_finite_is_no_proof(module: nn.Module, x: torch.Tensor) -> None:
    model = nn.Sequential(module, nn.Linear(4, 4))
    with pytest.raises(PortError, match="gives no finite number for the example"):
        port(model, x)
    assert port(model, x, verify=False).proof is None


class Logarithm(nn.Module):
    """Logarithms of small weights, of which noise makes some negative."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 1e-4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.scale - 1e-5).log().sum()


def test_gradients_are_compared_where_other_weights_give_no_number() -> None:
    proof = port(Logarithm(), torch.randn(2, 3)).proof
    assert "torch gives no finite number" in str(proof)
    assert isinstance(proof.gradients, float)
    assert proof.gradients < 1e-4


def test_the_statistics_of_a_part_in_torch_are_not_differentiated() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    proof = port(net, torch.randn(2, 3, 6, 6), keep=["1"]).proof
    assert isinstance(proof.gradients, float)
    assert proof.gradients < 1e-4


class Hidden(nn.Module):
    """Scores of which some are minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(self.fc(x)).masked_fill(torch.arange(4) > 2, float("-inf"))


def test_an_infinite_output_hides_no_mistake_beside_it() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(PortError, match="differs from torch"):
        port(Hidden(), x, ops={torch.special.bessel_j0: "0.5 * {0}"})
