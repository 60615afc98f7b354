"""Embedding, EmbeddingBag and PReLU."""

import flax.linen as ln
import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from tests.weights.twins import Flax, as_is, assert_twins, draw, last, template
from torchjax_bridge import errors, to_flax
from torchjax_bridge.weights import layers, plan

both = pytest.mark.parametrize("flavour", ["linen", "nnx"])
IDS = torch.tensor([[1, 2, 4, 0], [4, 3, 2, 9]])


def embed(flavour: str) -> Flax:
    return ln.Embed(10, 3) if flavour == "linen" else lambda rngs: nnx.Embed(10, 3, rngs=rngs)


@both
def test_an_embedding_looks_up_the_same_bits(flavour: str) -> None:
    assert_twins(nn.Embedding(10, 3), embed(flavour), IDS, within=0, axes=as_is)


def test_a_padding_index_is_noted_as_what_flax_does_not_do() -> None:
    module = nn.Embedding(10, 3, padding_idx=0)
    assert_twins(module, embed("nnx"), IDS, within=0, axes=as_is)
    assert any(
        "torch gives this row no gradient" in note for note in plan(module, template(embed("nnx"))).notes
    )


def test_a_maximal_norm_is_refused() -> None:
    with pytest.raises(errors.PlanError, match=r"max_norm=1 rescales rows of the table in the forward pass"):
        to_flax(nn.Embedding(10, 3, max_norm=1.0), template(embed("nnx")))


class Bag(ln.Module):
    """An ``EmbeddingBag`` of bags of equal length."""

    mode: str

    def setup(self) -> None:
        self.table = ln.Embed(10, 3)

    def __call__(self, ids):
        return getattr(jnp, self.mode)(self.table(ids), axis=1)


class NnxBag(nnx.Module):
    """An ``EmbeddingBag`` of bags given by offsets."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table = nnx.Embed(10, 3, rngs=rngs)

    def __call__(self, ids, starts):
        bags = jnp.searchsorted(starts, jnp.arange(ids.size), side="right") - 1
        return jax.ops.segment_sum(self.table(ids), bags, num_segments=3)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_an_embedding_bag_is_a_table_and_a_reduction(mode: str) -> None:
    bag = nn.EmbeddingBag(10, 3, mode=mode)
    assert_twins(nn.ModuleDict({"table": bag}), Bag(mode), IDS, within=3e-7, axes=as_is, call=bag)


def test_an_embedding_bag_with_offsets_is_a_segment_sum() -> None:
    bag = nn.EmbeddingBag(10, 3, mode="sum")
    ids, starts = torch.tensor([1, 2, 4, 9, 4, 3]), torch.tensor([0, 1, 4])
    assert_twins(nn.ModuleDict({"table": bag}), NnxBag, ids, starts, within=3e-7, axes=as_is, call=bag)


def test_the_padding_row_of_a_bag_is_noted() -> None:
    notes = plan(nn.EmbeddingBag(10, 3, padding_idx=2), template(embed("nnx"))).notes
    assert any("leaves this row out of its bags" in note for note in notes)


# --- PReLU -----------------------------------------------------------------------------------------------


@both
def test_prelu_with_one_slope_is_flax_s(flavour: str) -> None:
    flax: Flax = ln.PReLU() if flavour == "linen" else lambda rngs: nnx.PReLU()
    assert_twins(nn.PReLU(), flax, draw(5, 4), within=0, axes=as_is)


@both
@pytest.mark.parametrize("count", [1, 4])
def test_prelu_with_a_slope_a_channel_is_ours(flavour: str, count: int) -> None:
    flax: Flax = layers.linen.PReLU(count) if flavour == "linen" else lambda rngs: layers.nnx.PReLU(count)
    assert_twins(nn.PReLU(count), flax, draw(2, 4, 3, 3), within=0)


@both
def test_prelu_with_a_slope_a_channel_names_our_layer_where_the_template_has_flax_s(flavour: str) -> None:
    flax: Flax = ln.PReLU() if flavour == "linen" else lambda rngs: nnx.PReLU()
    with pytest.raises(errors.PlanError, match=rf"weights\.layers\.{flavour}\.PReLU\(4\)"):
        to_flax(nn.PReLU(4), template(flax, last(draw(2, 4, 3, 3))))
