"""Layers made of layers, bags of parameters, and what a module holds itself."""

from typing import Any

import flax.linen as ln
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from tests.weights.transformers import HEADS, WIDE, WIDTH, LinenLayer, LinenStack, NnxLayer, NnxStack
from tests.weights.twins import as_is, assert_returns, assert_twins, draw, randomise, template
from torchjax_bridge import errors, to_flax
from torchjax_bridge.weights import Rename, plan

# --- transformers --------------------------------------------------------------------------------------


class LinenTransformer(ln.Module):
    def setup(self) -> None:
        self.encoder, self.decoder = LinenStack(False, True, 1), LinenStack(True, True, 1)

    def __call__(self, source, target):
        return self.decoder(target, self.encoder(source))


MADE: dict[str, Any] = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": WIDE, "dropout": 0.0}
SOURCE, TARGET = draw(2, 4, WIDTH), draw(2, 3, WIDTH, seed=2)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("made", "flax"),
    [
        ({}, LinenLayer()),
        ({}, NnxLayer),
        ({"norm_first": True}, LinenLayer(norm_first=True)),
        ({"activation": "gelu"}, LinenLayer(activation=lambda x: ln.gelu(x, approximate=False))),
        ({"activation": "gelu"}, lambda rngs: NnxLayer(rngs, gelu=True)),
    ],
    ids=["linen", "nnx", "linen norm first", "linen gelu", "nnx gelu"],
)
def test_an_encoder_layer_is_its_parts(made: dict[str, Any], flax: Any) -> None:
    module = nn.TransformerEncoderLayer(**MADE, batch_first=True, **made)
    assert_twins(module, flax, SOURCE, within=2e-6, axes=as_is)


@pytest.mark.parametrize(
    "flax", [LinenLayer(cross=True), lambda rngs: NnxLayer(rngs, cross=True)], ids=["linen", "nnx"]
)
def test_a_decoder_layer_is_its_parts(flax: Any) -> None:
    module = nn.TransformerDecoderLayer(**MADE, batch_first=True)
    assert_twins(module, flax, TARGET, SOURCE, within=2e-6, axes=as_is)


