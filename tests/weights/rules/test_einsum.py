"""Einsum, which is a dense layer with its kernel in either layout, as its equation says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

from torchjax_bridge import audit, errors, to_flax, to_state_dict
from torchjax_bridge.weights import Entry, Flatten, PairingWarning, Rule


class TorchSquare(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=bias)


class LinenSquare(linen.Module):
    equation: str
    shape: tuple[int, ...] = (4, 4)
    named: bool = True

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Einsum(self.shape, self.equation, name="fc" if self.named else None)(x)


EQUATIONS = [
    ("ab,bc->ac", (4, 4)),
    ("ab,cb->ac", (4, 4)),
    ("ni,io->no", (4, 6)),
    ("n i, o i -> n o", (6, 4)),
]


@pytest.mark.parametrize(("equation", "shape"), EQUATIONS)
@pytest.mark.parametrize("flatten", [False, True])
def test_an_einsum_is_filled_as_its_equation_says(
    equation: str, shape: tuple[int, int], flatten: bool
) -> None:
    out = max(shape)
    module, twin = nn.Linear(4, out), nnx.Einsum(equation, shape, (out,), rngs=nnx.Rngs(0))
    rules = [Flatten("", (2, 2))] if flatten else []
    filled = to_flax(module, twin, rules=rules)
    x = torch.randn(3, 4)
    ours = x.reshape(3, 2, 2).transpose(1, 2).reshape(3, 4) if flatten else x
    np.testing.assert_allclose(filled(ours.numpy()), module(x).detach(), atol=1e-6)
    back = to_state_dict(filled, module, rules=rules)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_an_einsum_that_is_no_dense_layer_is_refused() -> None:
    with pytest.raises(errors.PlanError, match="'ab,bc->abc' is not that of a dense layer"):
        to_flax(nn.Linear(4, 4), nnx.Einsum("ab,bc->abc", (4, 4), (4,), rngs=nnx.Rngs(0)))


def test_a_square_einsum_whose_equation_is_not_seen_is_warned_of() -> None:
    x = jnp.zeros((1, 4))
    variables = LinenSquare("ab,cb->ac", named=False).init(jax.random.key(0), x)
    with pytest.warns(PairingWarning, match="taken to be summed over the first axis"):
        to_flax(TorchSquare(), variables)


def test_the_audit_reads_the_equation_that_linen_s_variables_do_not_hold() -> None:
    module, x = TorchSquare(), jnp.zeros((1, 4))
    (fault,) = audit(module, LinenSquare("ab,cb->ac"), x).faults
    assert (fault.effect, fault.flax_value) == ("output", "ab,cb->ac")
    assert "sums over axis 0" in fault.fix
    assert audit(module, LinenSquare("ab,bc->ac"), x).ok
    turned = [Rule(nn.Linear, [Entry("weight", "kernel"), Entry("bias", "bias")])]
    assert audit(module, LinenSquare("ab,cb->ac"), x, rules=turned).ok
    assert not audit(module, LinenSquare("ab,bc->ac"), x, rules=turned).ok
    assert not audit(module, LinenSquare("ab,ac->ac"), x).ok
