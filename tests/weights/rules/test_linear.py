"""Linear and Bilinear."""

import flax.linen as ln
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from torch import nn

from tests.weights.twins import as_is, assert_twins, draw, template
from torchjax_bridge import errors, to_flax
from torchjax_bridge.weights import LayerType, plan


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "flax",
    [
        lambda bias: ln.Dense(3, use_bias=bias),
        lambda bias: lambda rngs: nnx.Linear(5, 3, use_bias=bias, rngs=rngs),
    ],
    ids=["linen", "nnx"],
)
def test_a_linear_layer_computes_the_same(flax, bias: bool) -> None:
    assert_twins(nn.Linear(5, 3, bias=bias), flax(bias), draw(4, 5), within=5e-7, axes=as_is)


class LinenBilinear(ln.Module):
    @ln.compact
    def __call__(self, x, y):
        weight = self.param("weight", ln.initializers.normal(), (3, 4, 5))
        bias = self.param("bias", ln.initializers.normal(), (3,))
        return jnp.einsum("...i,oij,...j->...o", x, weight, y) + bias


class NnxBilinear(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (3, 4, 5)))
        self.bias = nnx.Param(jnp.zeros(3))

    def __call__(self, x, y):
        return jnp.einsum("...i,oij,...j->...o", x, self.weight[...], y) + self.bias[...]


@pytest.mark.parametrize("flax", [LinenBilinear(), NnxBilinear], ids=["linen", "nnx"])
def test_a_bilinear_layer_becomes_the_parameters_of_an_einsum(flax) -> None:
    assert_twins(nn.Bilinear(4, 5, 3), flax, draw(2, 4), draw(2, 5, seed=2), within=1e-6, axes=as_is)


def test_a_bare_square_weight_is_refused_until_its_class_is_said() -> None:
    class Named(ln.Module):
        def setup(self) -> None:
            self.fc = ln.Dense(4)

        def __call__(self, x):
            return self.fc(x)

    module = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    empty = template(Named(), jnp.ones((1, 4)))
    with pytest.raises(errors.PlanError, match=r'LayerType\("fc", nn\.Linear\)'):
        to_flax(module.state_dict(), empty)
    filled = to_flax(module.state_dict(), empty, rules=[LayerType("fc", nn.Linear)])
    assert (filled["params"]["fc"]["kernel"] == module["fc"].weight.detach().numpy().T).all()


def test_a_layer_without_counterpart_is_named_with_the_way_to_pass_a_rule() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.CrossEntropyLoss(weight=draw(3)))
    faults = plan(module, template(lambda rngs: nnx.Sequential(nnx.Linear(2, 3, rngs=rngs)))).faults
    assert any(
        fault.kind == "no rule"
        and "torch.nn.CrossEntropyLoss (weight) has no counterpart in Flax" in fault.message
        and "rules=[Rule(CrossEntropyLoss, [Entry(...), ...])]" in fault.message
        for fault in faults
    )


def test_a_lazy_layer_is_refused_until_it_has_seen_an_input() -> None:
    module = nn.LazyLinear(3)
    with pytest.raises(errors.PlanError, match="'weight' has no shape yet: it belongs to a lazy module"):
        to_flax(module, template(lambda rngs: nnx.Linear(5, 3, rngs=rngs)))
    module(draw(1, 5))
    assert_twins(module, lambda rngs: nnx.Linear(5, 3, rngs=rngs), draw(4, 5), within=5e-7, axes=as_is)