@pytest.mark.parametrize("flax", [LinenStack(), NnxStack], ids=["linen", "nnx"])
def test_an_encoder_is_a_list_of_layers(flax: Any) -> None:
    layer = nn.TransformerEncoderLayer(**MADE, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert_twins(module, flax, SOURCE, within=4e-6, axes=as_is)


@pytest.mark.parametrize(
    "flax", [LinenStack(cross=True), lambda rngs: NnxStack(rngs, cross=True)], ids=["linen", "nnx"]
)
def test_a_decoder_is_a_list_of_layers(flax: Any) -> None:
    module = nn.TransformerDecoder(nn.TransformerDecoderLayer(**MADE, batch_first=True), 2)
    assert_twins(module, flax, TARGET, SOURCE, within=4e-6, axes=as_is)


def test_a_whole_transformer_is_an_encoder_and_a_decoder() -> None:
    module = nn.Transformer(**MADE, num_encoder_layers=1, num_decoder_layers=1, batch_first=True)
    assert_twins(module, LinenTransformer(), SOURCE, TARGET, within=4e-6, axes=as_is)


class Numbered(ln.Module):
    """An encoder layer whose equal norms only linen's numbers tell apart."""

    @ln.compact
    def __call__(self, x):
        x = ln.LayerNorm()(x + ln.MultiHeadDotProductAttention(HEADS)(x, x))
        return ln.LayerNorm()(x + ln.Dense(WIDTH)(ln.relu(ln.Dense(WIDE)(x))))


def test_equal_norms_of_an_encoder_layer_are_refused_until_they_are_named() -> None:
    module = nn.TransformerEncoderLayer(**MADE, layer_norm_eps=1e-6, batch_first=True)
    empty = template(Numbered(), SOURCE.numpy())
    with pytest.raises(
        errors.PlanError, match=r"'norm1' \(LayerNorm\), 'norm2' \(LayerNorm\) fit .* equally"
    ):
        to_flax(module, empty)
    names = [Rename("norm1", "LayerNorm_0"), Rename("norm2", "LayerNorm_1")]
    assert_twins(module, Numbered(), SOURCE, within=2e-6, axes=as_is, rules=names)


# --- bags of parameters, raw parameters, buffers -----------------------------------------------------------


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([nn.Parameter(draw(4)), nn.Parameter(draw(4))])
        self.named = nn.ParameterDict({"gain": nn.Parameter(draw(4)), "shift": nn.Parameter(draw(4))})
        self.raw = nn.Parameter(draw(4))
        self.register_buffer("table", draw(4))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("scratch", draw(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x + self.listed[0]) * self.listed[1] * self.raw
        return x * self.named["gain"] + self.named["shift"] * self.table + self.steps


class NnxBags(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        def new():
            return nnx.Param(jnp.zeros(4))

        self.listed = nnx.List([new(), new()])
        self.named = nnx.Dict(gain=new(), shift=new())
        self.raw = new()
        self.table = nnx.Variable(jnp.zeros(4))
        self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        x = (x + self.listed[0][...]) * self.listed[1][...] * self.raw[...]
        return x * self.named["gain"][...] + self.named["shift"][...] * self.table[...] + self.steps[...]


class LinenBags(ln.Module):
    """linen has no bags: each parameter has a name of its own in the scope of the module."""

    @ln.compact
    def __call__(self, x):
        def new(name):
            return self.param(name, ln.initializers.zeros, (4,))

        table = self.variable("buffers", "table", lambda: jnp.zeros(4)).value
        steps = self.variable("buffers", "steps", lambda: jnp.zeros((), jnp.int32)).value
        x = (x + new("listed_0")) * new("listed_1") * new("raw")
        return x * new("named_gain") + new("named_shift") * table + steps


@pytest.mark.parametrize("flax", [LinenBags(), NnxBags], ids=["linen", "nnx"])
def test_bags_of_parameters_raw_parameters_and_buffers_cross_by_name(flax: Any) -> None:
    assert_twins(Bags(), flax, draw(3, 4), within=2e-6, axes=as_is)


def test_a_bag_of_another_length_names_what_is_missing() -> None:
    module = nn.ModuleDict({"bags": Bags()})
    module["bags"].listed.append(nn.Parameter(draw(4)))

    class Holder(ln.Module):
        def setup(self) -> None:
            self.bags = LinenBags()

        def __call__(self, x):
            return self.bags(x)

    with pytest.raises(errors.PlanError, match=r"'bags\.listed\.2' \(4,\) .*has no place in the Flax tree"):
        to_flax(module, template(Holder(), jnp.ones((1, 4))))


# --- without counterpart -------------------------------------------------------------------------------


def test_an_adaptive_softmax_is_refused_with_the_way_to_pass_a_rule() -> None:
    module = nn.ModuleDict({"out": nn.AdaptiveLogSoftmaxWithLoss(4, 10, [3]), "fc": nn.Linear(2, 4)})

    class Twin(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc = nnx.Linear(2, 4, rngs=rngs)

    report = plan(module, template(Twin)).report
    assert any(fault.kind == "no rule" and "AdaptiveLogSoftmaxWithLoss" in fault.message for fault in report)


def test_its_parts_cross_where_the_template_has_them() -> None:
    module = randomise(nn.AdaptiveLogSoftmaxWithLoss(4, 10, [3]))

    class Twin(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.head = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
            parts = [nnx.Linear(4, 1, use_bias=False, rngs=rngs), nnx.Linear(1, 7, use_bias=False, rngs=rngs)]
            self.tail = nnx.List([nnx.List(parts)])

    assert_returns(module, to_flax(module, template(Twin)))
