"""MultiheadAttention, packed and apart."""

from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from tests.weights.twins import Flax, as_is, assert_returns, assert_twins, difference, draw, template
from torchjax_bridge import errors, to_flax, to_state_dict

both = pytest.mark.parametrize("flavour", ["linen", "nnx"])
HEADS, WIDTH = 2, 8


def attention(flavour: str, heads: int = HEADS, bias: bool = True, **settings: Any) -> Flax:
    if flavour == "linen":
        return ln.MultiHeadDotProductAttention(heads, use_bias=bias)
    return lambda rngs: nnx.MultiHeadAttention(
        heads, WIDTH, use_bias=bias, decode=False, rngs=rngs, **settings
    )


def attend(module: Any, **masks: Any) -> Any:
    return lambda query, key=None, value=None: module(
        query,
        query if key is None else key,
        (query if key is None else key) if value is None else value,
        need_weights=False,
        **masks,
    )[0]


@both
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_computes_the_same(flavour: str, bias: bool) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True)
    x = draw(3, 5, WIDTH)
    assert_twins(module, attention(flavour, bias=bias), x, within=5e-7, axes=as_is, call=attend(module))


@both
def test_keys_and_values_of_other_widths_have_matrices_of_their_own(flavour: str) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=5, batch_first=True)
    flax = attention(flavour)
    if flavour == "nnx":  # whose constructor knows one width for both

        def flax(rngs: nnx.Rngs) -> nnx.Module:
            twin = nnx.MultiHeadAttention(
                HEADS, WIDTH, in_kv_features=6, decode=False, keep_rngs=False, rngs=rngs
            )
            twin.value.in_features = (5,)
            twin.value.kernel = nnx.Param(jnp.zeros((5, HEADS, WIDTH // HEADS)))
            return twin

    inputs = draw(3, 5, WIDTH), draw(3, 4, 6, seed=2), draw(3, 4, 5, seed=3)
    assert_twins(module, flax, *inputs, within=5e-7, axes=as_is, call=attend(module))


@both
def test_a_mask_says_the_reverse_in_flax(flavour: str) -> None:
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    mask = ~causal.numpy()[None, None] & ~padded.numpy()[:, None, None]
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    call = attend(module, attn_mask=causal, key_padding_mask=padded)
    x = draw(2, 5, WIDTH)
    assert_twins(module, attention(flavour), x, within=5e-7, axes=as_is, call=call, mask=jnp.asarray(mask))


@both
def test_another_number_of_heads_is_refused_where_the_module_says_how_many(flavour: str) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    empty = template(attention(flavour, heads=4), np.ones((1, 2, WIDTH), np.float32))
    with pytest.raises(errors.PlanError, match="it has 2 heads, not 4: set num_heads=2"):
        to_flax(module, empty)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ({"add_bias_kv": True}, "add_bias_kv=True appends a learned key and value"),
        ({"add_zero_attn": True}, "add_zero_attn=True appends a zero key and value"),
    ],
)
def test_what_lengthens_the_keys_is_refused(made: dict[str, bool], why: str) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **made)
    with pytest.raises(errors.PlanError, match=why):
        to_flax(module, template(attention("nnx")))


def test_normalised_queries_have_no_source() -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    with pytest.raises(errors.PlanError, match=r"query_ln\.scale"):
        to_flax(module, template(attention("nnx", normalize_qk=True)))


def test_projections_without_an_axis_of_heads_are_filled_too() -> None:
    class Flat(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.query, self.key, self.value, self.out = (
                nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4)
            )

        def __call__(self, x):
            q, k, v = (
                part(x).reshape(*x.shape[:2], HEADS, -1) for part in (self.query, self.key, self.value)
            )
            return self.out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))

    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    assert_twins(module, Flat, draw(3, 5, WIDTH), within=5e-7, axes=as_is, call=attend(module))


def test_what_was_trained_in_flax_comes_back_packed() -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    flax = ln.MultiHeadDotProductAttention(HEADS, bias_init=ln.initializers.normal())
    x = draw(2, 3, WIDTH)
    trained = jax.jit(flax.init)(jax.random.key(0), x.numpy())
    module.load_state_dict(to_state_dict(trained, module))
    assert difference(jax.jit(flax.apply)(trained, x.numpy()), attend(module)(x).detach()) <= 1e-6
    assert_returns(module, trained)
