"""Rounding that a layer makes much of is no mistake, and an error of that size is one: float64 tells them apart."""

from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import parity, to_flax
from torchjax_bridge.weights import layers

pytestmark = pytest.mark.filterwarnings("ignore::torchjax_bridge.weights.SettingsWarning")

FLAVOURS = ["nnx", "linen"]


class Net(nn.Module):
    """Its norms are given what hardly varies, so they multiply the rounding of their input a hundredfold."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.bn0 = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.fc1, self.bn1 = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn0(self.fc0(x)).tanh() * 0.003 + 2
        return self.head(self.bn1(self.fc1(x)).tanh())


def _forward(m: Any, x: jax.Array) -> jax.Array:
    x = jnp.tanh(m.bn0(m.fc0(x))) * 0.003 + m.shift
    return m.head(jnp.tanh(m.bn1(m.fc1(x))))


SETTINGS = {"momentum": 0.9, "epsilon": 1e-5, "use_fast_variance": False}


class NnxNet(nnx.Module):
    def __init__(self, shift: float = 2.0, dtype: Any = None, **changes: Any) -> None:
        rngs, settings = nnx.Rngs(0), {**SETTINGS, "dtype": dtype, **changes}
        self.fc0, self.bn0 = (
            nnx.Linear(16, 16, dtype=dtype, rngs=rngs),
            layers.nnx.BatchNorm(16, **settings, rngs=rngs),
        )
        self.fc1, self.bn1 = (
            nnx.Linear(16, 16, dtype=dtype, rngs=rngs),
            layers.nnx.BatchNorm(16, **settings, rngs=rngs),
        )
        self.head = nnx.Linear(16, 4, dtype=dtype, rngs=rngs)
        self.shift = shift

    def __call__(self, x: jax.Array) -> jax.Array:
        return _forward(self, x)


class LinenNet(ln.Module):
    changes: Any
    shift: float = 2.0
    dtype: Any = None

    def setup(self) -> None:
        settings = {**SETTINGS, "dtype": self.dtype, "use_running_average": False, **self.changes}
        self.fc0, self.bn0 = ln.Dense(16, dtype=self.dtype), layers.linen.BatchNorm(**settings)
        self.fc1, self.bn1 = ln.Dense(16, dtype=self.dtype), layers.linen.BatchNorm(**settings)
        self.head = ln.Dense(4, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _forward(self, x)


def _net() -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    return Net(), 1 + 1e-3 * torch.randn(32, 16)


def _twin(flavour: str, module: Net, **changes: Any) -> Any:
    if flavour == "nnx":
        return to_flax(module, nnx.eval_shape(lambda: NnxNet(**changes)))
    own = {name: changes.pop(name) for name in ("shift", "dtype") if name in changes}
    linen = LinenNet(changes, **own)
    return linen, to_flax(module, jax.eval_shape(linen.init, jax.random.key(0), jnp.zeros((2, 16))))


@pytest.mark.every(2)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_right_twin_is_right_where_its_norms_make_much_of_rounding(flavour: str) -> None:
    module, x = _net()
    for dtype in (None, jnp.float32):  # a layer that says float32 is run in float64 all the same
        found = parity(module, _twin(flavour, module, dtype=dtype), x)
        assert found.ok, str(found)
        assert all(row.ok for row in found.rows)
        assert max(row.relative for row in found.rows) > 1e-5
        assert [row.layer for row in found.rows].count("BatchNorm1d running_mean") == 2
        assert any("which is rounding: in float64 by no more than" in note for note in found.notes)
    assert torch.get_default_dtype() == torch.float32
    assert jnp.zeros(1).dtype == jnp.float32
    assert not parity(module, _twin(flavour, module), x, rtol=1e-5).ok  # the caller's own bound is kept


@pytest.mark.every(2)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("epsilon", [1.1e-5, 1.01e-5, 1.0001e-5])
def test_an_epsilon_that_changes_no_more_than_rounding_does_is_found(flavour: str, epsilon: float) -> None:
    module, x = _net()
    found = parity(module, _twin(flavour, module, epsilon=epsilon), x)
    assert found.cause is not None
    assert (found.cause.kind, found.cause.proved) == ("epsilon", True), str(found)
    assert found.first is not None
    assert found.first.torch_path == "bn0"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_momentum_that_is_off_is_found_behind_rounding(flavour: str) -> None:
    module, x = _net()
    found = parity(module, _twin(flavour, module, momentum=0.899), x)
    assert found.cause is not None
    assert (found.cause.kind, found.cause.proved) == ("momentum", True), str(found)


def test_a_sum_that_is_off_by_as_much_as_rounding_is_not_called_rounding() -> None:
    module, x = _net()
    found = parity(module, _twin("nnx", module, shift=2.0001), x)
    assert found.first is not None
    assert found.first.torch_path == "fc1", str(found)


def test_a_variance_in_one_pass_is_named_though_float64_hides_it() -> None:
    module, x = _net()
    found = parity(module, _twin("nnx", module, use_fast_variance=True), x)
    assert found.cause is not None
    assert (found.cause.kind, found.cause.proved) == ("use_fast_variance", True), str(found)


def test_weights_that_were_trained_apart_agree_and_other_weights_do_not() -> None:
    module, x = _net()
    twin = _twin("nnx", module)
    draw = np.random.default_rng(0)
    for layer in (twin.fc0, twin.fc1, twin.head):  # what the rounding of two gradients leaves
        kernel = np.asarray(layer.kernel[...])
        layer.kernel[...] = kernel * (1 + 1e-6 * draw.standard_normal(kernel.shape)).astype("float32")
    twin.bn0.bias[...] = 1e-10 * draw.standard_normal(16).astype("float32")  # torch's is zero
    found = parity(module, twin, x)
    assert found.ok, str(found)
    assert any("with the same weights, which differ by up to" in note for note in found.notes), found.notes
    twin.fc1.kernel[...] = twin.fc1.kernel[...] * 1.0002
    cause = parity(module, twin, x).cause
    assert cause is not None
    assert (cause.kind, cause.proved) == ("weights", True)
    assert "or, where both were trained, compare with the rtol=" in cause.fix


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_running_mean_that_is_zero_but_for_rounding_is_no_difference(flavour: str) -> None:
    torch.manual_seed(0)
    module, x = nn.BatchNorm1d(4), torch.randn(64, 4)
    x = x - x.mean(0)
    settings = {**SETTINGS, "use_running_average": False}
    if flavour == "nnx":
        model = to_flax(module, layers.nnx.BatchNorm(4, **settings, rngs=nnx.Rngs(0)))
    else:
        linen = layers.linen.BatchNorm(**settings)
        model = linen, to_flax(module, jax.eval_shape(linen.init, jax.random.key(0), jnp.zeros((2, 4))))
    found = parity(module, model, x)
    assert found.ok, str(found)
    (mean,) = [row for row in found.rows if row.layer == "BatchNorm1d running_mean"]
    assert mean.relative < 1e-6
    assert np.isfinite(mean.difference)
