"""A twin that computes something else than the layer of Flax's in whose place it stands: parity names its class."""

from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import parity, to_flax
from torchjax_bridge.weights import LayerType, Parity

RULES = [LayerType("fc1", nn.Linear)]
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Scaled(ln.Dense):
    @ln.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return 1.5 * super().__call__(inputs)


class Centred(ln.Dense):
    @ln.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        return inputs @ (kernel - kernel.mean(0)) + bias


class Harmless(ln.Dense):
    @ln.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs)


class NoDense(ln.Module):
    features: int

    @ln.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        kernel = self.param("kernel", ln.initializers.normal(), (inputs.shape[-1], self.features))
        bias = self.param("bias", ln.initializers.zeros, (self.features,))
        return inputs @ (kernel - kernel.mean(0)) + bias


class LinenNet(ln.Module):
    kind: Any

    @ln.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return ln.Dense(4, name="fc2")(ln.relu(self.kind(4, name="fc1")(x)))


class NnxCentred(nnx.Linear):
    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        kernel = self.kernel[...]
        return inputs @ (kernel - kernel.mean(0)) + self.bias[...]


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc1, self.fc2 = NnxCentred(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.relu(self.fc1(x)))


def _linen(kind: Any) -> Parity:
    torch.manual_seed(0)
    module, model = Net().eval(), LinenNet(kind)
    variables = to_flax(module, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4))), rules=RULES)
    return parity(module, (model, variables), X, rules=RULES)


@pytest.mark.parametrize("kind", [Scaled, Centred])
def test_a_linen_subclass_that_computes_something_else_is_named_and_proved(kind: Any) -> None:
    cause = _linen(kind).cause
    assert cause is not None
    assert (cause.kind, cause.proved) == ("overridden call", True)
    assert f"'fc1' (Linear) is a {kind.__name__} in Flax" in cause.message
    assert "use linen.Dense itself" in cause.fix


def test_an_nnx_subclass_that_computes_something_else_is_named_and_proved() -> None:
    torch.manual_seed(0)
    module = Net().eval()
    twin = to_flax(module, NnxNet(nnx.Rngs(0)), rules=RULES)
    cause = parity(module, twin, X, rules=RULES).cause
    assert cause is not None
    assert (cause.kind, cause.proved) == ("overridden call", True)
    assert "NnxCentred" in cause.message
    assert type(twin.fc1) is NnxCentred  # the copy that ran was another


def test_a_subclass_that_computes_the_same_is_no_cause() -> None:
    assert _linen(Harmless).ok


def test_a_class_that_is_not_derived_from_flax_s_is_named_where_nothing_is_proved() -> None:
    cause = _linen(NoDense).cause
    assert cause is not None
    assert (cause.kind, cause.proved) == ("unknown", False)
    assert "'fc1' (Linear) computes something else in Flax, where it is a NoDense" in cause.message


def test_the_equation_of_an_einsum_is_the_likely_cause() -> None:
    cause = _linen(lambda features, name: ln.Einsum((4, features), "bi,oi->bo", name=name)).cause
    assert cause is not None
    assert (cause.kind, cause.proved) == ("einsum_str", False)
    assert "bi,oi->bo" in cause.message
    assert _linen(lambda features, name: ln.Einsum((4, features), "bi,io->bo", name=name)).ok
